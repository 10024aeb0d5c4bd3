"""The embedded digits: all of scikit-learn's, as they are, and no hand that is judged by in training."""

import hashlib
import re

import numpy as np
import pytest

from stoker.config import UserError
from stoker.data.pictures import digits, images
from stoker.data.pictures import table as pictures


def test_all_of_them_as_they_are() -> None:
    counts, written = digits.load()
    table = hashlib.sha256(counts.tobytes() + written.tobytes()).hexdigest()
    # of images and target of scikit-learn 1.9.1's load_digits(), as unsigned bytes
    assert table == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    splits = pictures.read("digits")
    rows = sorted([*splits["train"], *splits["validation"]], key=lambda each: each.path)
    assert len(rows) == 1797 and [int(row.label) for row in rows] == written.tolist()
    for row, known in zip(rows[::50], counts[::50]):
        grey = np.asarray(images.decode(row.path))[..., 0]
        assert (np.rint((255 - grey.astype(int)) / 255 * 16) == known).all()
    words = "zero one two three four five six seven eight nine".split()
    assert all(row.text == f"a handwritten {words[int(row.label)]}" for row in rows)


def test_whole_sheets_are_held_out() -> None:
    """A sheet begins where the row of digits begins anew that everybody wrote: 5 5 6 5 0 9 8 9 is in it once."""
    splits = pictures.read("digits")
    sheets = {split: {row.group for row in rows} for split, rows in splits.items()}
    assert (len(sheets["train"]), len(sheets["validation"])) == (11, 3) and not sheets["train"] & sheets["validation"]
    assert len(splits["validation"]) == 1797 - 1415
    rows = sorted([*splits["train"], *splits["validation"]], key=lambda each: each.path)
    written = "".join(row.label for row in rows)
    starts = [match.start() for match in re.finditer("55650989", written)]
    assert len(starts) == len(digits.SHEETS) == 14
    assert all(0 <= start - first <= 32 for start, first in zip(starts, digits.SHEETS))
    assert len({rows[start].group for start in starts}) == 14
    assert all(written[first:first + 10] in ("0123456789", "8123456789") for first in digits.SHEETS)


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="made with Pillow, which is not installed; install it: pip install pillow"):
        digits.build()
