"""Stops a run that has taken its time."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.callback import ACT, Callback

if TYPE_CHECKING:
    from training.trainer import Trainer


@dataclass
class TimeLimit(Callback):
    """Asks to save and stop after so many minutes of this sitting."""

    order = ACT
    minutes: float
    _start: float = 0.0

    def on_start(self, trainer: "Trainer") -> None:
        self._start = time.monotonic()

    def on_step_end(self, trainer: "Trainer") -> None:
        if time.monotonic() - self._start >= 60 * self.minutes:
            trainer.ask("stop", f"--max_minutes {self.minutes:g} are over", "stopped")
