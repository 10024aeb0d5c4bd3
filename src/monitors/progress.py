"""Warns when the training loss stops falling, and when evaluations get worse while it falls."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.monitors.alerts import Alarm, Alerts
from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

FEWEST_LINES, FEWEST_STEPS = 8, 100  # with fewer, noise may look like progress
STANDSTILL = 0.01  # a fall by less than this share of the loss is none
STILL_LINES, RISES = 3, 3  # in a row: log lines, evaluations


@dataclass
class Progress(Callback):
    """Looks at `train/loss` and `eval/loss`. Where a stage has several phases there is no such training loss, and a
    balance between them is no standstill.

    No progress: over the last quarter of the run (at least eight log lines and 100 steps), the line through the logged
    losses falls by less than 1 % of them, and by two of its standard errors it cannot be more; three times in a row.
    Overfitting: three evaluations in a row are worse than the one before, while the mean training loss between them
    fell.
    """

    alerts: Path
    _lines: list[tuple[int, float]] = field(default_factory=list)  # (step, train/loss)
    _between: list[float] = field(default_factory=list)  # train/loss since the last evaluation
    _trained: float = math.nan  # their mean before the last evaluation
    _evaluated: float = math.nan
    _still: Alarm = field(default_factory=lambda: Alarm(STILL_LINES))
    _worse: Alarm = field(default_factory=lambda: Alarm(RISES))

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        loss = metrics.get("train/loss", math.nan)
        if math.isfinite(loss):
            self._lines.append((trainer.step, loss))
            recent = sum(step > trainer.step - max(trainer.steps / 4, FEWEST_STEPS) for step, _ in self._lines)
            self._lines = self._lines[-max(recent + 1, FEWEST_LINES):]  # from where that stretch begins
            self._between.append(loss)
            self._judge_progress(trainer)
        if math.isfinite(metrics.get("eval/loss", math.nan)) and self._between:
            self._judge_overfitting(trainer, metrics["eval/loss"])

    def _judge_progress(self, trainer: "Trainer") -> None:
        (first, before), (_, now) = self._lines[0], self._lines[-1]
        enough = len(self._lines) >= FEWEST_LINES and trainer.step - first >= FEWEST_STEPS
        if self._still.rings(enough and stands_still(*zip(*self._lines))):
            Alerts(self.alerts).report(
                trainer.step, "no progress", f"train/loss has not fallen by {STANDSTILL:.0%} since step {first} "
                f"({before:.4g} then, {now:.4g} now): try --lr lower and higher, a longer --warmup_steps, a bigger "
                "--preset; look at the data; if this is as good as it gets, stop")

    def _judge_overfitting(self, trainer: "Trainer", evaluated: float) -> None:
        trained = sum(self._between) / len(self._between)
        if self._worse.rings(evaluated > self._evaluated and trained < self._trained):  # NaN at first: neither
            Alerts(self.alerts).report(
                trainer.step, "overfitting", f"eval/loss has risen {RISES} evaluations in a row, to {evaluated:.4g}, "
                f"while train/loss fell to {trained:.4g}: the model learns its data by heart; try more data, --dropout "
                "0.1 or --early_stopping (the best weights are kept in any case)")
        self._trained, self._evaluated, self._between = trained, evaluated, []

    def state_dict(self) -> dict[str, Any]:
        return {"lines": [list(line) for line in self._lines], "between": list(self._between),
                "trained": self._trained, "evaluated": self._evaluated, "still": self._still.held,
                "worse": self._worse.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._lines, self._between = [(step, loss) for step, loss in state["lines"]], list(state["between"])
            self._trained, self._evaluated = state["trained"], state["evaluated"]
            self._still.held, self._worse.held = state["still"], state["worse"]


def stands_still(steps: tuple[float, ...], losses: tuple[float, ...]) -> bool:
    """Whether the least-squares line through these losses falls by less than 1 % of their mean from end to end, even if
    it were steeper by two standard errors: where noise hides the slope, nothing is claimed."""
    x, y = np.array(steps, dtype=float), np.array(losses)
    mean, x, y = y.mean(), x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    error = math.sqrt(((y - slope * x) ** 2).sum() / (len(x) - 2) / (x @ x))
    return bool((2 * error - slope) * (x[-1] - x[0]) < STANDSTILL * abs(mean))
