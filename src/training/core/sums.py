"""Sums over the micro-batches of a step, in an order that depends only on how many there are."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from stoker.training.core.networks import trained_modules

T = TypeVar("T")
Sums = dict[str, Tensor]


class Tree(Generic[T]):
    """Adds values ("leaves") along a binary tree, in the order in which they come: ((0+1)+(2+3))+((4+5)+6).

    The shape depends only on the number of leaves. So 2, 4, 8, ... processes that have equal shares of them can compute
    the same bits as one process.
    """

    def __init__(self, plus: Callable[[T, T], T]):
        self.plus, self.nodes, self.count = plus, list[T](), 0

    def add(self, node: T) -> None:
        """Add the next leaf."""
        self.count += 1
        pairs = self.count
        while pairs % 2 == 0:
            node, pairs = self.plus(self.nodes.pop(), node), pairs // 2
        self.nodes.append(node)

    def total(self, last: T) -> T:
        """The sum of all leaves that were added, and of `last` as one more."""
        while self.nodes:
            last = self.plus(self.nodes.pop(), last)
        return last


@runtime_checkable
class Summed(Protocol):
    """A module that learns from statistics of its forward passes: an averaged codebook, the load of experts.

    In training mode `forward` adds to the dictionary `sums`, under names that the module chooses, sums over the samples
    of a micro-batch, and changes nothing else. The step adds them up over all its micro-batches and calls `apply_sums`
    once, after the update.
    """

    sums: Sums

    def apply_sums(self, sums: Sums, dropped: Tensor) -> None:
        """Change the module by the sums of a whole step. `dropped`: a scalar on the device, 1 where the step was not
        finite: the module must then stay as it is. Not called after a step in which the module was not used."""


class Statistics:
    """Adds the sums of a model's `Summed` modules over the micro-batches and phases of a step."""

    def __init__(self, model: nn.Module):
        self.modules: list[Summed] = [module for module in trained_modules(model) if isinstance(module, Summed)]
        self.totals: list[Sums] = []
        self.trees: list[Tree[Sums]] = []

    def begin(self) -> None:
        """Begin a step, and drop what forward passes outside of a step have summed."""
        self.totals = [{} for _ in self.modules]
        self.clear()

    def begin_phase(self) -> None:
        self.trees = [Tree(_plus) for _ in self.modules]

    def add(self) -> None:
        """Add the sums of a micro-batch, after its forward pass."""
        for module, tree in zip(self.modules, self.trees):
            tree.add({name: total.detach() for name, total in module.sums.items()})

    def clear(self) -> None:
        """Drop the modules' sums, after the backward pass: in it checkpointed blocks ran forward a second time."""
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
