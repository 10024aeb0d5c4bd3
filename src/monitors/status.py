"""Keeps status.json true: what `ps.sh` shows."""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from daemon.rundir import RunDir, Status
from monitors.console import rates
from training.callback import REPORT, Callback

if TYPE_CHECKING:
    from training.trainer import Trainer

SECONDS_BETWEEN_WRITES = 1.0


@dataclass
class StatusWriter(Callback):
    """Writes at the first step, then at most once a second, and around evaluations. Reads clocks only."""

    order = REPORT
    run: RunDir
    _status: Status | None = None
    _written: float = 0.0
    _busy_before: float = 0.0  # seconds that trainers of this run had lived, up to `_since`
    _since: float = 0.0

    def on_start(self, trainer: "Trainer") -> None:
        self._status = replace(self.run.status(), of=trainer.steps, step=trainer.step, loss=None, speed="")
        preparing = time.time() - self._status.started if self._status.started else 0.0
        self._busy_before, self._since = self._status.busy_seconds + preparing, time.monotonic()

    def on_step_end(self, trainer: "Trainer") -> None:
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._write(trainer, "training")

    def on_eval_start(self, trainer: "Trainer") -> None:
        self._write(trainer, "evaluating")

    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self._write(trainer, "training")

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        assert self._status is not None
        losses = [value for name, value in metrics.items() if name.startswith("train/") and name.endswith("loss")]
        self._status = replace(self._status, loss=losses[-1] if losses else None, speed=rates(trainer),
                               eta_seconds=trainer.timings.get("speed/eta_seconds"))
        self._write(trainer, "training")

    def on_stop(self, trainer: "Trainer", reason: str) -> None:
        self._write(trainer, "training")

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        if self._status:  # else it failed before it had begun
            self._write(trainer, "training")

    def _write(self, trainer: "Trainer", state: str) -> None:
        assert self._status is not None
        best = trainer.best if trainer.best_step >= 0 else None
        self._status = replace(self._status, state=state, step=trainer.step, best=best,
                               switched_off=list(trainer.switched_off),
                               busy_seconds=self._busy_before + time.monotonic() - self._since)
        self.run.write_status(self._status)
        self._written = time.monotonic()
