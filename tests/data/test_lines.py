"""The embedded lines: the same bytes from the same seed, typefaces and texts held out, and what is said is there."""

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stoker.config import UserError
from stoker.data.pictures import fonts, images, lines, table, writing
from stoker.data.sources import archives
from stoker.data.text import pydocs

FEW = {"train": 60, "validation": 12, "test": 12}
DOCUMENTS = [f"Module {name} has some_{name} and os.{name}.path, which returns the {name} of a long list of things.\n"
             f"Another line about {name}s: 3 < 4, {{x}} and [y]; it is long enough to be cut into phrases.\n"
             for name in "apple bread candle door engine flower garden hammer island jacket kettle lamp mirror needle "
             "orange paper queen river stone table umbrella violin window yard zebra anchor bottle cloud drum eagle "
             "forest guitar house insect jungle kitten lemon mountain night ocean".split()]


@pytest.fixture(autouse=True)
def documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little of it: the real one is built in ten seconds."""
    monkeypatch.setattr(pydocs, "build", lambda: "".join(text + pydocs.SEPARATOR for text in DOCUMENTS))


def contents(manifest: Path) -> list[bytes]:
    archive = str(manifest.parent / lines.ARCHIVE)
    return [archives.read(archive, name, most=10**6) for name in archives.members(Path(archive))]


def grey(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture))).astype(float)


def test_the_same_seed_is_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = lines.build(sizes=FEW, workers=0)
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    again = lines.build(sizes=FEW, workers=2)
    assert first != again and first.read_text() == again.read_text() and contents(first) == contents(again)
    other = lines.build(sizes=FEW, seed=1, workers=0)
    assert not set(contents(other)) & set(contents(first))


def test_a_line_does_not_depend_on_those_before() -> None:
    """Typefaces are kept open: what was drawn with one must leave no trace in it."""
    drawn = lines.script(FEW)
    for order in (range(20), reversed(range(20))):
        found = {i: lines.picture(drawn[i].text, drawn[i].face, f"0 {i}") for i in order}
        assert found[3] == lines.picture(drawn[3].text, drawn[3].face, "0 3")
    assert found == {i: lines.picture(drawn[i].text, drawn[i].face, f"0 {i}") for i in range(20)}


def test_they_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines.build(sizes=FEW, workers=0)
    monkeypatch.setattr(lines, "picture", lambda *args: pytest.fail("was drawn again"))
    assert lines.build(sizes=FEW) == path


def test_a_family_and_all_texts_are_held_out() -> None:
    drawn = lines.script({"train": 3000, "validation": 300, "test": 300})
    family = {face: name for name, faces in fonts.FAMILIES.items() for face in faces}
    seen = {split: {family[line.face] for line in drawn if line.split == split} for split in FEW}
    assert seen["validation"] == {"Ubuntu"} and seen["test"] == {"Fira"}
    assert seen["train"] == set(fonts.FAMILIES) - {"Ubuntu", "Fira"} and len(seen["train"]) >= 10
    texts = {split: {line.text.casefold() for line in drawn if line.split == split} for split in FEW}
    assert sum(map(len, texts.values())) == len(drawn) == 3600, "in whatever case, no text comes twice"
    faces = {split: {line.face for line in drawn if line.split == split} for split in FEW}
    assert faces["train"] == {face for name in seen["train"] for face in fonts.FAMILIES[name]}
    assert faces["validation"] == set(fonts.FAMILIES["Ubuntu"]) and faces["test"] == set(fonts.FAMILIES["Fira"])


def test_held_out_lines_are_from_other_documents() -> None:
    names = {document.split()[1] for document in DOCUMENTS}
    told = {split: {name for line in lines.script({"train": 1500, "validation": 200, "test": 200})
                    if line.split == split for name in names if f"some_{name}" in line.text.lower()} for split in FEW}
    assert all(told.values()) and len(set.union(*told.values())) == sum(map(len, told.values()))


def test_every_printable_character_often_enough() -> None:
    drawn = [line for line in lines.script({"train": 5000, "validation": 1000, "test": 1}) if line.split != "test"]
    for split, least in (("train", 10), ("validation", 1)):
        counts = Counter("".join(line.text for line in drawn if line.split == split))
        assert set(counts) == set(map(chr, range(32, 127)))
        assert min(counts.values()) >= least, counts.most_common()[-3:]
    texts = [line.text for line in drawn]
    assert all(text == text.strip() and 1 <= len(text) <= writing.LONGEST for text in texts)
    assert 8 < np.mean([len(text) for text in texts]) < 20


def test_a_face_draws_what_it_has_signs_for() -> None:
    for line in lines.script({"train": 3000, "validation": 1, "test": 1}):
        assert line.face not in fonts.TEX or not set('"<>\\^_`{|}~') & set(line.text)


@pytest.mark.parametrize("face", sorted(face for faces in fonts.FAMILIES.values() for face in faces))
def test_faces_have_all_printable_characters(face: str) -> None:
    """Each looks other than what is drawn for a missing one, and no two look alike."""
    font = fonts.opened(face, 32)
    signs = [chr(number) for number in range(33, 127) if fonts.has(face, chr(number))]
    masks = [(font.getmask(sign).size, bytes(font.getmask(sign))) for sign in signs]
    alike = [signs[i] + sign for i, one in enumerate(masks) for sign, other in zip(signs[i + 1:], masks[i + 1:])
             if one == other]
    assert len(signs) >= 83 and set(alike) <= {"Il"}, alike
    missing = font.getmask("\x7f")
    if face != fonts.BITMAP:
        assert all(mask != (missing.size, bytes(missing)) for mask in masks)
    assert sum(map(any, (mask for _, mask in masks))) == len(masks)


def test_dark_and_light_large_and_small() -> None:
    drawn = lines.script({"train": 250, "validation": 1, "test": 1})[:250]
    seen = [grey(lines.picture(line.text, line.face, line.text)) for line in drawn]
    heights = [each.shape[0] for each in seen]
    assert min(heights) < 24 and max(heights) > 56 and min(heights) >= 8
    grounds = np.array([np.median([*each[0], *each[-1]]) for each in seen])
    assert 0.03 < np.mean(grounds < 110) < 0.25 and np.mean(grounds > 240) > 0.25 and len(set(grounds.round())) > 40
    spreads = np.array([np.ptp(each) for each in seen])
    assert spreads.min() > 40, "what is there can be seen"


def test_what_is_written_is_there() -> None:
    """As many characters as the text has, told by the ink: columns without any part them. Bits of other lines, and
    spots of other ink, may join two."""
    right = 0
    for seed in range(60):
        count = 2 + seed % 7
        ink = np.asarray(lines._written(" ".join("H" * count), "matplotlib/DejaVuSansMono", random.Random(seed))) > 60
        right += int(np.diff(ink.any(0).astype(int), prepend=0, append=0).clip(min=0).sum()) == count
    assert right >= 50


def test_as_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "SIZES", FEW)
    splits = table.read("lines")
    assert {split: len(rows) for split, rows in splits.items()} == FEW
    assert images.decode(splits["test"][3].path).mode == "RGB"
    expected = {split: [line.text for line in lines.script(FEW) if line.split == split] for split in FEW}
    assert {split: [row.text for row in rows] for split, rows in splits.items()} == expected, "kept as they stand"


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="drawn with pymupdf-fonts, which is not installed; install it: pip install "
                       "pymupdf-fonts"):
        lines.build(sizes=FEW)
