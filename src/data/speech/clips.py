"""Utterances as a torch data set: waveform and label text, changed from epoch to epoch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stoker.config import UserError
from stoker.data.speech import audio
from stoker.data.speech.augmentation import Augmentation, Sound
from stoker.data.speech.decoded import Decoded, as_float, as_int16, digest
from stoker.data.speech.recordings import Utterance


class Clip(NamedTuple):
    """A row. `epoch` and `row` say which, for the changes of its spectrogram; `pitch`, `unchanged`: see
    `augmentation.Sound`. `speaker`: its name in the data."""

    waveform: Tensor  # (N,) float32 in [-1, 1], 16 kHz
    text: str
    row: int
    epoch: int
    pitch: float = 1.0
    unchanged: bool = False
    speaker: str = ""


class Clips(Dataset[Clip]):
    """Item i is row i % len in epoch i // len, so that augmentation differs between epochs: it depends only on (seed,
    epoch, row). Indices below len are epoch 0.

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
        sound = Sound(self.samples(row))
        if self.augmentation != Augmentation():
            draw = np.random.default_rng((self.seed, epoch, row))
            sound = self.augmentation(sound.samples, draw, self._other)
        utterance = self.utterances[row]
        return Clip(torch.from_numpy(sound.samples), utterance.text, row, epoch, *sound[1:], utterance.speaker)

    def _other(self, place: float) -> np.ndarray:
        """The recording at a place in [0, 1) of the list."""
        return self.samples(int(place * len(self.utterances)))

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
