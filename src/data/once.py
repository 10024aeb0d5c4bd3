"""Files read once: what was found in each, and, if wanted, what they hold, in one memory-mapped file.

Remembered for as long as their names, sizes and times are the same.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset

import files
from config import UserError
from data.loader import evaluation_batches
from progress import tracked

FILES_AT_ONCE = 32
WORTH_WORKERS = 256  # files: fewer are read sooner than processes are started


class Found(Protocol):
    """What was found in a file: a dataclass of plain values."""

    @property
    def path(self) -> str: ...

    @property
    def count(self) -> int:
        """How many numbers of it are kept."""


F = TypeVar("F", bound=Found)
Read = tuple[F, np.ndarray]


class Once(Generic[F]):
    """Facts by path, and the numbers where they are kept."""

    def __init__(self, facts: Sequence[F], kept: Path | None, dtype: type[np.generic]):
        self.facts = {fact.path: fact for fact in facts}
        self._kept = np.memmap(kept, dtype, mode="r") if kept and kept.stat().st_size else None
        ends = np.cumsum([fact.count for fact in facts])
        self._places = {fact.path: (end - fact.count, end) for fact, end in zip(facts, ends.tolist())}

    def numbers(self, path: str) -> np.ndarray | None:
        """(count,), as they were kept; None where they were not."""
        if self._kept is None:
            return None
        start, end = self._places[path]
        return self._kept[start:end]


def read(reading: Dataset[Read[F]], kind: type[F], where: Path, *, key: Any, dtype: type[np.generic], keep: bool,
         what: str, otherwise: str) -> Once[F]:
    """Item i of `reading` is (fact, numbers) of file i. `key` is all that decides what comes of it; `where` the folder
    of the cache, `what` is done and `otherwise` the option that needs no room, both for people. Raises UserError where
    there is no room."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    note, kept = where / f"{name}.json", where / f"{name}.bin" if keep else None
    with files.locked(note.with_suffix(".lock")):
        files.tidy(where)
        if not (found := _remembered(note, kept, kind, np.dtype(dtype).itemsize)):
            found = _build(reading, note, kept, what, otherwise)
    return Once(found, kept, dtype)


def _remembered(note: Path, kept: Path | None, kind: type[F], itemsize: int) -> list[F]:
    """The facts, or [] where they, or what is kept, are not whole."""
    if not note.exists() or (kept and not kept.exists()):
        return []
    facts = [kind(**each) for each in json.loads(note.read_text())]
    return [] if kept and kept.stat().st_size != itemsize * sum(fact.count for fact in facts) else facts


def _build(reading: Dataset[Read[F]], note: Path, kept: Path | None, what: str, otherwise: str) -> list[F]:
    facts: list[F] = []

    def write(file: IO[bytes] | None) -> None:
        size = len(reading)  # type: ignore[arg-type]
        for fact, numbers in tracked(_each(reading, size), what, size, "files"):
            facts.append(fact)
            if file:
                file.write(numbers.tobytes())

    try:
        files.write(kept, write) if kept else write(None)
        files.write_json(note, [asdict(fact) for fact in facts], sync=False)  # type: ignore[call-overload]
    except OSError as error:
        if not files.may_pass(error):
            raise
        raise UserError(f"{error.strerror} in {note.parent}: make room there, set STOKER_HOME to another disk, or take "
                        f"{otherwise}") from error
    return facts


def _each(reading: Dataset[Read[F]], size: int) -> Iterator[tuple[int, Read[F]]]:
    workers = min(8, len(os.sched_getaffinity(0))) if size >= WORTH_WORKERS else 0
    for part in evaluation_batches(reading, list, FILES_AT_ONCE, workers):
        yield from ((1, each) for each in part)
