"""Pictures made up for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 230), "yellow": (230, 220, 40)}


def pixels(seed: int = 0, height: int = 24, width: int = 32) -> np.ndarray:
    """(height, width, 3) uint8, smooth, no two alike."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    a, b, c = np.random.default_rng(seed).uniform(1, 6, (3, 3))
    found: np.ndarray = (127.5 * (1 + np.sin(a * x[..., None] + b * y[..., None] + c))).astype(np.uint8)
    return found


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def make_picture(path: Path, seed: int = 0, *, height: int = 24, width: int = 32) -> Path:
    """The kind of file goes by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width)).save(path)
    return path


def write(folder: Path, count: int = 40, *, side: int = 16) -> Path:
    """A CSV `image,label` of so many squares of four colours on grey, beside its files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,label"]
    for row in range(count):
        name, draw = list(COLOURS)[row % len(COLOURS)], np.random.default_rng(row)
        canvas = np.full((side, side, 3), draw.integers(90, 160), np.uint8)
        top, left = draw.integers(0, side // 2, 2)
        canvas[top:top + side // 2, left:left + side // 2] = COLOURS[name]
        Image.fromarray(canvas).save(folder / f"{row}.png")
        lines.append(f"{row}.png,{name}")
    (folder / "pictures.csv").write_text("\n".join(lines) + "\n")
    return folder / "pictures.csv"
