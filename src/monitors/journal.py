"""Writes metrics.jsonl, the one record of what the mathematics gave, and timings.jsonl beside it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.journal import Journal
from training.callback import REPORT, Callback

if TYPE_CHECKING:
    from training.trainer import Trainer


@dataclass
class JournalWriter(Callback):
    """One row a log step in each. Clocks, speed and memory stand in the second, which no proof compares.

    Rows that the disk does not take are kept, in snapshots too, and written with the next.
    """

    order = REPORT
    metrics: Path
    timings: Path
    _kept: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"metrics": [], "timings": []})
    _cut: dict[str, int] = field(default_factory=dict)  # journals to be cut yet, and after which step

    def on_start(self, trainer: "Trainer") -> None:
        """Forget what came after the snapshot: it will be done, and written, again."""
        self._cut = dict.fromkeys(self._kept, trainer.logged_step)
        self._write()

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self._kept["metrics"].append({"step": trainer.step, **metrics})
        self._kept["timings"].append({"step": trainer.step, "time": time.time(), **trainer.timings})
        self._write()

    def on_stop(self, trainer: "Trainer", reason: str) -> None:
        self._write()

    def _write(self) -> None:
        for name, path in (("metrics", self.metrics), ("timings", self.timings)):
            if name in self._cut:
                Journal(path).cut(self._cut[name])
                last = max((row["step"] for row in Journal(path).rows()), default=-1)
                self._kept[name] = [row for row in self._kept[name] if row["step"] > last]  # written since the snapshot
                del self._cut[name]
            if rows := self._kept[name]:
                Journal(path).append(*rows)
                rows.clear()

    def state_dict(self) -> dict[str, Any]:
        return {name: list(rows) for name, rows in self._kept.items() if rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept |= {name: list(rows) for name, rows in state.items()}
