"""Alerts: a line in the log, and a row in the run's alerts.jsonl."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.daemon.journal import Journal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alerts:
    path: Path

    def report(self, step: int, kind: str, message: str, **more: Any) -> None:
        """Log an alert and append it to alerts.jsonl, unless it is there: a resumed run does some steps again."""
        log.warning("step %d: %s", step, message)
        row = {"step": step, "kind": kind, "message": message}
        if row not in [{name: each.get(name) for name in row} for each in Journal(self.path).rows()]:
            Journal(self.path).append({**row, "time": time.time(), **more})


@dataclass
class Alarm:
    """Rings once when a condition has held `patience` times in a row, and not again until it has stopped holding."""

    patience: int = 1
    held: int = 0

    def rings(self, holds: bool) -> bool:
        self.held = self.held + 1 if holds else 0
        return self.held == self.patience
