"""A journal of rows, one JSON object a line; each step stands in it once, also after a resume."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Journal:
    path: Path

    def append(self, *rows: dict[str, Any]) -> None:
        """All of them or none. Synced: a snapshot that outlives a power cut must not be of a later step than the
        journal."""
        files.append(self.path, "".join(json.dumps(plain(row)) + "\n" for row in rows), sync=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every whole row; what a kill or a power cut left torn at the end is left out."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line) if line.endswith("\n") else None
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield row
                else:
                    log.warning("%s is torn at %r, which is left out", self.path, line[:20])

    def cut(self, step: int) -> None:
        """Forget every row after `step`: the run goes on from there and will write them again."""
        if self.path.exists():
            kept = [row for row in self.rows() if row["step"] <= step]
            files.write(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: they are written as strings."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()}
