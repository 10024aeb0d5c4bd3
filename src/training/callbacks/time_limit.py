"""Stops a run that has taken its time."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.training.core.callback import ACT, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer


@dataclass
class TimeLimit(Callback):
    """Asks to save and stop after so many minutes of this sitting."""

    order = ACT
    minutes: float
    began: float  # by the monotonic clock

    def on_step_end(self, trainer: "Trainer") -> None:
        if time.monotonic() - self.began >= 60 * self.minutes:
            trainer.ask("stop", f"--max_minutes {self.minutes:g} are over", "stopped")
