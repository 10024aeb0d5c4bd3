"""Keeps status.json true: what `ps.sh` shows."""

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stoker.daemon.pulse import EVALUATING, FINISHING, STARTING, TRAINING, Pulse
from stoker.monitors.console import rates
from stoker.training.core.callback import REPORT, Callback

if TYPE_CHECKING:
    from stoker.training.core.figures import Ratio
    from stoker.training.trainer import Trainer

LONG_STEP = 10.0  # seconds: in a longer one the micro-batches are written down too
COMPILED_LEAST = 600.0  # seconds: a step whose shape is new is compiled first


@dataclass
class StatusWriter(Callback):
    """Writes at the first step, then at most once a second, and around evaluations. Reads clocks only.

    Each micro-batch and step is a sign of progress.
    """

    order = REPORT
    pulse: Pulse
    _figures: dict[str, Any] = field(default_factory=dict)  # as logged last

    def on_start(self, trainer: "Trainer") -> None:
        if not self.pulse.busy[1]:  # else the run has gone back
            status = self.pulse.run.status()
            preparing = max(0.0, time.time() - status.started) if status.started else 0.0
            self.pulse.busy = status.busy_seconds + preparing, time.monotonic()
        self._figures = {"of": trainer.steps, "loss": None, "speed": ""}
        if trainer.cfg.compile:
            self.pulse.patience = replace(self.pulse.patience, least=COMPILED_LEAST)
        self.pulse.enter(STARTING, step=trainer.step, **self._figures)

    def on_loss(self, trainer: "Trainer", phase: str, loss: "Ratio") -> None:
        self.pulse.mark(LONG_STEP)

    def on_step_end(self, trainer: "Trainer") -> None:
        self.pulse.enter(TRAINING, **self._now(trainer))

    def on_eval_start(self, trainer: "Trainer") -> None:
        self.pulse.enter(EVALUATING, **self._now(trainer, "evaluating"))

    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self.pulse.back(**self._now(trainer))

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        names = ["train/loss"] + [f"train/{phase.name}/loss" for phase in trainer.phases]
        # of several phases, the last that has run: the last of all is the one that an evaluation has too
        loss = next((metrics[name] for name in reversed(names) if name in metrics), None)
        self._figures |= {"loss": loss, "speed": rates(trainer),
                          "eta_seconds": trainer.timings.get("speed/eta_seconds")}
        self.pulse.write(**self._now(trainer))

    def on_trouble(self, trainer: "Trainer") -> None:
        trouble = trainer.saver.trouble
        self._figures["reason"] = f"no snapshot can be written, and it is tried again: {trouble}" if trouble else ""
        self.pulse.write(**self._now(trainer))

    def on_stop(self, trainer: "Trainer", reason: str) -> None:
        self.pulse.enter(FINISHING, **self._now(trainer))

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        if self.pulse.busy[1]:  # else it failed before it had begun
            self.pulse.write(**self._now(trainer))

    def _now(self, trainer: "Trainer", state: str = "training") -> dict[str, Any]:
        return {**self._figures, **_best(trainer), "state": state, "step": trainer.step,
                "switched_off": list(trainer.switched_off),
                "busy_seconds": self.pulse.busy_seconds}


def _best(trainer: "Trainer") -> dict[str, Any]:
    """The best evaluation; where the stage derives a figure from it, as perplexity from the loss, that figure."""
    if trainer.best_step < 0:
        return {"best": None}
    name, mode = trainer.stage.best
    (name, value), *_ = trainer.stage.derive({name: trainer.best}).items() or [(name, trainer.best)]
    return {"best": value, "best_metric": name.removeprefix("eval/"), "best_mode": mode}
