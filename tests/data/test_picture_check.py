"""The data check: each kind of bad picture is named with its file and reason, and only those are refused."""

import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made_pictures import encoded, make_picture, pixels
from stoker.config import UserError, printable
from stoker.data.pictures import table
from stoker.data.pictures.check import Limits, checked, examined, percentiles, problem
from stoker.data.pictures.resized import Fact, Frame
from stoker.data.pictures.table import Picture

FRAMES = {split: Frame(8, 8) for split in ("train", "validation", "test")}


def picture(path: Path, text: str = "a thing", label: str = "", group: str = "") -> Picture:
    return Picture(str(path), text, label, group)


def test_each_kind_of_bad_row_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fine = [picture(make_picture(tmp_path / f"fine{i}.png", i), label="good") for i in range(3)]
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut.png").write_bytes(encoded(Image.fromarray(pixels(8)))[:200])
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(tmp_path / "blank.png")
    (tmp_path / "again.webp").write_bytes(encoded(Image.fromarray(pixels(2)), "WEBP", lossless=True))
    bad = {
        picture(tmp_path / "text.png"):
            "unreadable: cannot be read as a picture (it is none of PNG, JPEG, WEBP, BMP, GIF, TIFF)",
        picture(tmp_path / "none.png"): "unreadable: there is no such file",
        picture(tmp_path / "empty.jpg"): "unreadable: is empty",
        picture(tmp_path / "cut.png"): "unreadable: cannot be read as a picture (image file is truncated)",
        picture(tmp_path / "a.tar!b.png"): "unreadable: there is no such file",
        picture(tmp_path / "blank.png"): "blank: all its 9 x 9 pixels are the same",
        picture(make_picture(tmp_path / "said.png", 5), ""): "unlabelled: no text and no label",
        picture(make_picture(tmp_path / "tiny.png", 6, height=7, width=90)):
            "too small: 90 x 7 pixels, the shorter side must have 8",
        picture(make_picture(tmp_path / "huge.png", 6, height=101, width=50)):
            "too large: 50 x 101 pixels, the longer side may have 100",
        picture(make_picture(tmp_path / "wide.png", 6, height=10, width=81)):
            "too wide: 259 pixels at a height of 32, --max_width is 256",
        picture(make_picture(tmp_path / "much.png", 7), "x" * 41): "long text: 41 characters, --max_text_length is 40",
        picture(tmp_path / "again.webp"): "duplicate: the same picture is in another split",
    }
    splits = {"train": [*fine[:2], *bad], "validation": [fine[2]]}
    with caplog.at_level(logging.INFO):
        used, resized, report = checked(splits, FRAMES, keep=True, limits=Limits(
            min_side=8, max_side=100, max_width=256, height=32, max_text_length=40))
    assert used == {"train": fine[:2], "validation": [fine[2]]}
    assert report.refused == [("train", row.path, why) for row, why in bad.items()]
    assert (report.rows["train"], report.used["train"], report.labels["train"]) == (14, 2, Counter(good=2))
    for row, why in bad.items():
        assert f"train {row.path}: {why}" in caplog.text
    assert "Data check: train: 2 of 14 rows, 1 different texts, 1 labels, the largest good (100.0%)" in caplog.text
    assert ("refused: 5 unreadable, 1 blank, 1 unlabelled, 1 too small, 1 too large, 1 too wide, 1 long text, 1 "
            "duplicate") in caplog.text
    kept = [resized[split].pixels(row.path) for split, rows in used.items() for row in rows]
    assert all(each is not None and each.shape == (3, 8, 8) for each in kept)


def test_hostile_rows_are_refused_and_the_others_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fine = [picture(make_picture(tmp_path / f"fine{i}.png", i)) for i in range(3)]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    make_picture(tmp_path / "thread.png", height=1, width=2000)
    with open(tmp_path / "sparse.tar", "wb") as file:
        file.truncate(2**40)
    bad = {"pipe.png": "it is a pipe, a socket or a device", "zero.png": "it is a pipe, a socket or a device",
           "folder.png": "is a folder", "thread.png": "has 1 x 2,000 pixels",
           "a\0b.png": "no file can have such a name", "\ud800.png": "no file can have such a name",
           "x" * 300 + ".png": "File name too long",
           "pipe.png/a.tar!b.png": "Not a directory", "sparse.tar!b.png": "there is no such file"}
    rows = [picture(tmp_path / name) for name in bad]
    half = [picture(make_picture(tmp_path / "half.png", 4), "a \ud800 thing"),
            picture(make_picture(tmp_path / "other.png", 5), "a thing", label="caf\udce9")]
    splits = {"train": [fine[0], *rows, *half, fine[1]], "validation": [fine[2]]}
    used, _, report = checked(splits, FRAMES, keep=True)
    assert used == {"train": fine[:2], "validation": [fine[2]]}
    assert [path for _, path, _ in report.refused] == [each.path for each in rows + half]
    for (_, path, why), part in zip(report.refused, [*bad.values(), *["not Unicode: its text or label"] * 2]):
        assert part in why and printable(f"{path}: {why}") in caplog.text


def test_lines_that_cannot_be_read(tmp_path: Path) -> None:
    """CTC needs a column for each unit and a blank between two that are alike; a row may come narrower in training."""
    def line(number: int, width: int, text: str) -> Picture:
        return picture(make_picture(tmp_path / f"{number}.png", number, height=16, width=width), text)

    limits = Limits(height=32, lines=True, labels=lambda text: [ord(letter) for letter in text],
                    columns=lambda width: width // 4, stretch=0.25)
    fine = [line(0, 10, "abcd"), line(1, 13, "aab"), line(2, 15, "aab")]  # 20, 26, 30 pixels, or 16, 20, 24
    bad = {line(3, 9, "abcd"): "not alignable: 3 columns, its 4 labels need 4",
           line(4, 10, "aab!"): "not alignable: 4 columns, its 4 labels need 5",
           line(5, 90, "one\ntwo"): "several lines: 2 are written there, cut the picture into them",
           line(6, 90, ""): "without text: it takes a column `text`, or a.txt beside a.png"}
    judged = [line(7, 9, "abcd"), line(8, 90, "ab zzy"), line(9, 90, "z\u00e9")]
    used, _, report = examined({"train": [*fine, *bad], "validation": judged}, {}, keep=False, limits=limits)
    assert used == {"train": fine, "validation": judged}, "what is hard to align is judged by"
    assert report.refused == [("train", row.path, why) for row, why in bad.items()]
    assert list(report.lines())[-3:] == [
        "widths in pixels at the model's height: smallest 18, 50 % 26, 90 % 180, 99 % 180, largest 180",
        "lengths in characters: smallest 2, 50 % 3, 90 % 6, 99 % 6, largest 6",
        "characters in training: 4; in validation alone: 'z' 3, ' ' 1, 'y' 1, '\u00e9' 1"]


def test_characters_that_training_lacks_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [picture(make_picture(tmp_path / f"{i}.png", i), text) for i, text in enumerate(("ab", "ba", "abc"))]
    checked({"train": rows[:2], "validation": rows[2:]}, FRAMES, keep=False, limits=Limits(height=32, lines=True))
    assert "1 characters of the validation texts never occur in training: they cannot be read" in caplog.text
    caplog.clear()
    checked({"train": rows[2:], "validation": rows[:2]}, FRAMES, keep=False, limits=Limits(height=32, lines=True))
    assert "never trained on" not in caplog.text


def test_what_training_shares_with_validation_is_reported(tmp_path: Path) -> None:
    def row(number: int, text: str, group: str) -> Picture:
        return picture(make_picture(tmp_path / f"{number}.png", number), text, group=group)

    splits = {"train": [row(0, "a", "x"), row(1, "b", "y"), row(2, "b", "y"), row(3, "c", "z"), row(4, "d", "")],
              "validation": [row(5, "b", "y"), row(5, "e", "y")], "test": [row(6, "c", "w"), row(4, "f", "")]}
    used, _, report = examined(splits, FRAMES, keep=False)
    assert report.shared == {"groups": 1, "texts": 2, "pictures": 1} and len(used["train"]) == 4
    assert report.groups == {"train": 3, "validation": 1, "test": 1}
    assert report.texts == {"train": 3, "validation": 2, "test": 2}
    assert "Overlap of training and validation: 1 groups, 2 texts, 1 pictures" in list(report.lines())
    assert report.repeated == 0, "one file in two splits is one file"
    make_picture(tmp_path / "7.png", 0)
    _, _, report = examined({"train": [*splits["train"], picture(tmp_path / "7.png")]}, FRAMES, keep=False)
    assert report.repeated == 1 and "files with the same picture as another: 1" in list(report.lines())


def test_labels_and_sizes_are_reported(tmp_path: Path) -> None:
    labels = "abcdefghijklmn" + 6 * "o"
    rows = [picture(make_picture(tmp_path / f"{i}.png", i, height=10 + i, width=40), label=label)
            for i, label in enumerate(labels)]
    _, _, report = examined({"train": rows}, FRAMES, keep=False)
    lines = list(report.lines())
    assert lines[0] == "train: 20 of 20 rows, 1 different texts, 15 labels, the largest o (30.0%)"
    assert "heights in pixels: smallest 10, 50 % 19, 90 % 27, 99 % 29, largest 29" in lines
    assert "widths in pixels: smallest 40, 50 % 40, 90 % 40, 99 % 40, largest 40" in lines
    assert lines[-1].startswith("labels: o 6, a 1, ") and lines[-1].endswith(" and 3 more")


def test_percentiles() -> None:
    values = list(range(1, 1001))
    assert percentiles(values[::-1]) == "smallest 1, 50 % 500, 90 % 900, 99 % 990, largest 1,000"
    assert [np.percentile(values, p, method="inverted_cdf") for p in (50, 90, 99)] == [500, 900, 990]
    assert percentiles([5]) == "smallest 5, 50 % 5, 90 % 5, 99 % 5, largest 5"


def test_what_has_the_smallest_or_largest_size_is_of_use() -> None:
    row, limits = Picture("x", "four"), Limits(min_side=8, max_side=64, max_width=256, height=32, max_text_length=4)
    assert problem(row, Fact("x", height=8, width=64, spread=9), limits) == ""
    for height, width, text in ((7, 56, "four"), (9, 65, "four"), (8, 64, "fives")):
        assert problem(Picture("x", text), Fact("x", height=height, width=width, spread=9), limits)


def test_pictures_without_texts_are_of_use_where_none_are_needed() -> None:
    assert problem(Picture("x", ""), Fact("x", height=1, width=1, spread=9), Limits(labelled=False)) == ""


def test_a_split_without_usable_rows_is_refused(tmp_path: Path) -> None:
    good, gone = picture(make_picture(tmp_path / "a.png")), picture(tmp_path / "b.png")
    with pytest.raises(UserError, match="none of the 1 validation pictures can be used: .*b.png is unreadable"):
        checked({"train": [good], "validation": [gone]}, FRAMES, keep=False)


REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not REAL.exists(), reason="the pictures are not at hand")
def test_real_pictures_are_all_of_use_but_one_that_comes_twice() -> None:
    splits = table.read(str(REAL / "images/clothing"))
    _, _, report = examined(splits, FRAMES, keep=False)
    assert not report.refused and report.labels["validation"].most_common(1) == [("t-shirt", 81)]
    _, _, report = examined(table.read(str(REAL / "images/captions")), FRAMES, keep=False)
    assert report.repeated == 1 and {why.partition(":")[0] for _, _, why in report.refused} <= {"duplicate"}
