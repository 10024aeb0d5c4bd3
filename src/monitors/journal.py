"""Writes metrics.jsonl, the one record of what the mathematics gave, and timings.jsonl beside it."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.daemon.journal import Extent, Journal
from stoker.training.core.callback import REPORT, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class JournalWriter(Callback):
    """One row a log step in each. Clocks, speed and memory stand in the second, which no proof compares.

    Rows that the disk does not take are kept, in snapshots too, and written with the next. Each snapshot notes how far
    metrics.jsonl went, so that a resume can say what it has lost since.
    """

    order = REPORT
    metrics: Path
    timings: Path
    _kept: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"metrics": [], "timings": []})
    _cut: dict[str, int] = field(default_factory=dict)  # journals to be cut yet, and after which step
    _extent: Extent = field(default_factory=Extent)  # of metrics.jsonl, once it is cut
    _noted: dict[str, Any] = field(default_factory=dict)  # its extent as the snapshot has it

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
                self._cut_back(name, Journal(path), self._cut[name])
                del self._cut[name]
            if rows := self._kept[name]:
                lines = Journal(path).append(*rows)
                if name == "metrics":
                    self._extent.add(lines)
                rows.clear()

    def _cut_back(self, name: str, journal: Journal, step: int) -> None:
        """Cut a journal after `step`, and keep only the rows that were not written since the snapshot."""
        journal.cut(step)
        if name == "metrics":
            self._report_damage(journal)
            self._extent = journal.extent()
        last = max((row["step"] for row in journal.rows()), default=-1)
        self._kept[name] = [row for row in self._kept[name] if row["step"] > last]

    def _report_damage(self, journal: Journal) -> None:
        if not self._noted:
            return
        timed = [row["step"] for row in Journal(self.timings).rows()]  # has a row of every step too
        if damage := journal.damage(self._noted, timed):
            log.warning("%s %s: training continues, but its curves are not whole there", journal.path.name, damage)

    def state_dict(self) -> dict[str, Any]:
        extent = self._noted if "metrics" in self._cut else self._extent.state()
        return {**{name: list(rows) for name, rows in self._kept.items() if rows}, "extent": extent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._noted = state.get("extent", {})
        self._kept |= {name: list(rows) for name, rows in state.items() if name in self._kept}
