"""Stops a run whose evaluations get no better, or whose overfit grows."""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from stoker.config import UserError
from stoker.daemon.table import figure, number
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Ratio
from stoker.training.core.options import Options
from stoker.training.core.totals import finite_or_nothing

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)

STATE = ("best", "improved", "gap", "grown", "since")


@dataclass
class EarlyStopping(Callback):
    """Asks to stop after `patience` epochs without an improvement of `metric` by more than `min_delta`, or after
    `overfit_patience` epochs in a row in which validation minus training loss was positive and grew by more than
    `overfit_min_delta`, without a new best evaluation.

    In a run shorter than an epoch both count evaluations. NaN is no improvement. The two losses of an epoch are the
    mean of its evaluations and the mean of the training in it.
    """

    order = ACT
    metric: str
    mode: str
    patience: int
    min_delta: float
    overfit_patience: int = 0
    overfit_min_delta: float = 0.01
    best: float = math.nan
    improved: int = 0  # the step of the last improvement
    gap: float = math.nan  # of the last epoch that was complete
    grown: int = 0  # epochs in a row in which it has grown
    since: int = 0  # the step at which it was computed
    scored: Ratio = Ratio(0.0, 0)  # validation losses since then
    trained: Ratio = Ratio(0.0, 0)  # training losses since then
    _step: Ratio = Ratio(0.0, 0)  # of the step in hand
    _unit: int = 1  # steps
    _units: str = "epochs"

    @classmethod
    def of(cls, cfg: Options, best: tuple[str, str]) -> Self:
        return cls(*best, cfg.early_stop_patience, cfg.early_stop_min_delta, cfg.early_stop_overfit_patience,
                   cfg.early_stop_overfit_min_delta)

    def on_start(self, trainer: "Trainer") -> None:
        every = trainer.evaluations.interval(self.metric)
        if trainer.steps < trainer.steps_per_epoch:
            self._unit, self._units = every, "evaluations"
            often = "the run is shorter than an epoch"
        else:
            self._unit, self._units = trainer.steps_per_epoch, "epochs"
            often = f"{trainer.steps_per_epoch / every:.3g} an epoch"
        gap = (f", or {self.overfit_patience} in which validation minus training loss grew" if self.overfit_patience
               else "")
        log.info("Early stopping: %d %s without improvement of %s%s (an evaluation every %d steps, %s)", self.patience,
                 self._units, self.metric, gap, every, often)

    def on_step_start(self, trainer: "Trainer") -> None:
        self._step = Ratio(0.0, 0)

    def on_loss(self, trainer: "Trainer", phase: str, loss: Ratio) -> None:
        if self.overfit_patience and phase == trainer.phases[-1].name:
            total, count = finite_or_nothing(loss)  # what is not finite was not trained on
            self._step = Ratio(self._step.total + total, self._step.count + count)

    def on_step_end(self, trainer: "Trainer") -> None:
        self.trained = Ratio(self.trained.total + self._step.total, self.trained.count + self._step.count)

    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        if self.metric in metrics:  # else abandoned, and done first when the run is resumed; or not due; or no memory
            self._compare(trainer, metrics[self.metric])
        if self.overfit_patience and "eval/loss" in metrics:
            self.scored = Ratio(self.scored.total + metrics["eval/loss"], self.scored.count + 1)
            if passed := trainer.step // self._unit - self.since // self._unit:
                self._compare_gap(trainer, passed)

    def _compare(self, trainer: "Trainer", value: float) -> None:
        gained = self.best - value if self.mode == "min" else value - self.best
        if gained > self.min_delta or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.improved = value, trainer.step
            return
        waited = trainer.step - self.improved
        if waited >= self.patience * self._unit:
            trainer.ask("stop", f"early stopping: {self.metric} has not improved by {self.min_delta:g} on "
                                f"{figure(self.metric, self.best)} in {waited // self._unit} {self._units}")

    def _compare_gap(self, trainer: "Trainer", passed: int) -> None:
        """Called at the first evaluation after the end of an epoch; `passed` epochs have ended since the last call."""
        if not self.trained.count:
            return
        gap = self.scored.total / self.scored.count - float(self.trained.total / self.trained.count)
        grew = gap > self.gap + self.overfit_min_delta and gap > 0  # NaN at first: it did not
        self.grown = self.grown + passed if grew and trainer.best_step <= self.since else 0
        self.gap, self.since = gap, trainer.step
        self.scored = self.trained = Ratio(0.0, 0)
        if self.grown >= self.overfit_patience:
            trainer.ask("stop", f"early stopping: validation minus training loss grew to {number(gap, 3)}, "
                                f"{self.grown} {self._units} in a row, without a new best evaluation")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE} | {"scored": list(self.scored),
                                                                "trained": list(self.trained)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() - self.state_dict().keys():
            raise UserError("the snapshot is of an older version, whose early stopping counted evaluations: resume it "
                            "with that version, or start a new run from its weights: --init_from")
        if state:
            for name in STATE:
                setattr(self, name, state[name])
            self.scored, self.trained = Ratio(*state["scored"]), Ratio(*state["trained"])
