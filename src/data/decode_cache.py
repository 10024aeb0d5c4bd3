"""A cache of decoded files: facts about each file and, if wanted, its decoded numbers in one memory-mapped file.

It is valid for as long as names, sizes and times of the files are the same.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset

from stoker import files
from stoker.data import blocks, cache, made
from stoker.data.blocks import Numbers
from stoker.data.loader import evaluation_batches
from stoker.progress import tracked

FILES_AT_ONCE = 32
WORTH_WORKERS = 256  # files: fewer are read sooner than processes are started


class Found(Protocol):
    """Facts about a decoded file: a dataclass of plain values."""

    @property
    def path(self) -> str: ...

    @property
    def count(self) -> int:
        """How many decoded numbers of the file the cache has."""

    @property
    def digest(self) -> str:
        """SHA-256 of its decoded content."""


F = TypeVar("F", bound=Found)
E = TypeVar("E", bound="Entries[Any]")
Read = tuple[F, np.ndarray]


class Entries(Generic[F]):
    """Facts of type `kind` by path and, where they are kept, the decoded numbers of type `dtype`."""

    kind: ClassVar[type]
    dtype: ClassVar[type[np.generic]]

    def __init__(self, facts: Sequence[F], kept: Numbers | None):
        self.facts = {fact.path: fact for fact in facts}
        self._kept = kept
        ends = np.cumsum([fact.count for fact in facts])
        self._places = {fact.path: (end - fact.count, end) for fact, end in zip(facts, ends.tolist())}

    def fingerprint(self) -> str:
        """A digest of the contents of the files; their paths make no difference."""
        return hashlib.sha256("".join(fact.digest for fact in self.facts.values()).encode()).hexdigest()

    def numbers(self, path: str) -> np.ndarray | None:
        """The decoded numbers of a file, (count,); None where the cache has only facts. Raises Damaged."""
        if self._kept is None:
            return None
        start, end = self._places[path]
        return self._kept[start:end]


class Files(Dataset[Read[F]]):
    """Item i is what `decode` returns for file i. Raises Damaged where a file that Stoker made was changed since."""

    def __init__(self, paths: Sequence[str], decode: Callable[[str], Read[F]]):
        self.paths, self.decode = paths, decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Read[F]:
        made.verify(self.paths[index])
        return self.decode(self.paths[index])


def read(entries: type[E], paths: Sequence[str], decode: Callable[[str], Read[Any]], where: Path, *, key: Any,
         keep: bool, what: str, otherwise: str) -> E:
    """The cached results of `decode`, (fact, numbers), for all files; decodes them if the cache does not have them.

    key        covers everything that the result depends on
    where      folder of the cache
    keep       whether to keep the numbers, not only the facts
    what       what is done, for the progress line
    otherwise  the option that needs no room on disk, for the error message

    Raises UserError where the disk has no room.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    note, kept = where / f"{name}.note", where / f"{name}.bin" if keep else None
    with cache.room(where, otherwise=otherwise), files.locked(note.with_suffix(".lock")):
        files.tidy(where)
        if (found := _remembered(entries, note, kept)) is None:
            _build(Files(paths, decode), note, kept, what)
            found = _remembered(entries, note, kept)
    assert found is not None, note
    return found


def _remembered(entries: type[E], note: Path, kept: Path | None) -> E | None:
    """The cached results; None where the facts, or the numbers if `kept` is given, are missing or damaged."""
    if (content := cache.read(note)) is None:
        return None
    known = json.loads(content)
    facts = [entries.kind(**each) for each in known["facts"]]
    if not kept:
        return entries(facts, None)
    numbers = blocks.opened(kept, entries.dtype, sum(fact.count for fact in facts), known["blocks"])
    return None if numbers is None else entries(facts, numbers)


def _build(reading: Files[F], note: Path, kept: Path | None, what: str) -> None:
    facts: list[F] = []

    def contents() -> Iterator[bytes]:
        for fact, numbers in tracked(_each(reading), what, len(reading), "files"):
            facts.append(fact)
            yield numbers.tobytes() if kept else b""

    digests: list[str] = []
    if kept:
        digests = blocks.write(kept, contents())
    else:
        for _ in contents():
            pass
    cache.write(note, json.dumps({"facts": list(map(asdict, facts)), "blocks": digests}))  # type: ignore[arg-type]


def _each(reading: Files[F]) -> Iterator[tuple[int, Read[F]]]:
    workers = min(8, len(os.sched_getaffinity(0))) if len(reading) >= WORTH_WORKERS else 0
    for part in evaluation_batches(reading, list, FILES_AT_ONCE, workers):
        yield from ((1, each) for each in part)
