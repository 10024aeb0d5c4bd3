"""Sound files -> samples: read, resampled, written; any format of libsndfile, any rate, any number of channels."""

from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import wheels

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000  # samples a second of all speech that a model hears
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


class AudioError(Exception):
    """A file that cannot be read as sound; the message says why, without the file's name."""


def read(path: str | Path, rate: int = RATE) -> "np.ndarray":
    """The samples of a file, (N,) float32 in [-1, 1]: its channels' mean, at `rate` samples a second.

    Raises AudioError.
    """
    import numpy as np

    samples, own_rate = _decoded(path)
    mono = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if not np.isfinite(mono).all():
        raise AudioError("holds NaN or Inf")
    found: np.ndarray = np.clip(resampled(mono, own_rate, rate), -1, 1)
    return found


def seconds(path: str | Path) -> float:
    """How long a file is, as its header says. Raises AudioError."""
    import soundfile  # type: ignore[import-untyped]

    try:
        return float(soundfile.info(str(path)).duration)
    except (OSError, RuntimeError) as error:
        raise AudioError(_reason(path, error)) from error


def write(target: Path | IO[bytes], samples: "np.ndarray", rate: int = RATE) -> None:
    """Samples in [-1, 1], or int16 as they are, as a FLAC file of 16 bits."""
    import soundfile

    soundfile.write(target, samples, rate, format="FLAC", subtype="PCM_16")


def resampled(samples: "np.ndarray", rate: int, new_rate: int) -> "np.ndarray":
    """(N,) at `rate` -> (ceil(N * new_rate / rate),) at `new_rate`, both float32: band-limited interpolation by a
    windowed sinc. By one thread: with more, the last bits would differ between a trainer and its loader workers."""
    import numpy as np

    if rate == new_rate or not len(samples):
        return np.ascontiguousarray(samples, np.float32)
    import torch

    from data.threads import one_thread

    with one_thread(), torch.no_grad():
        found: np.ndarray = _resampler(rate, new_rate)(torch.from_numpy(np.array(samples, np.float32))).numpy()
        return found


@lru_cache(maxsize=8)
def _resampler(rate: int, new_rate: int) -> Any:
    wheels.torchaudio()
    from torchaudio.transforms import Resample  # type: ignore[import-untyped]

    return Resample(rate, new_rate)


def _decoded(path: str | Path) -> tuple["np.ndarray", int]:
    """(N, channels) float32, and their rate."""
    import soundfile

    try:
        if missing := _cut_off(Path(path)):
            raise AudioError(f"is cut short: its last {missing:,} bytes are missing")
        with soundfile.SoundFile(str(path)) as file:
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except (OSError, RuntimeError) as error:
        raise AudioError(_reason(path, error)) from error


def _cut_off(path: Path) -> int:
    """Bytes of a WAV file that are not there, as its header says; libsndfile reads what there is, and says nothing."""
    with open(path, "rb") as file:
        head = file.read(8)
    claimed = int.from_bytes(head[4:], "little")
    if head[:4] != b"RIFF" or claimed >= 2**31:  # written to a pipe: the length was not known
        return 0
    return max(0, claimed + 8 - path.stat().st_size)


def _reason(path: str | Path, error: Exception) -> str:
    if not Path(path).exists():
        return "there is no such file"
    if Path(path).is_dir():
        return "is a folder"
    if not Path(path).stat().st_size:
        return "is empty"
    said = str(getattr(error, "error_string", "") or error).removeprefix("Error : ").strip().rstrip(".")
    return f"cannot be read as sound ({said})"
