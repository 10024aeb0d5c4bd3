"""A journal of rows, one JSON object a line; each step stands in it once, also after a resume."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files


@dataclass(frozen=True)
class Journal:
    path: Path

    def append(self, row: dict[str, Any]) -> None:
        files.append(self.path, json.dumps(plain(row)) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every whole row; a last line torn by a kill is left out."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)

    def cut(self, step: int) -> None:
        """Forget every row after `step`: the run goes on from there and will write them again."""
        if self.path.exists():
            kept = [row for row in self.rows() if row["step"] <= step]
            files.write(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: they are written as strings."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()}
