"""Files read once: what was found in each, and, if wanted, what they hold, in one memory-mapped file.

Remembered for as long as their names, sizes and times are the same.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset

from stoker import files
from stoker.data import blocks, cache
from stoker.data.blocks import Numbers
from stoker.data.loader import evaluation_batches
from stoker.progress import tracked

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


class Entries(Generic[F]):
    """Facts by path, and the numbers where they are kept."""

    def __init__(self, facts: Sequence[F], kept: Numbers | None):
        self.facts = {fact.path: fact for fact in facts}
        self._kept = kept
        ends = np.cumsum([fact.count for fact in facts])
        self._places = {fact.path: (end - fact.count, end) for fact, end in zip(facts, ends.tolist())}

    def numbers(self, path: str) -> np.ndarray | None:
        """(count,), as they were kept; None where they were not. Raises Damaged."""
        if self._kept is None:
            return None
        start, end = self._places[path]
        return self._kept[start:end]


def read(reading: Dataset[Read[F]], kind: type[F], where: Path, *, key: Any, dtype: type[np.generic], keep: bool,
         what: str, otherwise: str) -> Entries[F]:
    """Item i of `reading` is (fact, numbers) of file i. `key` is all that decides what comes of it; `where` the folder
    of the cache, `what` is done and `otherwise` the option that needs no room, both for people. Raises UserError where
    there is no room."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    note, kept = where / f"{name}.note", where / f"{name}.bin" if keep else None
    with cache.room(where, otherwise=otherwise), files.locked(note.with_suffix(".lock")):
        files.tidy(where)
        if (found := _remembered(note, kept, kind, dtype)) is None:
            _build(reading, note, kept, what)
            found = _remembered(note, kept, kind, dtype)
    assert found is not None, note
    return found


def _remembered(note: Path, kept: Path | None, kind: type[F], dtype: type[np.generic]) -> Entries[F] | None:
    """None where the facts, or the numbers to be kept, are not there, or damaged."""
    if (content := cache.read(note)) is None:
        return None
    known = json.loads(content)
    facts = [kind(**each) for each in known["facts"]]
    if not kept:
        return Entries(facts, None)
    numbers = blocks.opened(kept, dtype, sum(fact.count for fact in facts), known["blocks"])
    return None if numbers is None else Entries(facts, numbers)


def _build(reading: Dataset[Read[F]], note: Path, kept: Path | None, what: str) -> None:
    facts: list[F] = []

    def contents() -> Iterator[bytes]:
        size = len(reading)  # type: ignore[arg-type]
        for fact, numbers in tracked(_each(reading, size), what, size, "files"):
            facts.append(fact)
            yield numbers.tobytes() if kept else b""

    digests: list[str] = []
    if kept:
        digests = blocks.write(kept, contents())
    else:
        for _ in contents():
            pass
    cache.write(note, json.dumps({"facts": list(map(asdict, facts)), "blocks": digests}))  # type: ignore[arg-type]


def _each(reading: Dataset[Read[F]], size: int) -> Iterator[tuple[int, Read[F]]]:
    workers = min(8, len(os.sched_getaffinity(0))) if size >= WORTH_WORKERS else 0
    for part in evaluation_batches(reading, list, FILES_AT_ONCE, workers):
        yield from ((1, each) for each in part)
