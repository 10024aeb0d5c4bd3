"""The embedded digits: 1,797 real ones, written by hand, 8 x 8 pixels, in a table of scikit-learn's.

The table, digits.csv.gz, stands beside this file with its licence. It is the test part of "Optical Recognition of
Handwritten Digits" (Alpaydin and Kaynak 1998, UCI), in the order of 14 sheets: on each the same person wrote the same
row of digits. Whole sheets are held back, so that no hand of the validation set is trained on.
"""

import gzip
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files
from stoker.config import UserError
from stoker.data import made
from stoker.data.sources import archives

if TYPE_CHECKING:
    import numpy as np

BUILDER = 1  # raise it when other pictures, or other texts, come out
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHEETS = (0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1545, 1667)  # their first rows
VALIDATION = 3  # of them, the last ones: 382 digits
LEVELS = 16  # of grey, as they are counted
ARCHIVE = "digits.tar"
TABLE = Path(__file__).with_name("digits.csv.gz")  # a row: 64 counts, 0 to LEVELS, then the digit


def build() -> Path:
    """The manifest (CSV) of the pictures, which are made when they are not there yet. Raises UserError where Pillow is
    missing, or there is no room."""
    if importlib.util.find_spec("PIL") is None:
        raise UserError("--dataset digits is made with Pillow, which is not installed; install it: pip install pillow")
    where = files.home() / "made" / f"digits-{BUILDER}"
    return made.folder(where, _make, what="the digits", room="5 MB") / "manifest.csv"


def load() -> "tuple[np.ndarray, np.ndarray]":
    """Counts of grey (1797, 8, 8), 0 on white paper to 16, and the digits (1797,)."""
    import numpy as np

    with gzip.open(TABLE, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


def _make(folder: Path) -> None:
    images, written = load()
    rows = ["image,text,label,group,split"]
    sheet = -1
    for number, digit in enumerate(written.tolist()):
        sheet += number in SHEETS
        split = "train" if sheet < len(SHEETS) - VALIDATION else "validation"
        rows.append(f"{ARCHIVE}!{number:04d}.png,a handwritten {WORDS[digit]},{digit},sheet {sheet},{split}")
    files.write(folder / ARCHIVE, lambda file: archives.write(file, _pictures(images)))
    files.write(folder / "manifest.csv", "\n".join(rows) + "\n")


def _pictures(images: "np.ndarray") -> Iterator[tuple[str, bytes]]:
    """(name, PNG), dark on light as they were written."""
    from PIL import Image

    for number, counts in enumerate(255 - images * (255 / LEVELS)):
        file = io.BytesIO()
        Image.fromarray(counts.round().astype("uint8")).save(file, "PNG")
        yield f"{number:04d}.png", file.getvalue()
