"""Picture files decoded once: what was found in each, and, if wanted, all of them, resized, in one mapped file."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stoker import files, wheels
from stoker.data import decode_cache
from stoker.data.pictures import images

FORMAT = 2  # raise it when other facts, or other pixels, come out
FITS = ("crop", "pad", "stretch")
WHITE = 255


@dataclass(frozen=True)
class Frame:
    """The size that a model is given pictures in, and how one of another shape is brought to it.

    `fit`: crop keeps the middle, pad keeps all and adds white, stretch gives up the shape. With a width of 0 a picture
    is as wide as it comes at that height. `grey`: of the three channels one is made, their luminance (ITU-R BT.601).
    """

    height: int
    width: int = 0
    fit: str = "crop"
    grey: bool = False

    @property
    def channels(self) -> int:
        return 1 if self.grey else 3

    def larger(self, share: float) -> "Frame":
        """So large that when this share of a picture's area is cut away, what is left has a pixel for each of ours."""
        times = 1 / math.sqrt(1 - share)
        return replace(self, height=math.ceil(self.height * times), width=math.ceil(self.width * times))

    def __call__(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (channels, height, width) uint8: bilinear, over as many pixels as become one."""
        wheels.torchvision()
        from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

        if self.grey:
            pixels = luminance(pixels)
        size = self._inner(*pixels.shape[1:])
        found: Tensor = functional.resize(pixels, list(size), antialias=True)
        if not self.width or size == (self.height, self.width):
            return found
        if self.fit == "crop":
            return functional.center_crop(found, [self.height, self.width])  # type: ignore[no-any-return]
        top, left = (self.height - size[0]) // 2, (self.width - size[1]) // 2
        return functional.pad(found, [left, top, self.width - size[1] - left,  # type: ignore[no-any-return]
                                      self.height - size[0] - top], fill=WHITE)

    def width_of(self, height: int, width: int) -> int:
        """Of a picture of this size, in the frame."""
        return self.width or self._inner(height, width)[1]

    def _inner(self, height: int, width: int) -> tuple[int, int]:
        """What a picture of this size is resized to, before it is cropped or padded."""
        if self.fit == "stretch" and self.width:
            return self.height, self.width
        ratios = (self.height / height, self.width / width) if self.width else (self.height / height,)
        times = min(ratios) if self.fit == "pad" else max(ratios)
        return max(1, round(height * times)), max(1, round(width * times))


@dataclass(frozen=True, slots=True)
class Fact:
    """What was found in a file; where `problem` says why it cannot be read, the rest is 0."""

    path: str
    problem: str = ""
    height: int = 0  # upright
    width: int = 0
    digest: str = ""  # SHA-256 of the pixels
    spread: int = 0  # between the darkest and the brightest value: 0 is a blank
    kept_height: int = 0
    kept_width: int = 0
    kept_channels: int = 3

    @property
    def count(self) -> int:
        return self.kept_channels * self.kept_height * self.kept_width


class Resized(decode_cache.Entries[Fact]):
    """Facts by path, and the pictures where they are kept."""

    kind, dtype = Fact, np.uint8

    def pixels(self, path: str) -> Tensor | None:
        """(channels, H, W) uint8, in the frame; None where they are not kept."""
        kept = self.numbers(path)
        if kept is None:
            return None
        fact = self.facts[path]
        return torch.from_numpy(kept.reshape(-1, fact.kept_height, fact.kept_width).copy())  # its own, to be changed


def resize(paths: Sequence[str], frame: Frame | None = None) -> Resized:
    """Decode files, or remember what came of it the last time.

    With a frame, the pictures are kept too, in it: 12 kB each at 64 x 64, 150 kB at 224 x 224. Raises UserError where
    there is no room.
    """
    paths = list(dict.fromkeys(paths))
    key = [FORMAT, asdict(frame) if frame else None, *map(images.identity, paths)]
    return decode_cache.read(Resized, paths, partial(_decode, frame=frame), files.home() / "pictures", key=key,
                             keep=frame is not None, what="Reading pictures", otherwise="--no_cache_images")


def luminance(pixels: Tensor) -> Tensor:
    """(3, H, W) uint8 -> (1, H, W) uint8, in whole numbers, as Pillow has it."""
    red, green, blue = pixels.to(torch.int32)
    found: Tensor = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)
    return found[None]


def opened(source: bytes | str) -> Tensor:
    """(3, H, W) uint8, as it is, from a file's bytes or from a path. Raises images.ImageError."""
    return torch.from_numpy(images.pixels(source))


def digest(pixels: Tensor) -> str:
    """SHA-256 of a decoded picture, as facts have it."""
    found = hashlib.sha256(str(tuple(pixels.shape)).encode())
    found.update(pixels.numpy().data)  # not copied: it may be large
    return found.hexdigest()


def _decode(path: str, frame: Frame | None) -> tuple[Fact, np.ndarray]:
    try:
        pixels = opened(path)
    except images.ImageError as error:
        return Fact(path, str(error)), np.zeros(0, np.uint8)
    found = Fact(path, "", pixels.shape[1], pixels.shape[2], digest(pixels), int(pixels.max() - pixels.min()))
    if not frame:
        return found, np.zeros(0, np.uint8)
    fitted = frame(pixels)
    channels, height, width = fitted.shape
    return replace(found, kept_channels=channels, kept_height=height, kept_width=width), fitted.numpy()
