"""Lines of text, changed as another printer, scanner or hand would have had them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from stoker.data.pictures.resized import Frame


@dataclass(frozen=True)
class LineAugmentation:
    """What is changed, within which bounds; 0: not. The height stays, the width follows."""

    stretch: float = 0.0  # wider or narrower, by up to this share
    slant: float = 0.0  # the head beside the foot, to the left or right, by up to this share of the height
    shift: float = 0.0  # up or down, and higher or lower, by up to this share of the height
    weight: float = 0.0  # bolder or thinner, by up to this share of a pixel on either side
    contrast: float = 0.0  # more or less of it, and brighter or darker, by up to this share
    blur: float = 0.0  # pixels, at most; half the rows stay as they are
    noise: float = 0.0  # grey levels, at most; half the rows stay as they are
    invert: float = 0.0  # share of the rows whose light and dark change places

    def __call__(self, pixels: Tensor, frame: Frame, draw: np.random.Generator, visit: object = None) -> Tensor:
        """(1, height, W) uint8 -> (1, height, W') uint8. Draws the same numbers whatever is switched off."""
        stretch, slant, shift, zoom, weight, contrast, bright = draw.uniform(-1, 1, 7)
        blur, noise, invert = draw.uniform(0, 1, 3)
        image = Image.fromarray(pixels[0].numpy())
        if self.stretch or self.slant or self.shift:
            image = moved(image, stretch=(1 + self.stretch) ** stretch, slant=self.slant * slant,
                          shift=self.shift * shift, zoom=1 + self.shift * zoom)
        if self.weight:
            filters = ImageFilter.MinFilter(3) if weight > 0 else ImageFilter.MaxFilter(3)
            image = Image.blend(image, image.filter(filters), self.weight * abs(weight))
        if self.blur and blur > 0.5:
            image = image.filter(ImageFilter.GaussianBlur(float(self.blur * (2 * blur - 1))))
        seen = np.asarray(image, np.float32)
        if self.contrast:
            middle = seen.mean(dtype=np.float64)
            seen = (seen - middle) * (1 + self.contrast * contrast) + middle * (1 + self.contrast * bright)
        if self.noise and noise > 0.5:
            seen = seen + draw.standard_normal(seen.shape, np.float32) * (self.noise * (2 * noise - 1))
        seen = 255 - seen if invert < self.invert else seen
        return torch.from_numpy(np.clip(np.rint(seen), 0, 255).astype(np.uint8))[None]

    def stored(self, frame: Frame) -> Frame:
        return frame


def moved(image: Image.Image, *, stretch: float, slant: float, shift: float, zoom: float) -> Image.Image:
    """As high as it was, `stretch` times as wide, and wider where it leans: nothing is lost at the ends. `slant` and
    `shift` in heights; `zoom` makes what stands there higher. What comes in at the edges is as the edges are."""
    width, height = image.size
    wide = max(1, round(width * stretch + abs(slant) * height))
    across, down = 1 / stretch, 1 / zoom
    lean = slant * height * across
    edge = 2 + math.ceil(abs(lean) + across + abs(shift) * height + abs(1 - down) * height / 2)
    edged = Image.fromarray(np.pad(np.asarray(image), edge, "edge"))
    left = edge + width / 2 - across * wide / 2 - lean / 2
    top = edge + height / 2 - down * height / 2 + shift * height
    return edged.transform((wide, height), Image.Transform.AFFINE, (across, slant * across, left, 0, down, top),
                           Image.Resampling.BILINEAR)
