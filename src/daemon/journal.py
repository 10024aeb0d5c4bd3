"""A journal of rows, one JSON object a line; each step stands in it once, also after a resume."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from stoker import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Journal:
    path: Path

    def append(self, *rows: dict[str, Any]) -> str:
        """All of them or none; returns the lines that were written. Synced: a snapshot that outlives a power cut must
        not be of a later step than the journal."""
        lines = "".join(json.dumps(plain(row)) + "\n" for row in rows)
        files.append(self.path, lines, sync=True)
        return lines

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every whole row, which has a whole number as its `step`. A line that a kill or a power cut left torn, or that
        was damaged since, is skipped with a warning."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line) if line.endswith("\n") else None
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict) and type(row.get("step")) is int:
                    yield row
                else:
                    log.warning("%s is torn at %r, which is left out", self.path, line[:20])

    def cut(self, step: int) -> None:
        """Forget every row after `step`: the run goes on from there and will write them again."""
        if self.path.exists():
            kept = [row for row in self.rows() if row["step"] <= step]
            files.write(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def extent(self) -> "Extent":
        """How far the journal goes now; reads all of it."""
        extent = Extent()
        if self.path.exists():
            extent.add(self.path.read_text(encoding="utf-8", errors="replace"))
        return extent

    def damage(self, noted: Mapping[str, Any], steps: Sequence[int]) -> str:
        """How the journal differs from what `Extent.state()` noted earlier, or ''. It must have been cut already.

        `steps`: those of which another file shows that a row was written; the message names the lost ones.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        if hashlib.sha256(content[:noted["size"]]).hexdigest() == noted["sha256"]:
            more = sum(row["step"] <= noted["step"] for row in self.rows()) - noted["rows"]
            return f"has {more} rows more up to step {noted['step']} than were written" if more else ""
        present = {row["step"] for row in self.rows() if row["step"] <= noted["step"]}
        missing = noted["rows"] - len(present)
        if missing <= 0:
            return f"has other figures up to step {noted['step']} than were written (SHA-256 differs)"
        written = sorted({noted["step"], *(step for step in steps if step <= noted["step"])})
        stretches = [list(part) for lost, part in groupby(written, lambda step: step not in present) if lost]
        if sum(map(len, stretches)) != missing:
            return f"lost {missing} of the {noted['rows']} rows that it had up to step {noted['step']}"
        named = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in stretches)
        what = "rows of steps" if missing > 1 else "row of step"
        return f"lost its {what} {named} ({missing} of {noted['rows']})"


@dataclass
class Extent:
    """How far a journal goes: rows, bytes, last step, and the SHA-256 of it all. It grows with each row appended, so
    noting it in a snapshot costs the same however long the journal is."""

    rows: int = 0
    size: int = 0  # bytes
    step: int = -1
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, lines: str) -> None:
        """Whole lines that were appended to the journal."""
        content = lines.encode()
        self.digest.update(content)
        self.rows, self.size = self.rows + content.count(b"\n"), self.size + len(content)
        if lines:
            self.step = json.loads(lines.splitlines()[-1])["step"]

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows, "size": self.size, "step": self.step, "sha256": self.digest.hexdigest()}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: they are written as strings."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()}
