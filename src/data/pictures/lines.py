"""The embedded lines: printed text in many typefaces, as scanners and cameras see it, and what stands there.

Validation and test have a family of typefaces each that training never shows, and texts that it never shows: none of
them whole, and what is from the documentation, from other documents.

The same seed gives the same bytes, with the same versions of the packages that draw and of what is documented.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files
from stoker.config import UserError
from stoker.data import made
from stoker.data.pictures import fonts, writing
from stoker.data.sources import archives
from stoker.data.text import pydocs
from stoker.progress import tracked

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as Picture

BUILDER = 2  # raise it when other pictures, or other texts, come out
SIZES = {"train": 30_000, "validation": 1000, "test": 1000}
HELD_OUT = {"validation": "Ubuntu", "test": "Fira"}  # families
TOLD_APART = 0.05  # share of the documents that each of these has to itself
EMS = (22, 28, 36)  # pixels
ARCHIVE = "lines.tar"
AT_ONCE = 64


@dataclass(frozen=True)
class Line:
    split: str
    text: str
    face: str


def build(*, sizes: Mapping[str, int] | None = None, seed: int = 0, workers: int | None = None) -> Path:
    """The manifest (CSV) of the lines, which are drawn when they are not there yet. Raises UserError where a package
    is missing, or there is no room."""
    if problems := fonts.missing():
        raise UserError(*problems)
    sizes = sizes or SIZES
    key = [BUILDER, fonts.versions(), hashlib.sha256(pydocs.build().encode()).hexdigest(), sizes, seed]
    where = files.home() / "made" / f"lines-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"

    def make(folder: Path) -> None:
        drawn = script(sizes, seed)
        names = [f"{number:05d}.jpg" for number in range(len(drawn))]
        files.write(folder / ARCHIVE, lambda file: archives.write(file, zip(names, _drawn(drawn, seed, workers))))
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["image", "text", "split"])
        rows.writerows([f"{ARCHIVE}!{name}", line.text, line.split] for name, line in zip(names, drawn))
        files.write(folder / "manifest.csv", table.getvalue())

    return made.folder(where, make, what=f"{sum(sizes.values()):,} lines", room="200 MB") / "manifest.csv"


def script(sizes: Mapping[str, int], seed: int = 0) -> list[Line]:
    """What is drawn in which face. No text comes twice, in whatever case; validation and test get theirs first."""
    documents = pydocs.build().split(pydocs.SEPARATOR)
    random.Random(f"lines {seed}").shuffle(documents)
    held_back = round(TOLD_APART * len(documents))
    seen, found = set[str](), list[Line]()
    for number, split in enumerate(("test", "validation", "train")):
        rest = documents[number * held_back:][:held_back if split in HELD_OUT else None]
        texts = (text for text in writing.texts(writing.Words(rest), f"{split} {seed}")
                 if text.casefold() not in seen and not seen.add(text.casefold()))  # type: ignore[func-returns-value]
        draw = random.Random(f"faces {split} {seed}")
        found += [Line(split, text, _face(split, text, draw)) for text in itertools.islice(texts, sizes[split])]
    return found[::-1]  # to train on first


def families(split: str) -> list[str]:
    """That a split is drawn in."""
    if split in HELD_OUT:
        return [HELD_OUT[split]]
    return [family for family in fonts.FAMILIES if family not in HELD_OUT.values()]


def _face(split: str, text: str, draw: random.Random) -> str:
    """One that has all the signs; families with more faces are not drawn so much more often."""
    while True:
        of = fonts.FAMILIES[draw.choices(families(split), [len(fonts.FAMILIES[name]) ** 0.5
                                                           for name in families(split)])[0]]
        if fonts.has(face := draw.choice(of), text):
            return face


def _drawn(lines: list[Line], seed: int, workers: int | None) -> Iterator[bytes]:
    """The picture of each line, made in processes of their own."""
    from stoker.data.loader import evaluation_batches

    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)))
    parts = evaluation_batches(_Pictures(lines, seed), list, AT_ONCE, workers)  # type: ignore[arg-type]
    return itertools.chain.from_iterable(tracked(((len(part), part) for part in parts), "Drawing lines", len(lines),
                                                 "lines"))


class _Pictures:
    """Item i is the picture of line i."""

    def __init__(self, lines: list[Line], seed: int):
        self.lines, self.seed = lines, seed

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> bytes:
        line = self.lines[index]
        return picture(line.text, line.face, f"{self.seed} {line.split} {line.text}")


# -- drawing --------------------------------------------------------------------------------------------------------


def picture(text: str, face: str, seed: str) -> bytes:
    """A JPEG of a line, grey, as high as it comes; how it looks follows from the seed."""
    from PIL import Image

    draw = random.Random(seed)
    ink = _faded(_worn(_written(text, face, draw), draw), draw)
    seen = _on_paper(ink, draw)
    if draw.random() < 0.5:
        seen = _blurred(seen, draw)
    file = io.BytesIO()
    Image.fromarray(_noisy(seen, draw)).save(file, "JPEG", quality=round(95 * draw.uniform(0.5, 1) ** 2))
    return file.getvalue()


def _written(text: str, face: str, draw: random.Random) -> "Picture":
    """Ink (255) on nothing (0): the line, slanted and stretched a little, in a frame that fits more or less."""
    from PIL import Image

    size = draw.choice(EMS)
    lines = [_set(text, face, size, draw)]
    if draw.random() < 0.12:  # others above and below, of which the frame shows a part
        lines += [_set(text[::-1] if fonts.has(face, text) else text, face, size, draw)] * 2
    pad = size
    width, height = lines[0].width + 2 * pad, lines[0].height + 2 * pad
    stretch, zoom = draw.uniform(0.65, 1.15) if draw.random() < 0.5 else 1.0, draw.uniform(0.85, 1.25)
    slant = draw.gauss(0, 0.06) if draw.random() < 0.5 else 0.0
    drift = draw.uniform(-1, 1) * 0.12 * size / lines[0].width if draw.random() < 0.5 else 0.0
    across, down = 1 / (zoom * stretch), 1 / zoom
    wide, high = round(width / across), round(height / down)
    turned = (across, slant * across, -slant * across * high / 2, drift, down, -drift * wide / 2)

    def transformed(each: "Picture", shift: int) -> "Picture":
        canvas = Image.new("L", (width, height))
        canvas.paste(each, (pad, pad + shift))
        return canvas.transform((wide, high), Image.Transform.AFFINE, turned, Image.Resampling.BILINEAR)

    line = transformed(lines[0], 0)
    box = _frame(line, pad / down, (pad + lines[0].height) / down, draw)
    for each, shift in zip(lines[1:], (-1, 1)):
        leading = round(shift * size * draw.uniform(1.0, 1.3))
        line = _over(line, transformed(each, leading))
    return line.crop(box)


def _set(text: str, face: str, size: int, draw: random.Random) -> "Picture":
    """A line as high as the face; one in five with more, or less, room between the characters."""
    from PIL import Image, ImageDraw

    font = fonts.opened(face, size)
    if face == fonts.BITMAP:
        times = max(1, round(size / 11))
        mask = Image.new("L", (int(font.getlength(text)) or 1, 11))
        ImageDraw.Draw(mask).text((0, 0), text, 255, font)
        return mask.resize((mask.width * times, mask.height * times), Image.Resampling.NEAREST)
    tracking = size * draw.choice((0.08, 0.15, 0.25, -0.03)) if draw.random() < 0.2 else 0.0
    high = round(1.35 * size)
    if not tracking:
        mask = Image.new("L", (max(1, round(font.getlength(text)) + size // 4), high))
        ImageDraw.Draw(mask).text((0, size), text, 255, font, anchor="ls")
        return mask
    places = list(itertools.accumulate((font.getlength(letter) + tracking for letter in text), initial=0.0))
    mask = Image.new("L", (max(1, round(places[-1]) + size // 4), high))
    for place, letter in zip(places, text):
        ImageDraw.Draw(mask).text((place, size), letter, 255, font, anchor="ls")
    return mask


def _frame(line: "Picture", top: float, bottom: float, draw: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is cut out around the ink: often as close as it can be, seldom into it."""
    left, first, right, last = line.getbbox() or (0, 0, *line.size)
    size = bottom - top
    if draw.random() < 0.4:
        first, last = min(first, round(top)), max(last, round(bottom))
    margins = [size * draw.uniform(0, 0.35) ** 1.5 for _ in range(4)]
    if draw.random() < 0.08:
        margins[draw.choice((1, 3))] = -0.06 * size * draw.random()
    return (max(0, round(left - margins[0])), max(0, round(first - margins[1])),
            min(line.width, round(right + margins[2])), min(line.height, round(last + margins[3])))


def _over(one: "Picture", other: "Picture") -> "Picture":
    from PIL import ImageChops

    return ImageChops.lighter(one, other)


def _worn(ink: "Picture", draw: random.Random) -> "Picture":
    """Bolder, thinner, or in few dots, as printers have it."""
    from PIL import Image, ImageFilter

    kind = draw.random()
    if kind < 0.3:
        filters = ImageFilter.MaxFilter(3) if kind < 0.18 else ImageFilter.MinFilter(3)
        return Image.blend(ink, ink.filter(filters), draw.uniform(0.2, 0.8 if kind < 0.18 else 0.5))
    if kind < 0.45 and ink.height > 28:
        rows = draw.randint(19, 26)
        few = ink.resize((max(1, round(ink.width * rows / ink.height)), rows), Image.Resampling.BOX)
        return few.point([0 if value < 64 else 255 for value in range(256)]).resize(
            ink.size, draw.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR)))
    return ink


def _faded(ink: "Picture", draw: random.Random) -> "Picture":
    """Here and there with less ink; or with a rule above or below."""
    from PIL import Image, ImageChops, ImageDraw

    if draw.random() < 0.2:
        across, down = max(2, ink.width // 24), draw.choice((1, 2, 6))
        most = draw.choice((0.3, 0.6, 0.9))
        patches = Image.frombytes("L", (across, down), bytes(round(255 * (1 - most * draw.random() ** 2))
                                                             for _ in range(across * down)))
        ink = ImageChops.multiply(ink, patches.resize(ink.size, Image.Resampling.BILINEAR))
    if draw.random() < 0.05:
        height = draw.choice((0, ink.height - 1))
        ImageDraw.Draw(ink).line((0, height, ink.width, height), 255, draw.randint(1, 3))
    return ink


def _on_paper(ink: "Picture", draw: random.Random) -> "np.ndarray":
    """(H, W) float32 from 0 to 255: dark on light, now and then light on dark; the paper not equally bright."""
    import numpy as np

    paper, contrast = draw.uniform(150, 255), draw.uniform(0.35, 1)
    if draw.random() < 0.5:
        paper = 255.0
    strength = np.asarray(ink, np.float32) / 255
    down, across = (np.linspace(0, 1, size, dtype=np.float32) for size in strength.shape)
    slopes = [draw.uniform(-40, 0) if draw.random() < 0.3 else 0.0 for _ in range(2)]
    ground = paper + slopes[0] * down[:, None] + slopes[1] * across
    seen: np.ndarray = ground * (1 - contrast * strength)
    if draw.random() < 0.1:
        seen = 255 - seen
    return seen


def _blurred(seen: "np.ndarray", draw: random.Random) -> "np.ndarray":
    """Out of focus, or from fewer pixels."""
    import numpy as np
    from PIL import Image, ImageFilter

    image = Image.fromarray(np.clip(seen, 0, 255).astype(np.uint8))
    if draw.random() < 0.5:
        return np.asarray(image.filter(ImageFilter.GaussianBlur(image.height * draw.uniform(0.01, 0.04))), np.float32)
    share = min(1.0, max(draw.uniform(0.4, 0.9), 18 / image.height))
    few = image.resize((max(1, round(image.width * share)), max(1, round(image.height * share))),
                       Image.Resampling.BILINEAR)
    return np.asarray(few.resize(image.size, Image.Resampling.BILINEAR), np.float32)


def _noisy(seen: "np.ndarray", draw: random.Random) -> "np.ndarray":
    """uint8; two in three with the grain of a sensor: sums of whole numbers, the same on every machine."""
    import numpy as np

    if draw.random() < 0.66:
        grains = np.frombuffer(draw.randbytes(2 * seen.size), np.uint8).reshape(2, *seen.shape)
        seen = seen + (grains.astype(np.float32).sum(0) - 255) * (draw.uniform(0, 0.4) ** 2)
    found: np.ndarray = np.clip(seen, 0, 255).astype(np.uint8)
    return found
