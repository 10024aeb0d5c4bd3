"""Sound files -> samples: read, resampled, written; any format of libsndfile, any rate, any number of channels."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
UNRECOGNISED = "Format not recognised"  # as libsndfile says it
SHORT = 0.1  # seconds: no word is shorter
SILENT = 1e-3  # of full scale, -60 dB: no sample is louder
FULL_SCALE = 0.999  # of the largest sample: what reaches it was clipped
CLIPPED = 1e-3  # share of the samples at full scale from which on it is heard
LOUDEST = 1000.0  # of full scale: floating-point samples beyond were never sound
CANCELLED = 0.1  # of the power that the mean of channels has which have nothing in common


class AudioError(Exception):
    """A file that cannot be read as sound; the message says why, without the file's name."""


@dataclass(frozen=True)
class Survey:
    """What a first reading of a file measures and the second one needs. Amplitudes are in units of full scale."""

    rate: int  # samples a second in the file
    channels: int
    count: int  # samples of each channel
    channel: int | None  # the one to listen to; None: the mean of all
    offset: float  # their mean over time, which reading subtracts: the microphone's, not the speech's
    rms: float  # of the samples without the offset
    peak: float  # the largest of them
    clipped: float  # share of the samples, of all channels, at full scale

    @property
    def seconds(self) -> float:
        return self.count / self.rate


def read(path: str | Path, rate: int = RATE, *, longest: float = LONGEST) -> "np.ndarray":
    """The samples of a regular file, (N,) float32 in [-1, 1], at `rate` samples a second: its channels' mean, without
    what is constant in it.

    Channels in opposite phase would cancel each other out: where the mean has a tenth of the power, or less, that
    channels without anything in common leave, it is the loudest channel. Read block by block, so that what a header
    claims needs no memory. Raises AudioError, also where it is longer than `longest` seconds, or beyond the bounds
    RATES and CHANNELS.
    """
    return surveyed(path, rate, longest=longest)[1]


def surveyed(path: str | Path, rate: int = RATE, *, longest: float = LONGEST) -> "tuple[Survey, np.ndarray]":
    """What was measured in a file, and its samples, see `read`."""
    import numpy as np

    found = survey(path, longest=longest)
    return found, np.concatenate([np.zeros(0, np.float32), *blocks(path, found, rate)])


def survey(path: str | Path, *, longest: float = LONGEST) -> Survey:
    """Measure a file without keeping its samples. Raises AudioError, as `read` does."""
    import numpy as np

    with _opened(path) as file:
        rate, channels, count, clipped = file.samplerate, file.channels, 0, 0
        sums, squares = np.zeros(channels + 1), np.zeros(channels + 1)  # of each channel, and of their mean
        least, most = np.full(channels + 1, np.inf), np.full(channels + 1, -np.inf)
        for block in _raw_blocks(file, longest):
            rows = np.vstack([block.T, block.mean(axis=1)])
            clipped += int(np.count_nonzero(np.abs(rows[:-1]) >= FULL_SCALE))
            count += len(block)
            sums += rows.sum(1, dtype=np.float64)
            squares += np.einsum("cn,cn->c", rows, rows, dtype=np.float64)
            least, most = np.minimum(least, rows.min(1)), np.maximum(most, rows.max(1))
    if not count:
        return Survey(rate, channels, 0, None, 0.0, 0.0, 0.0, 0.0)
    means = sums / count
    powers = np.maximum(squares / count - np.square(means), 0)
    is_cancelled = powers[-1] < CANCELLED * powers[:-1].sum() / channels**2
    channel = int(powers[:-1].argmax()) if is_cancelled else None
    of = -1 if channel is None else channel
    return Survey(rate, channels, count, channel, offset=float(means[of]), rms=float(np.sqrt(powers[of])),
                  peak=float(max(most[of] - means[of], means[of] - least[of])),
                  clipped=clipped / (count * channels))


def blocks(path: str | Path, found: Survey, rate: int = RATE) -> "Iterator[np.ndarray]":
    """The samples of a file that was surveyed, as `read` returns them, part by part. Raises AudioError, also where the
    file has changed since."""
    import numpy as np

    def mono() -> "Iterator[np.ndarray]":
        for block in _raw_blocks(file, float("inf")):
            samples = block.mean(axis=1) if found.channel is None else block[:, found.channel]
            yield samples - np.float32(found.offset)

    with _opened(path) as file:
        if (file.samplerate, file.channels) != (found.rate, found.channels):
            raise AudioError("has changed while it was read")
        for block in _resampled(mono(), file.samplerate, rate):
            yield np.clip(block, -1, 1, out=block)


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
    parts = (samples[start:start + AT_ONCE] for start in range(0, len(samples), AT_ONCE))
    return np.concatenate([np.zeros(0, np.float32), *_resampled(parts, rate, new_rate)])


def _resampled(blocks: "Iterable[np.ndarray]", rate: int, new_rate: int) -> "Iterator[np.ndarray]":
    """The blocks of a sound, each (n,) float32, at another rate."""
    import numpy as np

    if rate == new_rate:
        yield from blocks
        return
    import soxr  # type: ignore[import-untyped]

    stream, count, given = soxr.ResampleStream(rate, new_rate, 1), 0, 0
    for block in blocks:
        count += len(block)
        yield (part := stream.resample_chunk(block))
        given += len(part)
    lacking = -(-count * new_rate // rate) - given
    last = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:lacking]
    yield np.pad(last, (0, lacking - len(last)))  # soxr rounds: at some lengths it gives one fewer


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
        advice = ": if it is sound, convert it to FLAC or WAV" if said == UNRECOGNISED else ""
        raise AudioError(f"cannot be read as sound ({said}){advice}") from error


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


def _raw_blocks(file: Any, longest: float) -> "Iterator[np.ndarray]":
    """(n, channels) float32, part by part."""
    import numpy as np

    _refuse_length(file.frames, file.samplerate, longest)  # libsndfile reads no more than that
    count = 0
    while len(block := file.read(AT_ONCE // file.channels, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise AudioError("holds NaN or Inf")
        if (largest := np.abs(block).max()) > LOUDEST:
            raise AudioError(f"holds samples of up to {largest:.3g}, where full scale is 1: save it again with 16 bits")
        yield block
        count += len(block)
    if (lacking := (file.frames - count) / file.samplerate) > INAUDIBLE and truncation.knows_frames(file.name):
        raise AudioError(f"is cut short: its header names {lacking:.2f} s more than there are")
