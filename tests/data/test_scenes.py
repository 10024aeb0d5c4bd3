"""The embedded scenes: captions that are true and tell their pictures apart, the same bytes from the same seed."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stoker.config import UserError
from stoker.data.pictures import images, scenes, table
from stoker.data.pictures.scenes import CAPTIONS, COLOURS, HELD_OUT, PLACES, RADII, ROWS, SHAPES, SIDE, Group, Scene
from stoker.data.sources import archives

FEW = {"train": 60, "validation": 20, "test": 10}


def contents(manifest: Path) -> list[bytes]:
    archive = str(manifest.parent / scenes.ARCHIVE)
    return [archives.read(archive, name, most=10**6) for name in archives.members(Path(archive))]


def test_the_same_seed_is_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = scenes.build(sizes=FEW)
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    again = scenes.build(sizes=FEW)
    assert first != again and first.read_text() == again.read_text() and contents(first) == contents(again)
    other = scenes.build(sizes=FEW, seed=1)
    assert other.read_text() != first.read_text() and not set(contents(other)) & set(contents(first))
    repeated = {"train": 0, "validation": 130, "test": 10}  # of 100 captions some come again, in other pictures
    assert len(set(contents(scenes.build(sizes=repeated)))) == 140


def test_they_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = scenes.build(sizes=FEW)
    monkeypatch.setattr(scenes, "picture", lambda *args: pytest.fail("was drawn again"))
    assert scenes.build(sizes=FEW) == path


def test_what_a_killed_start_left_is_made_anew(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    def killed(*args: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "picture", killed)
        with pytest.raises(KeyboardInterrupt):
            scenes.build(sizes=FEW)
    assert [path.name[:5] for path in own_home.glob("made/*/")] == ["half-"]
    assert len(contents(scenes.build(sizes=FEW))) == 90 and not list(own_home.glob("made/half-*"))


def test_combinations_are_held_out() -> None:
    """No colour, form, size, count or place is new, but these colours of these forms are."""
    drawn = scenes.script(scenes.SIZES)
    assert Counter(split for split, _ in drawn) == scenes.SIZES
    seen = {split: [scene for of, scene in drawn if of == split] for split in scenes.SIZES}
    kinds = {split: {(group.colour, group.shape) for scene in each for group in scene.groups}
             for split, each in seen.items()}
    assert kinds["train"] == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT
    for split in ("validation", "test"):
        assert kinds[split] >= HELD_OUT
        assert all(any((group.colour, group.shape) in HELD_OUT for group in scene.groups) for scene in seen[split])
    assert {colour for colour, _ in kinds["train"]} == set(COLOURS)
    assert {shape for _, shape in kinds["train"]} == set(SHAPES)
    assert not set(seen["validation"]) & set(seen["test"])


def words(scene: Scene) -> list[str]:
    """The caption in its parts, one for each thing that it tells."""
    singular = re.sub(r"(cross)es|(circle|square|triangle|star)s", r"\1\2", str(scene))
    return re.findall("|".join([*PLACES, *ROWS, "left of", r"above", r"\w+"]), singular)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_captions_to_judge_by_are_close_to_each_other(split: str) -> None:
    """Told by the words alone: which of them differ from another in exactly one."""
    chosen = list(dict.fromkeys(scene for of, scene in scenes.script(scenes.SIZES) if of == split))
    assert len(chosen) == len({str(scene) for scene in chosen}) == CAPTIONS[split] == 100
    told = [words(scene) for scene in chosen]
    close = sum(any(len(one) == len(other) and sum(map(str.__ne__, one, other)) == 1 for other in told) for one in told)
    assert close >= 60
    differing = {next(a for a, b in zip(one, other) if a != b) for one in told for other in told
                 if len(one) == len(other) and sum(map(str.__ne__, one, other)) == 1}
    for values in (RADII, COLOURS, SHAPES, [*PLACES, *ROWS, "left of", "above"], ["a", "two"]):
        assert differing & set(values), f"none of {values} alone tells two captions apart"


def test_every_caption_is_another_scene() -> None:
    every = scenes.every_scene()
    assert len({str(scene) for scene in every}) == len(every) == 60 * 5 + 60 * 2 * 2 + 2 * 3 * 60 * 59
    assert all(1 <= sum(group.count for group in scene.groups) <= 3 for scene in every)
    red, blue = Group(1, "small", "red", "circle"), Group(2, "large", "blue", "cross")
    assert str(Scene((red, blue), "left of")) == "a small red circle left of two large blue crosses"
    assert str(Scene((Group(3, "small", "green", "star"),), "one above another")) == (
        "three small green stars one above another")


def test_near_are_those_that_differ_in_one_thing() -> None:
    every = {scene: words(scene) for scene in random.Random(0).sample(scenes.every_scene(), 3000)}
    for scene in [*every][:20]:
        parts = words(scene)
        expected = {other for other, told in every.items() if len(told) == len(parts)
                    and sum(map(str.__ne__, parts, told)) == 1}
        near = scene.near()
        assert set(near) & every.keys() == expected and len(near) == len(set(near)) >= 10


def connected(inside: np.ndarray) -> np.ndarray:
    """A number for each group of pixels that touch each other, diagonally too; 0 outside."""
    numbers = np.where(inside, np.arange(1, inside.size + 1).reshape(inside.shape), 0)
    while True:
        around = np.lib.stride_tricks.sliding_window_view(np.pad(numbers, 1), (3, 3)).max((2, 3))
        larger = np.where(inside, around, 0)
        larger = np.append(0, larger)[larger]  # that of the pixel which a number was made for: long ways at once
        if (larger == numbers).all():
            return numbers
        numbers = larger


def looked_at(scene: Scene, seed: int) -> list[tuple[str, float, float, float]]:
    """Colour, area as a share, and centre of each spot in the picture."""
    pixels = np.asarray(images.decode(scenes.picture(scene, str(seed)))).astype(int)
    background = [np.bincount(pixels[..., channel].ravel()).argmax() for channel in range(3)]
    contrast = np.abs(pixels - background).sum(-1)
    spots = connected(contrast > 100)
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    found = []
    for number in np.unique(spots[spots > 0]):
        rows, columns = np.nonzero(spots == number)
        inside = np.argmax(contrast[rows, columns])
        colour = pixels[rows[inside], columns[inside]]
        found.append((names[int(np.abs(values - colour).sum(1).argmin())], len(rows) / SIDE**2,
                      columns.mean() / SIDE, rows.mean() / SIDE))
    return found


def test_captions_are_true() -> None:
    """As a stranger would see it who knows the six colours: so many spots, of these colours, there."""
    draw = random.Random(1)
    kinds = scenes._by_kind(False)
    for number in range(150):
        scene = draw.choice(kinds[number % 3])
        spots = looked_at(scene, number)
        expected = [group.colour for group in scene.groups for _ in range(group.count)]
        assert sorted(spot[0] for spot in spots) == sorted(expected), (str(scene), number, spots)
        if scene.place in PLACES:
            x, y = PLACES[scene.place]
            assert abs(spots[0][2] - x) < 0.1 and abs(spots[0][3] - y) < 0.1, str(scene)
        elif scene.place in ROWS:
            along, across = (2, 3) if scene.place == "side by side" else (3, 2)
            ordered = sorted(spot[along] for spot in spots)
            assert min(b - a for a, b in zip(ordered, ordered[1:])) > 0.1
            assert np.ptp([spot[across] for spot in spots]) < 0.05
        elif scene.groups[0].colour != scene.groups[1].colour:
            axis = 2 if scene.place == "left of" else 3
            first = [spot[axis] for spot in spots if spot[0] == scene.groups[0].colour]
            second = [spot[axis] for spot in spots if spot[0] == scene.groups[1].colour]
            assert max(first) < min(second), str(scene)


def test_what_captions_leave_out_varies() -> None:
    row = Scene((Group(2, "small", "blue", "square"),), "side by side")
    seen = [looked_at(row, seed) for seed in range(40)]
    for axis in (2, 3):
        middles = [sum(spot[axis] for spot in spots) / 2 for spots in seen]
        assert np.ptp(middles) > 0.3
    grounds = [np.asarray(images.decode(scenes.picture(row, str(seed))))[0, 0] for seed in range(40)]
    assert min(map(max, grounds)) < 50 and max(map(min, grounds)) > 200, "dark and light"


def test_small_is_smaller_than_large() -> None:
    for shape in SHAPES:
        areas = {size: [looked_at(Scene((Group(1, size, "red", shape),), "in the middle"), seed)[0][1]
                        for seed in range(12)] for size in RADII}
        assert max(areas["small"]) < 0.6 * min(areas["large"]), shape


def test_the_shapes_differ_in_how_much_they_fill() -> None:
    """Of the square that holds them, upright, by geometry."""
    fills = {"circle": np.pi / 4, "square": 1, "triangle": 0.5}
    for shape, share in fills.items():
        outline = np.array(scenes.OUTLINES[shape]) if shape != "circle" else np.array(
            [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 400)])
        x, y = outline.T
        area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2  # the shoelace formula
        assert area / (np.ptp(x) * np.ptp(y)) == pytest.approx(share, rel=1e-3)
    for name, outline in scenes.OUTLINES.items():
        assert 0.9 < max(np.hypot(*corner) for corner in outline) <= 1.001, f"{name} is as large as it is said to be"


def test_as_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "SIZES", FEW)
    splits = table.read("scenes")
    assert {split: len(rows) for split, rows in splits.items()} == FEW
    assert len({each.text for each in splits["validation"]}) == 20
    assert images.decode(splits["test"][9].path).size == (SIDE, SIDE)


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="drawn with Pillow, which is not installed; install it: pip install pillow"):
        scenes.build(sizes=FEW)
