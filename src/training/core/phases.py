"""Phases of a step: which parameters one optimizer updates, and at which steps."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from stoker.training.core.options import Options

SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    `names` is a pattern of parameter names with the shell's wildcards ("encoder.*", "*.bias"). A parameter belongs to
    the first group of a phase whose pattern matches its name.
    """

    names: str = "*"
    lr_factor: float = 1.0
    weight_decay: float | None = None  # None: --weight_decay for matrices, none for biases and norms


@dataclass(frozen=True)
class Phase:
    """One optimizer, which makes one update from all micro-batches of a step.

    It runs at step `first` (counted from 0) and every `every`th step after it, before step `last` (None: to the end of
    the run). Its learning rate follows a schedule over the steps at which it runs.

    optimizer      "": as --optimizer says; a name in `optim.OPTIMIZERS`; or a function that makes your own, called as
                   (groups, lr, betas) with torch's parameter groups
    clip           largest norm of the gradients, 0: no limit; None: as --gradient_clip says
    lr_schedule    "": as --lr_schedule says
    warmup_steps   updates of this phase; None: the same share of its updates as --warmup_steps is of the run's steps
    min_lr_ratio   None: as --min_lr_ratio says
    """

    name: str = "main"
    groups: tuple[Group, ...] = (Group(),)
    optimizer: "str | Callable[[list[dict[str, Any]], float, tuple[float, float]], Optimizer]" = ""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None
    first: int = 0
    every: int = 1
    last: int | None = None
    lr_schedule: str = ""
    warmup_steps: int | None = None
    min_lr_ratio: float | None = None

    def spans(self, step: int) -> bool:
        """Whether a step, counted from 0, is in [first, last)."""
        return step >= self.first and (self.last is None or step < self.last)

    def runs(self, step: int) -> bool:
        """Whether the phase makes an update at a step, counted from 0."""
        return self.spans(step) and (step - self.first) % self.every == 0

    def updates(self, step: int) -> int:
        """The number of updates that the phase makes in the first `step` steps."""
        end = step if self.last is None else min(step, self.last)
        return max(0, -(-(end - self.first) // self.every))

    def updates_in(self, spans: Sequence[range]) -> bool:
        """Whether the phase makes an update in one of these spans of steps."""
        return any(self.updates(span.stop) > self.updates(span.start) for span in spans)

    def schedule(self, cfg: "Options", steps: int) -> dict[str, Any]:
        """The keyword arguments of `optim.rate` for this phase, in a run of `steps` steps."""
        warmup = cfg.warmup_steps * self.updates(steps) // steps if self.warmup_steps is None else self.warmup_steps
        return {"warmup": warmup, "schedule": self.lr_schedule or cfg.lr_schedule,
                "min_ratio": cfg.min_lr_ratio if self.min_lr_ratio is None else self.min_lr_ratio}

    def parameters(self, model: "nn.Module") -> "list[tuple[Group, dict[str, nn.Parameter]]]":
        """The groups, each with its trainable parameters by name; groups without any are left out."""
        members: list[dict[str, nn.Parameter]] = [{} for _ in self.groups]
        for name, parameter in model.named_parameters():
            first = next((i for i, group in enumerate(self.groups) if fnmatchcase(name, group.names)), None)
            if parameter.requires_grad and first is not None:
                members[first][name] = parameter
        return [(group, found) for group, found in zip(self.groups, members) if found]

    def problems(self) -> list[str]:
        """What its declaration has that cannot be."""
        found = [] if re.fullmatch("[a-z][a-z0-9_]*", self.name) else ["a name has lower case letters, digits and _"]
        if self.every < 1:
            found.append(f"every is {self.every}: it must be at least 1")
        if self.first < 0 or (self.last is not None and self.last < self.first):
            found.append(f"it runs from step {self.first} to before step {self.last}: steps are counted from 0, and "
                         "last is not before first")
        if self.lr_schedule not in ("", *SCHEDULES):
            found.append(f"there is no lr_schedule {self.lr_schedule!r}; there are {', '.join(SCHEDULES)}")
        return [f"phase {self.name!r}: {problem}" for problem in found]


def check_declared(phases: Sequence[Phase]) -> None:
    """Raises UserError with everything in the declarations of a stage's phases that cannot be."""
    problems = [problem for phase in phases for problem in phase.problems()]
    problems += [f"{count} phases are called {name}: each has a name of its own"
                 for name, count in Counter(phase.name for phase in phases).items() if count > 1]
    if not phases:
        problems.append("phases() returns none: nothing would be trained")
    if problems:
        raise UserError(*problems)


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
