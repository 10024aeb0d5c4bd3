"""Sums over the micro-batches of a step, along a tree whose shape follows from their number alone."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from stoker.training.core.networks import trained_modules

T = TypeVar("T")
Sums = dict[str, Tensor]


class Tree(Generic[T]):
    """Adds its leaves along a binary tree by their numbers: ((0+1)+(2+3))+((4+5)+6).

    The shape depends on how many there are alone, so that any number of processes that share them out in powers of two
    can compute the same bits.
    """

    def __init__(self, plus: Callable[[T, T], T]):
        self.plus, self.nodes, self.count = plus, list[T](), 0

    def add(self, node: T) -> None:
        """The next leaf."""
        self.count += 1
        pairs = self.count
        while pairs % 2 == 0:
            node, pairs = self.plus(self.nodes.pop(), node), pairs // 2
        self.nodes.append(node)

    def total(self, last: T) -> T:
        """The sum of all leaves and a last one."""
        while self.nodes:
            last = self.plus(self.nodes.pop(), last)
        return last


@runtime_checkable
class Summed(Protocol):
    """A module with statistics of its forward passes: an averaged codebook, the load of experts.

    In training mode `forward` adds to `sums`, by names of its own, sums over the samples of a micro-batch, and changes
    nothing else. The step adds up those of all its micro-batches and applies them once, after the update.
    """

    sums: Sums

    def apply_sums(self, sums: Sums, dropped: Tensor) -> None:
        """`dropped`: scalar, 1 where the step was not finite, so that nothing may be applied. Not called after a step
        in which the module was not used."""


class Statistics:
    """The sums of the modules of a model that have some, over the phases and micro-batches of a step."""

    def __init__(self, model: nn.Module):
        self.modules: list[Summed] = [module for module in trained_modules(model) if isinstance(module, Summed)]
        self.totals: list[Sums] = []
        self.trees: list[Tree[Sums]] = []

    def begin(self) -> None:
        """A step begins: what was summed outside of one does not count."""
        self.totals = [{} for _ in self.modules]
        self.clear()

    def begin_phase(self) -> None:
        self.trees = [Tree(_plus) for _ in self.modules]

    def add(self) -> None:
        """The forward pass of a micro-batch is done."""
        for module, tree in zip(self.modules, self.trees):
            tree.add({name: total.detach() for name, total in module.sums.items()})

    def clear(self) -> None:
        """Its backward pass is done, in which checkpointed blocks computed their forward pass a second time."""
        for module in self.modules:
            module.sums = {}

    def finish_phase(self) -> None:
        self.totals = [_plus(total, tree.total({})) for total, tree in zip(self.totals, self.trees)]

    def apply(self, dropped: Tensor) -> None:
        for module, total in zip(self.modules, self.totals):
            if total:
                module.apply_sums(total, dropped)


def _plus(left: Sums, right: Sums) -> Sums:
    return {**left, **right, **{name: left[name] + right[name] for name in left if name in right}}
