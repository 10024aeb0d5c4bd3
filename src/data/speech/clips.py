"""Utterances as a torch data set: waveform and label text, changed a little from epoch to epoch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stoker.config import UserError
from stoker.data.speech import audio
from stoker.data.speech.decoded import Decoded, as_float, as_int16, digest
from stoker.data.speech.recordings import Utterance

SPEED_STEPS = 20  # the factors of speed are fractions with this denominator: each has its own filter
KNOTS = np.geomspace(100, audio.RATE / 2, 7)  # Hz, between which the gain of a microphone and a room is drawn
FFT_SIZES = 4096  # the size of a Fourier transform is a multiple: without large prime factors it is fast
NARROW = 2800, 4000  # Hz, above which a telephone, or a recording at 8 kHz, has nothing


class Clip(NamedTuple):
    """A row. `epoch` and `row` say which, for what a model changes in it further on."""

    waveform: Tensor  # (N,) float32 in [-1, 1], 16 kHz
    text: str
    row: int
    epoch: int


@dataclass(frozen=True)
class Augmentation:
    """What is changed, within which bounds; 0: not."""

    speed: float = 0.0  # 0.1: between 0.9 and 1.1 times as fast, and as high
    gain: float = 0.0  # dB, up or down
    noise: float = 0.0  # dB: white noise so far below the speech at most; half the rows stay as they are
    colour: float = 0.0  # dB, up or down, by frequency
    narrow: float = 0.0  # share of the rows that lose what is above a frequency between 2.8 and 4 kHz

    def __call__(self, samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """(N,) -> (N',), float32. Draws the same numbers whatever is switched off."""
        speed, gain, noise, fainter = draw.uniform(-1, 1, 4)
        colour, (narrow, limit) = draw.uniform(-1, 1, len(KNOTS)), draw.uniform(0, 1, 2)
        if steps := round(speed * self.speed * SPEED_STEPS):
            samples = audio.resampled(samples, SPEED_STEPS + steps, SPEED_STEPS)
        if self.noise and noise > 0:
            below = self.noise + 10 * (fainter + 1)  # up to 20 dB fainter than the bound
            level = _loudness(samples) * 10 ** (-below / 20)
            samples = samples + level * draw.standard_normal(len(samples), np.float32)
        if self.colour or narrow < self.narrow:
            highest = NARROW[0] + (NARROW[1] - NARROW[0]) * limit if narrow < self.narrow else audio.RATE
            samples = coloured(samples, colour * self.colour, highest)
        if self.gain:
            samples = samples * 10 ** (gain * self.gain / 20)
        found: np.ndarray = np.clip(samples, -1, 1).astype(np.float32)
        return found


def coloured(samples: np.ndarray, gains: np.ndarray, highest: float) -> np.ndarray:
    """(N,) as another microphone hears it, as loud as before: `gains` in dB at the frequencies KNOTS, nothing above
    `highest` Hz (FilterAugment: Nam et al. 2022, arXiv:2110.03282, on the sound itself)."""
    size = len(samples) + -len(samples) % FFT_SIZES
    spectrum, octaves = np.fft.rfft(samples, size), _octaves(size)
    curve = np.exp(np.interp(octaves, np.log2(KNOTS), gains * math.log(10) / 20))
    curve[np.searchsorted(octaves, math.log2(highest), side="right"):] = 0
    found: np.ndarray = np.fft.irfft(spectrum * curve.astype(spectrum.real.dtype), size)[:len(samples)]
    after = _loudness(found)
    return found * (_loudness(samples) / after) if after else found


@lru_cache(maxsize=64)
def _octaves(size: int) -> np.ndarray:
    """log2 of the frequencies in Hz of a Fourier transform of so many samples; that of 0 as of 1."""
    return np.log2(np.maximum(np.fft.rfftfreq(size, 1 / audio.RATE), 1))  # type: ignore[no-any-return]


def _loudness(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples)))) if len(samples) else 0.0


class Clips(Dataset[Clip]):
    """Item i is row i % len in epoch i // len, so that each epoch may hear it otherwise: what is changed is a function
    of (seed, epoch, row). Asked for rows alone, it gives those of epoch 0.

    Without `decoded`, files are read whenever a row is asked for.
    """

    def __init__(self, utterances: Sequence[Utterance], *, decoded: Decoded | None = None,
                 augmentation: Augmentation = Augmentation(), seed: int = 0):
        self.utterances, self.decoded = list(utterances), decoded
        self.augmentation, self.seed = augmentation, seed

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Clip]:
        """The rows of epoch 0; without it a loop would never end."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: int) -> Clip:
        if index < 0:
            raise IndexError(f"row {index}")
        epoch, row = divmod(index, len(self.utterances))
        samples = self.samples(row)
        if self.augmentation != Augmentation():
            samples = self.augmentation(samples, np.random.default_rng((self.seed, epoch, row)))
        return Clip(torch.from_numpy(samples), self.utterances[row].text, row, epoch)

    def samples(self, row: int) -> np.ndarray:
        """(N,) float32, as recorded. Raises UserError where the file has changed since the data were checked."""
        utterance = self.utterances[row]
        if self.decoded and (kept := self.decoded.samples(utterance.path)) is not None:
            return kept
        try:
            samples = as_int16(audio.read(utterance.path))  # the same bits, kept or not
        except audio.AudioError as error:
            raise UserError(f"{utterance.path} {error}; it was all right when the data were checked") from error
        if self.decoded and digest(samples) != self.decoded.facts[utterance.path].digest:
            raise UserError(f"{utterance.path} has changed since the data were checked: put the old file back, or "
                            "start a new run")
        return as_float(samples)
