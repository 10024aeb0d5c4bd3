"""Sound files decoded once: what was found in each, and, if wanted, all samples in one memory-mapped file."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from torch.utils.data import Dataset

import files
from config import UserError
from data import audio
from data.loader import evaluation_batches
from progress import tracked

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when other facts, or other samples, come out
FILES_AT_ONCE = 32
WORTH_WORKERS = 256  # files: fewer are read sooner than processes are started
FULL_SCALE = 0.999  # of the largest sample: what reaches it was clipped


@dataclass(frozen=True)
class Fact:
    """What was found in a file; where `problem` says why it cannot be read, the rest is 0."""

    path: str
    problem: str = ""
    count: int = 0  # samples at 16 kHz
    peak: float = 0.0
    rms: float = 0.0
    clipped: float = 0.0  # share of the samples at full scale
    digest: str = ""  # SHA-256 of the samples

    @property
    def seconds(self) -> float:
        return self.count / audio.RATE


class Decoded:
    """Facts by path, and the samples where they are kept."""

    def __init__(self, facts: Sequence[Fact], kept: Path | None):
        self.facts = {fact.path: fact for fact in facts}
        self._kept = np.memmap(kept, np.int16, mode="r") if kept and kept.stat().st_size else None
        ends = np.cumsum([fact.count for fact in facts])
        self._places = {fact.path: (end - fact.count, end) for fact, end in zip(facts, ends.tolist())}

    def samples(self, path: str) -> np.ndarray | None:
        """(N,) float32 in [-1, 1] at 16 kHz; None where they are not kept."""
        if self._kept is None:
            return None
        start, end = self._places[path]
        return as_float(self._kept[start:end])

    def fingerprint(self) -> str:
        """Of the sound alone: where the files lie makes no difference."""
        return hashlib.sha256("".join(fact.digest for fact in self.facts.values()).encode()).hexdigest()


def decode(paths: Sequence[str], *, keep: bool) -> Decoded:
    """Decode files, or remember what came of it the last time: as long as names, sizes and times are the same.

    `keep` keeps the samples too, as int16 at 16 kHz: 115 MB an hour. Raises UserError where there is no room.
    """
    paths = list(dict.fromkeys(paths))
    key = hashlib.sha256(json.dumps([FORMAT, *map(_identity, paths)]).encode()).hexdigest()[:32]
    note, kept = (files.home() / "audio" / f"{key}{suffix}" for suffix in (".json", ".bin"))
    with files.locked(note.with_suffix(".lock")):
        files.tidy(note.parent)
        if not _is_whole(note, kept if keep else None):
            _build(paths, note, kept if keep else None)
    facts = [Fact(**each) for each in json.loads(note.read_text())]
    return Decoded(facts, kept if keep else None)


def as_int16(samples: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.clip(np.rint(samples * 2**15), -2**15, 2**15 - 1).astype(np.int16)
    return found


def as_float(samples: np.ndarray) -> np.ndarray:
    """int16 -> float32 in [-1, 1], exactly."""
    return samples.astype(np.float32) / 2**15


def _identity(path: str) -> list[str | int]:
    try:
        status = os.stat(path)
    except OSError:
        return [path, -1, 0]
    return [path, status.st_size, status.st_mtime_ns]


def _is_whole(note: Path, kept: Path | None) -> bool:
    if not note.exists() or (kept and not kept.exists()):
        return False
    return not kept or kept.stat().st_size == 2 * sum(each["count"] for each in json.loads(note.read_text()))


def _build(paths: Sequence[str], note: Path, kept: Path | None) -> None:
    facts: list[Fact] = []

    def write(file: IO[bytes] | None) -> None:
        for fact, samples in tracked(_read(paths), "Reading sound", len(paths), "files"):
            facts.append(fact)
            if file:
                file.write(samples.tobytes())

    try:
        files.write(kept, write) if kept else write(None)
        files.write_json(note, [asdict(fact) for fact in facts], sync=False)
    except OSError as error:
        if not files.may_pass(error):
            raise
        raise UserError(f"{error.strerror} in {note.parent}: make room there, set STOKER_HOME to another disk, or take "
                        "--no_cache_audio") from error


def _read(paths: Sequence[str]) -> Iterator[tuple[int, tuple[Fact, np.ndarray]]]:
    workers = min(8, len(os.sched_getaffinity(0))) if len(paths) >= WORTH_WORKERS else 0
    for part in evaluation_batches(_Files(paths), list, FILES_AT_ONCE, workers):
        yield from ((1, each) for each in part)


class _Files(Dataset[tuple[Fact, np.ndarray]]):
    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Fact, np.ndarray]:
        path = self.paths[index]
        try:
            samples = audio.read(path)
        except audio.AudioError as error:
            return Fact(path, str(error)), np.zeros(0, np.int16)
        return _fact(path, samples), as_int16(samples)


def _fact(path: str, samples: np.ndarray) -> Fact:
    if not len(samples):
        return Fact(path, "holds no samples")
    size = np.abs(samples)
    return Fact(path, "", len(samples), float(size.max()), float(np.sqrt(np.mean(np.square(samples)))),
                float(np.mean(size >= FULL_SCALE)), hashlib.sha256(as_int16(samples).tobytes()).hexdigest())
