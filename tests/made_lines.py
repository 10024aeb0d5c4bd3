"""A few printed lines, for tests that need some: in the built-in font of Pillow, with what stands there in a CSV."""

import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

WORDS = "tea Milk 2.50 TOTAL bread No.7 sugar 12/03 salt".split()


def drawn(text: str) -> Image.Image:
    """One line, or several."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text)
    image = Image.new("L", (int(box[2]) + 6, int(box[3]) + 6), 235)
    ImageDraw.Draw(image).multiline_text((3, 3), text, fill=20)
    return image


def write(folder: Path, *, lines: int = 36) -> Path:
    """lines.csv, and the pictures beside it; no text comes twice."""
    chosen, texts = random.Random(0), dict[str, None]()
    while len(texts) < lines:
        texts[" ".join(chosen.choices(WORDS, k=chosen.randint(1, 3)))] = None
    folder.mkdir(exist_ok=True)
    with open(folder / "lines.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text"])
        for number, text in enumerate(texts):
            drawn(text).save(folder / f"{number // 4}_{number}.png")
            rows.writerow([f"{number // 4}_{number}.png", text])
    return folder / "lines.csv"
