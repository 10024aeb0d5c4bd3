"""Stops a run whose evaluations get no better, or whose overfit grows."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from training.callback import ACT, Callback
from training.options import Options
from training.stage import Ratio
from training.totals import finite_or_nothing

if TYPE_CHECKING:
    from training.trainer import Trainer


@dataclass
class EarlyStopping(Callback):
    """Asks to stop after `patience` evaluations in a row without an improvement of `min_delta` in `metric`,
    or after `overfit_patience` in a row in which validation minus training loss grew by `overfit_min_delta`.

    NaN is no improvement. The training loss compared is the mean since the evaluation before.
    """

    order = ACT
    metric: str
    mode: str
    patience: int
    min_delta: float
    overfit_patience: int = 0
    overfit_min_delta: float = 0.01
    best: float = math.nan
    waited: int = 0
    gap: float = math.nan
    grown: int = 0
    trained: Ratio = Ratio(0.0, 0)
    _step: Ratio = Ratio(0.0, 0)  # of the step in hand

    @classmethod
    def of(cls, cfg: Options, best: tuple[str, str]) -> Self:
        return cls(*best, cfg.early_stop_patience, cfg.early_stop_min_delta, cfg.early_stop_overfit_patience,
                   cfg.early_stop_overfit_min_delta)

    def on_step_start(self, trainer: "Trainer") -> None:
        self._step = Ratio(0.0, 0)

    def on_loss(self, trainer: "Trainer", phase: str, loss: Ratio) -> None:
        if self.overfit_patience and phase == trainer.stage.phases[-1]:
            total, count = finite_or_nothing(loss)  # what is not finite was not trained on
            self._step = Ratio(self._step.total + total, self._step.count + count)

    def on_step_end(self, trainer: "Trainer") -> None:
        self.trained = Ratio(self.trained.total + self._step.total, self.trained.count + self._step.count)

    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        if not metrics:  # abandoned: it will be done again
            return
        self._judge(trainer, metrics[self.metric])
        if self.overfit_patience and "eval/loss" in metrics and self.trained.count:
            self._judge_gap(trainer, metrics["eval/loss"] - float(self.trained.total / self.trained.count))
            self.trained = Ratio(0.0, 0)

    def _judge(self, trainer: "Trainer", value: float) -> None:
        gained = self.best - value if self.mode == "min" else value - self.best
        if gained > self.min_delta or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trainer.ask("stop", f"early stopping: {self.metric} has not improved by {self.min_delta:g} on "
                                f"{self.best:.4f} in {self.waited} evaluations")

    def _judge_gap(self, trainer: "Trainer", gap: float) -> None:
        self.grown = self.grown + 1 if gap > self.gap + self.overfit_min_delta else 0  # NaN at first: not grown
        self.gap = gap
        if self.grown >= self.overfit_patience:
            trainer.ask("stop", f"early stopping: validation minus training loss grew to {gap:.4f}, "
                                f"{self.grown} evaluations in a row")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "gap": self.gap, "grown": self.grown,
                "trained": list(self.trained)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.best, self.waited, self.gap, self.grown = (state[k] for k in ("best", "waited", "gap", "grown"))
            self.trained = Ratio(*state["trained"])
