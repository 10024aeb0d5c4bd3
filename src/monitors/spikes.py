"""Warns of losses far above the usual."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stoker.monitors.alerts import Alerts
from stoker.training.core.callback import Callback
from stoker.training.core.figures import Ratio
from stoker.training.core.incident import SPIKE

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

WINDOW, ENOUGH = 150, 30  # losses that the running median is taken of: at most, at least
FLOOR = 0.01  # of the median: deviations smaller than that are noise, however steady the loss


@dataclass
class _Course:
    """The losses of one phase. A step of few samples has a noisier loss, so it is allowed more."""

    losses: list[float] = field(default_factory=list)
    most: float = 0.0  # samples (tokens, ...) in a step
    above: bool = False

    def bound(self, factor: float, count: float) -> float:
        """What a loss over `count` samples has to exceed to be a spike: median + factor * median deviation."""
        if len(self.losses) < ENOUGH:
            return math.inf
        median = statistics.median(self.losses)
        deviation = statistics.median(abs(loss - median) for loss in self.losses)
        return median + factor * max(deviation, FLOOR * abs(median)) * math.sqrt(max(1.0, self.most / count))

    def add(self, loss: float, count: float, *, above: bool) -> None:
        self.losses = [*self.losses, loss][-WINDOW:]
        self.most, self.above = max(self.most, count), above


@dataclass
class Spikes(Callback):
    """Checks every step's loss, at the log step: until then the losses stay on the device.

    A loss more than `factor` median absolute deviations above the median of the 150 before it is a spike. Of several
    in a row the first is reported. A loss that is not finite is none: its update was dropped, which `Sanity` reports.
    With `recoveries` left, the run goes back to before that step, and leaves out its rows.
    """

    alerts: Path
    factor: float
    recoveries: int = 0
    _courses: dict[str, _Course] = field(default_factory=dict)
    _step: dict[str, Ratio] = field(default_factory=dict)  # of the step in hand, on the device
    _unjudged: list[tuple[int, str, Tensor]] = field(default_factory=list, repr=False)  # step, phase, (loss, count)

    def on_start(self, trainer: "Trainer") -> None:
        self._unjudged = [(step, phase, pair.to(trainer.device)) for step, phase, pair in self._unjudged]

    def on_step_start(self, trainer: "Trainer") -> None:
        self._step = {}

    def on_loss(self, trainer: "Trainer", phase: str, loss: Ratio) -> None:
        before = self._step.get(phase, Ratio(0.0, 0))
        self._step[phase] = Ratio(before.total + loss.total.detach().float(), before.count + loss.count)

    def on_step_end(self, trainer: "Trainer") -> None:
        for phase, (total, count) in self._step.items():
            pair = torch.stack([total / count, torch.zeros_like(total) + count])  # whether count is a tensor or not
            self._unjudged.append((trainer.step, phase, pair))

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        for step, phase, loss, count in self._on_host():
            if math.isfinite(loss):
                self._judge(trainer, step, phase, loss, count)
        self._unjudged = []

    def _judge(self, trainer: "Trainer", step: int, phase: str, loss: float, count: float) -> None:
        course = self._courses.setdefault(phase, _Course())
        bound = course.bound(self.factor, count)
        if loss > bound and not course.above:
            if len([entry for entry in trainer.ledger if entry["why"] == SPIKE]) < self.recoveries:
                trainer.go_back(step, SPIKE, f"a loss of {loss:.4g} at step {step}")
            name = "loss" if len(trainer.phases) == 1 else f"loss of {phase}"
            Alerts(self.alerts).report(
                step, "spike", f"a {name} of {loss:.4g} is far above the {statistics.median(course.losses):.4g} usual: "
                "look at its rows (alerts.jsonl); if spikes come back, try a lower --lr, a longer --warmup_steps or a "
                "lower --gradient_clip", phase=phase, loss=loss, bound=bound, rows=trainer.order.rows(step - 1))
        course.add(loss, count, above=loss > bound)

    def _on_host(self) -> list[tuple[int, str, float, float]]:
        """The losses that are not checked yet. One transfer brings all of them."""
        if not self._unjudged:
            return []
        values = torch.stack([pair for _, _, pair in self._unjudged]).tolist()
        return [(step, phase, *pair) for (step, phase, _), pair in zip(self._unjudged, values)]

    def state_dict(self) -> dict[str, Any]:
        return {"courses": {phase: asdict(course) for phase, course in self._courses.items()},
                "unjudged": [list(row) for row in self._on_host()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._courses = {phase: _Course(**course) for phase, course in state.get("courses", {}).items()}
        self._unjudged = [(step, phase, torch.tensor(pair)) for step, phase, *pair in state.get("unjudged", [])]
