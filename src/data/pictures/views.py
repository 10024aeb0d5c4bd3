"""Pictures as a torch data set: pixels in the frame, text and label, changed a little from epoch to epoch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stoker import wheels
from stoker.config import UserError
from stoker.data.pictures import images
from stoker.data.pictures.resized import Frame, Resized, digest, opened
from stoker.data.pictures.table import Picture
from stoker.data.threads import one_thread

WIDEST = 4 / 3  # to one, what is cut out has at most; RandomResizedCrop's


class View(NamedTuple):
    """A row. `epoch` and `row` say which, for what a model changes in it further on."""

    pixels: Tensor  # (channels, H, W) uint8
    text: str
    label: str
    row: int
    epoch: int


class Visit(NamedTuple):
    """A row in an epoch; `chance`, from 0 to 1, is random, and the same in all epochs."""

    epoch: int
    chance: float

    def due(self, share: float) -> bool:
        """Whether the row has its turn in this epoch: in such a share of the epochs, as evenly spread as can be, so at
        a half in every second one."""
        return (self.chance + self.epoch * share) % 1 < share


class Changes(Protocol):
    """How a row is changed: a function of its pixels, of what is drawn, and of its visit. Made without arguments, it
    changes nothing."""

    def __call__(self, pixels: Tensor, frame: Frame, draw: np.random.Generator, visit: Visit) -> Tensor:
        """(channels, H, W) uint8, as `stored` has it -> the same, in the frame."""

    def stored(self, frame: Frame) -> Frame:
        """The frame in which pictures are kept that are to be changed so."""


@dataclass(frozen=True)
class Augmentation:
    """What is changed, within which bounds; 0: not."""

    crop: float = 0.0  # share of the area that is cut away, at most
    flip: float = 0.0  # share of the epochs in which a row is mirrored, left to right
    shift: float = 0.0  # up or down and sideways, by up to this share of the sides; what comes in is mirrored
    colour: float = 0.0  # brightness, contrast and saturation: by up to this share, more or less

    def __call__(self, pixels: Tensor, frame: Frame, draw: np.random.Generator, visit: Visit) -> Tensor:
        """(3, H, W) uint8, in the larger frame -> (3, height, width) uint8. Draws the same numbers whatever is switched
        off."""
        area, ratio, top, left, _, brightness, contrast, saturation, down, right = draw.uniform(0, 1, 10)
        wheels.torchvision()
        from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

        with one_thread():  # the contrast turns about a mean
            if self.crop:
                height, width = pixels.shape[1:]
                box = _box(1 - self.crop * area, WIDEST ** (2 * ratio - 1), top, left, height, width)
                size = [frame.height, frame.width or max(1, round(width * frame.height / height))]
                pixels = functional.resized_crop(pixels, *box, size, antialias=True)
            if self.shift:
                pixels = _moved(pixels, self.shift * (2 * down - 1), self.shift * (2 * right - 1))
            if visit.due(self.flip):
                pixels = pixels.flip(-1)
            if self.colour:
                changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
                for change, amount in zip(changes, (brightness, contrast, saturation)):
                    pixels = change(pixels, 1 + self.colour * (2 * amount - 1))
        return pixels.contiguous()

    def stored(self, frame: Frame) -> Frame:
        return frame.larger(self.crop)


def _box(area: float, ratio: float, top: float, left: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part with this share of the area; as much wider or higher as fits."""
    ratio = min(max(ratio, area), 1 / area)
    part_height = max(1, round(height * math.sqrt(area / ratio)))
    part_width = max(1, round(width * math.sqrt(area * ratio)))
    return round(top * (height - part_height)), round(left * (width - part_width)), part_height, part_width


def _moved(pixels: Tensor, down: float, right: float) -> Tensor:
    """Moved by these shares of the sides, in whole pixels; beyond an edge the picture goes on as in a mirror."""
    def places(size: int, share: float) -> Tensor:
        beyond = (torch.arange(size) - round(share * size)).abs()
        return size - 1 - (size - 1 - beyond).abs()

    return pixels[:, places(pixels.shape[1], down)[:, None], places(pixels.shape[2], right)]


class Views(Dataset[View]):
    """Item i is row i % len in epoch i // len, so that each epoch may see it otherwise: what is changed is a function
    of (seed, epoch, row). Asked for rows alone, it gives those of epoch 0.

    `resized` holds the pictures in the frame that `stored` gives; without it, files are read whenever a row is asked
    for, and come out the same.
    """

    def __init__(self, pictures: Sequence[Picture], frame: Frame, *, resized: Resized | None = None,
                 augmentation: Changes = Augmentation(), seed: int = 0):
        self.pictures, self.frame, self.resized = list(pictures), frame, resized
        self.augmentation, self.seed = augmentation, seed
        self.changed = augmentation != augmentation.__class__()
        self.chances = np.random.default_rng(seed).uniform(0, 1, len(self.pictures))

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[View]:
        """The rows of epoch 0; without it a loop would never end."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: int) -> View:
        if index < 0:
            raise IndexError(f"row {index}")
        epoch, row = divmod(index, len(self.pictures))
        pixels = self.pixels(row)
        if self.changed:
            draw = np.random.default_rng((self.seed, epoch, row))
            pixels = self.augmentation(pixels, self.frame, draw, Visit(epoch, float(self.chances[row])))
        return View(pixels, self.pictures[row].text, self.pictures[row].label, row, epoch)

    def pixels(self, row: int) -> Tensor:
        """(channels, H, W) uint8, in the frame they are stored in. Raises UserError where the file has changed since
        the data were checked."""
        path = self.pictures[row].path
        if self.resized and (kept := self.resized.pixels(path)) is not None:
            return kept
        try:
            pixels = opened(path)
        except images.ImageError as error:
            raise UserError(f"{path} {error}; it was all right when the data were checked") from error
        if self.resized and digest(pixels) != self.resized.facts[path].digest:
            raise UserError(f"{path} has changed since the data were checked: put the old file back, or start a new "
                            "run")
        return self.augmentation.stored(self.frame)(pixels)
