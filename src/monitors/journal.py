"""Writes metrics.jsonl, the one record of what the mathematics gave, and timings.jsonl beside it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.journal import Journal
from training.callback import REPORT, Callback

if TYPE_CHECKING:
    from training.trainer import Trainer


@dataclass
class JournalWriter(Callback):
    """One row a log step in each. Clocks, speed and memory stand in the second, which no proof compares."""

    order = REPORT
    metrics: Path
    timings: Path

    def on_start(self, trainer: "Trainer") -> None:
        """Forget what came after the snapshot: it will be done, and written, again."""
        for path in (self.metrics, self.timings):
            Journal(path).cut(trainer.logged_step)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        Journal(self.metrics).append({"step": trainer.step, **metrics})
        Journal(self.timings).append({"step": trainer.step, "time": time.time(), **trainer.timings})
