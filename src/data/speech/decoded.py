"""Sound files decoded once: what was found in each, and, if wanted, all samples in one memory-mapped file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stoker import files
from stoker.data import decode_cache
from stoker.data.speech import audio

FORMAT = 3  # raise it when other facts, or other samples, come out


@dataclass(frozen=True)
class Fact:
    """What was found in a file; where `problem` says why it cannot be read, the rest is 0."""

    path: str
    problem: str = ""
    count: int = 0  # samples at 16 kHz
    peak: float = 0.0
    rms: float = 0.0
    clipped: float = 0.0  # share of the samples at full scale
    offset: float = 0.0  # the constant that reading has subtracted
    digest: str = ""  # SHA-256 of the samples

    @property
    def seconds(self) -> float:
        return self.count / audio.RATE


class Decoded(decode_cache.Entries[Fact]):
    """Facts by path, and the samples where they are kept."""

    kind, dtype = Fact, np.int16

    def samples(self, path: str) -> np.ndarray | None:
        """(N,) float32 in [-1, 1] at 16 kHz; None where they are not kept."""
        kept = self.numbers(path)
        return None if kept is None else as_float(kept)


def decode(paths: Sequence[str], *, keep: bool) -> Decoded:
    """Decode files, or remember what came of it the last time.

    `keep` keeps the samples too, as int16 at 16 kHz: 115 MB an hour. Raises UserError where there is no room.
    """
    paths = list(dict.fromkeys(paths))
    key = [FORMAT, *map(files.identity, paths)]
    return decode_cache.read(Decoded, paths, _decode, files.home() / "audio", key=key, keep=keep, what="Reading sound",
                             otherwise="--no_cache_audio")


def as_int16(samples: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.clip(np.rint(samples * 2**15), -2**15, 2**15 - 1).astype(np.int16)
    return found


def as_float(samples: np.ndarray) -> np.ndarray:
    """int16 -> float32 in [-1, 1], exactly."""
    return samples.astype(np.float32) / 2**15


def digest(samples: np.ndarray) -> str:
    """SHA-256 of int16 samples, as facts have it."""
    return hashlib.sha256(samples.tobytes()).hexdigest()


def _decode(path: str) -> tuple[Fact, np.ndarray]:
    try:
        survey, samples = audio.surveyed(path)
    except audio.AudioError as error:
        return Fact(path, str(error)), np.zeros(0, np.int16)
    if not len(samples):
        return Fact(path, "holds no samples"), np.zeros(0, np.int16)
    kept = as_int16(samples)
    return Fact(path, "", len(kept), survey.peak, survey.rms, survey.clipped, survey.offset, digest(kept)), kept
