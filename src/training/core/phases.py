"""Phases of a step: which parameters are updated together, by which optimizer, and at which steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    `names` is a pattern of parameter names, as the shell has them ("encoder.*", "*.bias"). Of a phase's groups the
    first whose pattern fits takes a parameter.
    """

    names: str = "*"
    lr_factor: float = 1.0
    weight_decay: float | None = None  # None: --weight_decay for matrices, none for biases and norms


@dataclass(frozen=True)
class Phase:
    """One optimizer and one update from all micro-batches of a step.

    It runs at step `first` (counted from 0) and every `every`th step after it, before step `last` (None: to the end of
    the run). Its learning rate follows the schedule over the steps at which it runs.
    """

    name: str = "main"
    groups: tuple[Group, ...] = (Group(),)
    optimizer: str = ""  # "": --optimizer
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None  # largest norm of the gradients; None: --gradient_clip
    first: int = 0
    every: int = 1
    last: int | None = None

    def runs(self, step: int) -> bool:
        """Whether it runs at a step, counted from 0."""
        return (step >= self.first and (step - self.first) % self.every == 0
                and (self.last is None or step < self.last))

    def updates(self, step: int) -> int:
        """How many updates it has made before a step."""
        end = step if self.last is None else min(step, self.last)
        return max(0, -(-(end - self.first) // self.every))

    def parameters(self, model: "nn.Module") -> "list[tuple[Group, dict[str, nn.Parameter]]]":
        """Its groups with the trainable parameters that each takes, by name; groups without any are left out."""
        taken: list[dict[str, nn.Parameter]] = [{} for _ in self.groups]
        for name, parameter in model.named_parameters():
            fits = next((i for i, group in enumerate(self.groups) if fnmatchcase(name, group.names)), None)
            if parameter.requires_grad and fits is not None:
                taken[fits][name] = parameter
        return [(group, found) for group, found in zip(self.groups, taken) if found]


def check(phases: Sequence[Phase], model: "nn.Module") -> None:
    """Raises UserError where a phase trains nothing, or a parameter that could be trained is in no phase."""
    claimed = set[str]()
    for phase in phases:
        names = {name for _, found in phase.parameters(model) for name in found}
        if not names:
            raise UserError(f"phase {phase.name} trains nothing: no trainable parameter fits "
                            + ", ".join(group.names for group in phase.groups))
        claimed |= names
    missing = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in claimed]
    if missing:
        raise UserError(f"{len(missing)} parameters are in no phase, the first is {missing[0]}: add a group that "
                        "fits them, or freeze them")
