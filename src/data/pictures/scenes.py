"""The embedded scenes: one to three drawn shapes, and captions that are true of them.

A caption says all that tells one scene from another: how many shapes of what size, colour and form, and where; where
exactly, how they are turned, and what is behind them, it leaves out. So no two captions fit the same picture: the left
and the upper of two groups is said first, and two groups are never alike. Some colours of some forms are never in
training: the validation and the test set show nothing but scenes with them.

The same seed gives the same bytes, with the same Pillow.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import files
from stoker.config import UserError
from stoker.data import made
from stoker.data.sources import archives
from stoker.progress import tracked

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

BUILDER = 2  # raise it when other pictures, or other captions, come out
SIZES = {"train": 20_000, "validation": 500, "test": 500}  # pictures
CAPTIONS = {"validation": 100, "test": 100}
ALIKE = 0.4  # of them, that differ from one before in a single thing
SIDE, FINER = 64, 4  # pixels; each drawn as so many, and as many high

COUNTS = {1: "a", 2: "two", 3: "three"}
RADII = {"small": (0.065, 0.085), "large": (0.12, 0.14)}  # of the side
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (240, 215, 30), "green": (40, 165, 60),
           "blue": (45, 85, 230), "purple": (150, 50, 180)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
VALUES: dict[str, Sequence[Any]] = {"count": tuple(COUNTS), "size": tuple(RADII), "colour": tuple(COLOURS),
                                    "shape": SHAPES}
HELD_OUT = {("red", "star"), ("red", "circle"), ("green", "square"), ("blue", "square"), ("yellow", "triangle"),
            ("purple", "cross")}
PLACES = {"at the top left": (0.27, 0.27), "at the top right": (0.73, 0.27), "in the middle": (0.5, 0.5),
          "at the bottom left": (0.27, 0.73), "at the bottom right": (0.73, 0.73)}
ROWS = ("side by side", "one above another")
RELATIONS = ("left of", "above")
BACKGROUNDS = (0, 40), (215, 255)  # dark, light
SHADES, TURNS = 18, 12  # a colour's values vary by so much, a shape is turned by so many degrees
ARCHIVE = "scenes.tar"


@dataclass(frozen=True)
class Group:
    """Shapes that are alike."""

    count: int
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        plural = "" if self.count == 1 else "es" if self.shape.endswith("s") else "s"
        return f"{COUNTS[self.count]} {self.size} {self.colour} {self.shape}{plural}"


@dataclass(frozen=True)
class Scene:
    """One group and its place, or two groups and how the first lies to the second."""

    groups: tuple[Group, ...]
    place: str

    def __str__(self) -> str:
        first, *other = map(str, self.groups)
        return " ".join([first, self.place, *other])

    @property
    def held_out(self) -> bool:
        return any((group.colour, group.shape) in HELD_OUT for group in self.groups)

    def near(self) -> "list[Scene]":
        """The scenes that differ from this one in a single thing."""
        places = next(places for places in (tuple(PLACES), ROWS, RELATIONS) if self.place in places)
        found = [replace(self, place=place) for place in places]
        for number, group in enumerate(self.groups):
            others = [replace(group, **{field.name: value}) for field in fields(group) for value in VALUES[field.name]]
            found += [replace(self, groups=(*self.groups[:number], other, *self.groups[number + 1:]))
                      for other in others]
        return [scene for scene in dict.fromkeys(found) if scene != self and scene in _all()]


@cache
def every_scene() -> tuple[Scene, ...]:
    """All that can be said, in a fixed order."""
    kinds = list(itertools.product(RADII, COLOURS, SHAPES))
    alone = [Scene((Group(1, *kind),), place) for kind in kinds for place in PLACES]
    rows = [Scene((Group(count, *kind),), row) for count in (2, 3) for kind in kinds for row in ROWS]
    pairs = [Scene((Group(first, *one), Group(second, *other)), relation) for relation in RELATIONS
             for first, second in ((1, 1), (1, 2), (2, 1)) for one, other in itertools.permutations(kinds, 2)]
    return (*alone, *rows, *pairs)


@cache
def _all() -> frozenset[Scene]:
    return frozenset(every_scene())


def build(*, sizes: Mapping[str, int] | None = None, seed: int = 0) -> Path:
    """The manifest (CSV) of the pictures, which are drawn when they are not there yet. Raises UserError where a package
    is missing, or there is no room."""
    if importlib.util.find_spec("PIL") is None:
        raise UserError("--dataset scenes is drawn with Pillow, which is not installed; install it: pip install pillow")
    sizes = sizes or SIZES
    key = [BUILDER, importlib.metadata.version("pillow"), sizes, seed]
    where = files.home() / "made" / f"scenes-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"

    def make(folder: Path) -> None:
        drawn = script(sizes, seed)
        numbered = tracked(((1, each) for each in enumerate(drawn)), "Drawing scenes", len(drawn), "pictures")
        pictures = ((f"{number:05d}.png", picture(scene, f"{seed} {number}")) for number, (_, scene) in numbered)
        files.write(folder / ARCHIVE, lambda file: archives.write(file, pictures))
        rows = [f"{ARCHIVE}!{number:05d}.png,{scene},{split}" for number, (split, scene) in enumerate(drawn)]
        files.write(folder / "manifest.csv", "\n".join(["image,text,split", *rows]) + "\n")

    return made.folder(where, make, what=f"{sum(sizes.values()):,} scenes", room="50 MB") / "manifest.csv"


def script(sizes: Mapping[str, int], seed: int = 0) -> list[tuple[str, Scene]]:
    """(split, scene) of each picture. In validation and test there are several pictures for each caption."""
    draw = random.Random(f"scenes {seed}")
    kinds = _by_kind(False)
    found = [("train", draw.choice(draw.choice(kinds))) for _ in range(sizes["train"])]
    before: list[Scene] = []
    for split, count in CAPTIONS.items():
        chosen = _held_out(min(count, sizes[split]), draw, before)
        before += chosen
        found += [(split, scene) for scene, _ in zip(itertools.cycle(chosen), range(sizes[split]))]
    return found


def _by_kind(held_out: bool) -> list[list[Scene]]:
    """Scenes of one shape, of one group, of two; the last twice, as there is most to tell."""
    scenes = [scene for scene in every_scene() if scene.held_out == held_out]
    pairs = [scene for scene in scenes if len(scene.groups) == 2]
    return [[scene for scene in scenes if scene.place in PLACES], [scene for scene in scenes if scene.place in ROWS],
            pairs, pairs]


def _held_out(count: int, draw: random.Random, before: list[Scene]) -> list[Scene]:
    """Scenes that differ from each other and from those `before`; a part of them differs from an earlier one in one
    thing only."""
    kinds, chosen = _by_kind(True), dict.fromkeys(before)
    while len(chosen) < len(before) + round((1 - ALIKE) * count):
        chosen[draw.choice(draw.choice(kinds))] = None
    alone = list(chosen)[len(before):]
    while len(chosen) < len(before) + count:
        near = [scene for scene in draw.choice(alone).near() if scene.held_out and scene not in chosen]
        if near:
            chosen[draw.choice(near)] = None
    return list(chosen)[len(before):]


# -- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Where one is drawn, in units of the side."""

    kind: str
    colour: tuple[int, ...]
    x: float
    y: float
    radius: float
    turned: float  # degrees


def picture(scene: Scene, seed: str) -> bytes:
    """A PNG of a scene; what the caption leaves out follows from the seed."""
    from PIL import Image, ImageDraw

    draw = random.Random(f"{scene} {seed}")
    grey = draw.uniform(*draw.choice(BACKGROUNDS))
    background = tuple(round(min(max(grey + draw.uniform(-8, 8), 0), 255)) for _ in range(3))
    canvas = Image.new("RGB", (SIDE * FINER, SIDE * FINER), background)
    for shape in shapes(scene, draw):
        _draw(ImageDraw.Draw(canvas), shape)
    file = io.BytesIO()
    canvas.reduce(FINER).save(file, "PNG")
    return file.getvalue()


def shapes(scene: Scene, draw: random.Random) -> Iterator[Shape]:
    """The shapes of a scene, none of them beyond the edge, none over another."""
    across = scene.place in ("one above another", "above")
    for number, group in enumerate(scene.groups):
        radius = draw.uniform(*RADII[group.size])
        if scene.place in PLACES:
            x, y = PLACES[scene.place]
            centres = [(x + draw.uniform(-0.05, 0.05), y + draw.uniform(-0.05, 0.05))]
        elif len(scene.groups) == 1:
            centres = _row(group.count, radius, draw, draw.uniform(0.3, 0.7))
        else:
            half = (0.25, 0.75)[number] + draw.uniform(-0.04, 0.04)
            centres = [(half, along) for along, _ in _row(group.count, radius, draw, 0)]
        for x, y in centres:
            colour = tuple(min(max(value + draw.randint(-SHADES, SHADES), 0), 255) for value in COLOURS[group.colour])
            yield Shape(group.shape, colour, *((y, x) if across else (x, y)), radius * draw.uniform(0.95, 1),
                        draw.uniform(-TURNS, TURNS))


def _row(count: int, radius: float, draw: random.Random, height: float) -> list[tuple[float, float]]:
    """Centres of shapes beside each other."""
    gap = draw.uniform(0.03, 0.06)
    length = count * 2 * radius + (count - 1) * gap
    start = draw.uniform(0.02, 0.98 - length) + radius
    return [(start + number * (2 * radius + gap), height) for number in range(count)]


def _draw(canvas: "ImageDraw", shape: Shape) -> None:
    scale = SIDE * FINER
    x, y, radius = shape.x * scale, shape.y * scale, shape.radius * scale
    if shape.kind == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.colour)
        return
    turned = math.radians(shape.turned)
    canvas.polygon([(x + radius * (u * math.cos(turned) - v * math.sin(turned)),
                     y + radius * (u * math.sin(turned) + v * math.cos(turned))) for u, v in OUTLINES[shape.kind]],
                   fill=shape.colour)


def _corners(*rings: float, count: int, first: float) -> list[tuple[float, float]]:
    """Corners around a centre, their distances taken in turn from `rings`; `first` in degrees, clockwise from above."""
    angles = [math.radians(first + 360 * number / count) for number in range(count)]
    return [(ring * math.sin(angle), -ring * math.cos(angle)) for angle, ring in zip(angles, itertools.cycle(rings))]


ARM, TIP = 0.33, 0.94  # of a cross: half the width of its arms, and their length
OUTLINES = {
    "square": _corners(1, count=4, first=45),
    "triangle": _corners(1, count=3, first=0),
    "star": _corners(1, 0.4, count=10, first=0),
    "cross": [(-ARM, -TIP), (ARM, -TIP), (ARM, -ARM), (TIP, -ARM), (TIP, ARM), (ARM, ARM), (ARM, TIP), (-ARM, TIP),
              (-ARM, ARM), (-TIP, ARM), (-TIP, -ARM), (-ARM, -ARM)],
}
