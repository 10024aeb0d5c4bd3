"""Sound files -> samples: read, resampled, written; any format of libsndfile, any rate, any number of channels."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stoker import files
from stoker.data.speech import truncation

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000  # samples a second of all speech that a model hears
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
# What is beyond these bounds is refused, so that one hostile file cannot take the machine's memory or hours:
LONGEST = 600.0  # seconds of a recording to train on, 38 MB as samples; models are given 20 s by default
RATES = 1_000, 384_000  # Hz: with fewer nothing can be understood, and no recorder makes more
CHANNELS = 64  # of a microphone array
INAUDIBLE = 0.05  # seconds that may be missing: encoders pad, and not all write by how much
AT_ONCE = 2**16  # samples, of all channels together, that are read and resampled at once
UNKNOWN = 2**62  # frames: with so many, a header says that it does not know them (libsndfile: 2**63 - 1)


class AudioError(Exception):
    """A file that cannot be read as sound; the message says why, without the file's name."""


def read(path: str | Path, rate: int = RATE, *, longest: float = LONGEST) -> "np.ndarray":
    """The samples of a regular file, (N,) float32 in [-1, 1]: its channels' mean, at `rate` samples a second.

    Read block by block, so that what a header claims needs no memory. Raises AudioError, also where it is longer than
    `longest` seconds, or beyond the bounds RATES and CHANNELS.
    """
    import numpy as np

    with _opened(path) as file:
        found = _joined(_blocks(file, longest), file.samplerate, rate)
    return np.clip(found, -1, 1, out=found)


def seconds(path: str | Path) -> float:
    """How long a file is, as its header says. Raises AudioError, as `read` does."""
    with _opened(path) as file:
        _refuse_length(file.frames, file.samplerate, LONGEST)
        return float(file.frames / file.samplerate)


def write(target: Path | IO[bytes], samples: "np.ndarray", rate: int = RATE) -> None:
    """Samples in [-1, 1], or int16 as they are, as a FLAC file of 16 bits."""
    import soundfile  # type: ignore[import-untyped]

    soundfile.write(target, samples, rate, format="FLAC", subtype="PCM_16")


def resampled(samples: "np.ndarray", rate: int, new_rate: int) -> "np.ndarray":
    """(N,) at `rate` -> (ceil(N * new_rate / rate),) at `new_rate`, both float32: band-limited interpolation (libsoxr,
    HQ), the same bits wherever and by however many threads it is done."""
    import numpy as np

    samples = np.ascontiguousarray(samples, np.float32)
    return _joined((samples[start:start + AT_ONCE] for start in range(0, len(samples), AT_ONCE)), rate, new_rate)


def _joined(blocks: "Iterable[np.ndarray]", rate: int, new_rate: int) -> "np.ndarray":
    """The blocks of a sound, each (n,) float32, as one, at another rate."""
    import numpy as np

    nothing = np.zeros(0, np.float32)
    if rate == new_rate:
        return np.concatenate([nothing, *blocks])
    import soxr  # type: ignore[import-untyped]

    stream, count, parts = soxr.ResampleStream(rate, new_rate, 1), 0, []
    for block in blocks:
        count += len(block)
        parts.append(stream.resample_chunk(block))
    parts.append(stream.resample_chunk(nothing, last=True))
    found = np.concatenate(parts)
    wanted = -(-count * new_rate // rate)
    return np.pad(found[:wanted], (0, max(0, wanted - len(found))))  # soxr rounds: at some lengths it gives one fewer


# -- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A soundfile.SoundFile within bounds. Raises AudioError, also for what goes wrong while it is read."""
    import soundfile

    try:
        with files.opened(path) as raw:
            if not os.fstat(raw.fileno()).st_size:
                raise AudioError("is empty")
            if missing := truncation.missing(raw.fileno()):
                raise AudioError(f"is cut short: {missing}")
            with soundfile.SoundFile(raw.fileno(), closefd=False) as file:
                _refuse_format(file.samplerate, file.channels)
                yield file
    except OSError as error:
        raise AudioError(files.reason(error)) from error
    except RuntimeError as error:  # soundfile's own
        said = str(getattr(error, "error_string", "") or error).removeprefix("Error : ").strip().rstrip(".")
        if "psf_fseek" in said:  # libsndfile wanted to read beyond the end of the file
            raise AudioError("is cut short: its header names more samples than there are") from error
        raise AudioError(f"cannot be read as sound ({said})") from error


def _refuse_format(rate: int, channels: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioError(f"has {rate:,} samples a second: from {RATES[0]:,} to {RATES[1]:,} can be read")
    if channels > CHANNELS:
        raise AudioError(f"has {channels:,} channels: up to {CHANNELS} can be read")


def _refuse_length(frames: int, rate: int, longest: float) -> None:
    if frames >= UNKNOWN:
        raise AudioError("does not say how long it is, as if written to a pipe: save it again, as a file")
    if frames > longest * rate:
        raise AudioError(f"is longer than {longest / 60:g} minutes: cut it into parts")


def _blocks(file: Any, longest: float) -> "Iterator[np.ndarray]":
    """The mean of its channels, (n,) float32, part by part."""
    import numpy as np

    _refuse_length(file.frames, file.samplerate, longest)  # libsndfile reads no more than that
    count = 0
    while len(block := file.read(AT_ONCE // file.channels, dtype="float32", always_2d=True)):
        mono = block.mean(axis=1) if file.channels > 1 else block[:, 0]
        if not np.isfinite(mono).all():
            raise AudioError("holds NaN or Inf")
        yield mono
        count += len(block)
    if (lacking := (file.frames - count) / file.samplerate) > INAUDIBLE and truncation.knows_frames(file.name):
        raise AudioError(f"is cut short: its header names {lacking:.2f} s more than there are")
