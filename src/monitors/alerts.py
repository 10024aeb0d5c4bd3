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

    def tell(self, step: int, kind: str, message: str, **more: Any) -> None:
        """What stands there already is told in the log only: a run that goes on does some steps a second time."""
        log.warning("step %d: %s", step, message)
        row = {"step": step, "kind": kind, "message": message}
        if row not in [{name: told.get(name) for name in row} for told in Journal(self.path).rows()]:
            Journal(self.path).append({**row, "time": time.time(), **more})


@dataclass
class Alarm:
    """What is told when it has held `patience` times in a row, and not again until it has passed."""

    patience: int = 1
    held: int = 0

    def rings(self, holds: bool) -> bool:
        self.held = self.held + 1 if holds else 0
        return self.held == self.patience
