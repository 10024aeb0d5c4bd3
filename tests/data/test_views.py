"""Views: the same bits from a cache as from the files, and in each epoch changed as (seed, epoch, row) says."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from damage import flip
from made_pictures import encoded, make_picture, pixels
from stoker.config import Damaged, UserError
from stoker.data import decode_cache
from stoker.data.loader import Order, training_batches
from stoker.data.pictures import images
from stoker.data.pictures.resized import Frame, resize
from stoker.data.pictures.table import Picture
from stoker.data.pictures.views import Augmentation, Views, Visit
from stoker.data.sources import archives

SQUARE = Frame(16, 16)
MUCH = Augmentation(crop=0.4, flip=0.5, colour=0.3)
SIZES = [(24, 32), (16, 16), (40, 11), (9, 100), (300, 200)]


@pytest.fixture
def rows(tmp_path: Path) -> list[Picture]:
    return [Picture(str(make_picture(tmp_path / f"{i}.png", i, height=height, width=width)), f"text {i}", f"label {i}")
            for i, (height, width) in enumerate(SIZES)]


@pytest.fixture(params=["one", "two"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads({"one": 1, "two": 2}[request.param])
    yield
    torch.set_num_threads(before)


def paths_of(rows: list[Picture]) -> list[str]:
    return [row.path for row in rows]


def test_kept_or_not_the_pixels_are_the_same(rows: list[Picture]) -> None:
    for augmentation in (Augmentation(), MUCH):
        kept = resize(paths_of(rows), augmentation.stored(SQUARE))
        from_disk = Views(rows, SQUARE, resized=kept, augmentation=augmentation, seed=3)
        from_files = Views(rows, SQUARE, augmentation=augmentation, seed=3)
        for a, b in zip(from_disk, from_files, strict=True):
            assert torch.equal(a.pixels, b.pixels) and a[1:] == b[1:]
            assert a.pixels.dtype == torch.uint8 and a.pixels.shape == (3, 16, 16)
    view = Views(rows, SQUARE)[1]
    assert (view.pixels.permute(1, 2, 0).numpy() == pixels(1, 16, 16)).all(), "as it is, where it fits"
    assert view[1:] == ("text 1", "label 1", 1, 0)


def test_members_of_archives_too(rows: list[Picture], tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:
        archives.write(file, [(f"{i}.png", Path(row.path).read_bytes()) for i, row in enumerate(rows)])
    packed = [replace(row, path=f"{tmp_path}/a.tar!{i}.png") for i, row in enumerate(rows)]
    kept = resize(paths_of(packed), SQUARE)
    for a, b, c in zip(Views(rows, SQUARE), Views(packed, SQUARE), Views(packed, SQUARE, resized=kept), strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.pixels, c.pixels)
    assert kept.fingerprint() == resize(paths_of(rows)).fingerprint(), "where the files lie makes no difference"


def test_what_was_decoded_is_remembered_until_a_file_changes(rows: list[Picture],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    first = resize(paths_of(rows), SQUARE)
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", lambda path: pytest.fail("was decoded again"))
        again = resize(paths_of(rows), SQUARE)
    assert again.facts == first.facts and again.fingerprint() == first.fingerprint()
    make_picture(Path(rows[1].path), 9, height=50, width=60)
    changed = resize(paths_of(rows), SQUARE)
    fact = changed.facts[rows[1].path]
    assert (fact.height, fact.width) == (50, 60) and changed.fingerprint() != first.fingerprint()
    here, there = changed.pixels(rows[4].path), first.pixels(rows[4].path)
    assert here is not None and there is not None and torch.equal(here, there)


def test_a_cache_that_lost_its_end_is_made_anew(rows: list[Picture], own_home: Path) -> None:
    expected = Views(rows, SQUARE)[4].pixels
    resize(paths_of(rows), SQUARE)
    [kept] = (own_home / "pictures").glob("*.bin")
    os.truncate(kept, 1000)
    assert torch.equal(Views(rows, SQUARE, resized=resize(paths_of(rows), SQUARE))[4].pixels, expected)


def test_a_damaged_pixel_is_never_seen_and_the_cache_is_made_again(rows: list[Picture], own_home: Path) -> None:
    expected = [view.pixels for view in Views(rows, SQUARE)]
    views = Views(rows, SQUARE, resized=resize(paths_of(rows), SQUARE))
    [kept] = (own_home / "pictures").glob("*.bin")
    flip(kept, 1001)
    with pytest.raises(Damaged, match=f"{kept} is damaged"):
        views[4]
    again = Views(rows, SQUARE, resized=resize(paths_of(rows), SQUARE))
    assert all(torch.equal(view.pixels, one) for view, one in zip(again, expected, strict=True))


def test_a_file_that_changed_since_it_was_checked_is_not_seen(rows: list[Picture]) -> None:
    """Also where it is not kept in its frame."""
    views = Views(rows, SQUARE, resized=resize(paths_of(rows)))
    make_picture(Path(rows[2].path), 99, height=SIZES[2][0], width=SIZES[2][1])
    assert views[1].pixels.shape[1:] == (SQUARE.height, SQUARE.width)
    with pytest.raises(UserError, match="has changed since the data were checked"):
        views[2]


def test_the_facts_of_a_file(tmp_path: Path, rows: list[Picture]) -> None:
    facts = resize([*paths_of(rows), str(tmp_path / "none.png")]).facts
    found = [facts[row.path] for row in rows]
    assert [(fact.height, fact.width) for fact in found] == SIZES and len({fact.digest for fact in found}) == 5
    assert [fact.spread for fact in found] == [
        int(pixels(i, *size).max()) - int(pixels(i, *size).min()) for i, size in enumerate(SIZES)]
    assert facts[str(tmp_path / "none.png")].problem == "there is no such file"
    (tmp_path / "again.webp").write_bytes(encoded(Image.fromarray(pixels(0, *SIZES[0])), "WEBP", lossless=True))
    assert resize([str(tmp_path / "again.webp")]).facts[str(tmp_path / "again.webp")].digest == found[0].digest
    for name, shape in (("high.png", (8, 6, 3)), ("wide.png", (6, 8, 3))):
        Image.fromarray(np.arange(144, dtype=np.uint8).reshape(shape)).save(tmp_path / name)
    high, wide = resize([str(tmp_path / "high.png"), str(tmp_path / "wide.png")]).facts.values()
    assert high.digest != wide.digest, "the same values, another picture"


def test_the_fingerprint_changes_when_two_files_are_exchanged(rows: list[Picture]) -> None:
    before = resize(paths_of(rows)).fingerprint()
    first, second = (Path(row.path).read_bytes() for row in rows[:2])
    Path(rows[0].path).write_bytes(second)
    Path(rows[1].path).write_bytes(first)
    assert resize(paths_of(rows)).fingerprint() != before


def test_with_processes_it_is_the_same(rows: list[Picture], monkeypatch: pytest.MonkeyPatch,
                                       own_home: Path) -> None:
    alone = resize(paths_of(rows), SQUARE)
    monkeypatch.setenv("STOKER_HOME", str(own_home / "other"))
    monkeypatch.setattr(decode_cache, "WORTH_WORKERS", 1)
    several = resize(paths_of(rows), SQUARE)
    assert several.facts == alone.facts
    for path in paths_of(rows):
        a, b = alone.pixels(path), several.pixels(path)
        assert a is not None and b is not None and torch.equal(a, b)


# -- the frame


def test_resized_as_pillow_does_it(threads: None) -> None:
    """Both average over all the pixels that become one; they differ in how they round."""
    for height, width in SIZES:
        whole = pixels(1, height, width)
        found = Frame(16, 12, "stretch")(torch.from_numpy(whole).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        expected = np.asarray(Image.fromarray(whole).resize((12, 16), Image.Resampling.BILINEAR))
        assert np.abs(found.astype(int) - expected).max() <= 2


def marked(height: int, width: int) -> Tensor:
    """Left half dark, right half bright, above and below as well: 0, 60, 120, 180."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    values = (60 * (x >= width // 2) + 120 * (y >= height // 2)).to(torch.uint8)
    return values.expand(3, height, width)


def test_crop_keeps_the_middle() -> None:
    found = Frame(8, 8, "crop")(marked(8, 32))[0]
    assert torch.equal(found, marked(8, 32)[0, :, 12:20])
    assert Frame(8, 8, "crop")(marked(100, 20)).shape == (3, 8, 8)


def test_pad_keeps_everything() -> None:
    found = Frame(8, 8, "pad")(marked(8, 32))[0]
    assert (found[:3] == 255).all() and (found[5:] == 255).all()
    corners = found[3:5, [0, -1]].int() - torch.tensor([[0, 60], [120, 180]])
    assert corners.abs().max() < 30, "the two rows are blended a little"
    assert (Frame(8, 8, "pad")(marked(32, 8))[0, :, :3] == 255).all()
    assert torch.equal(Frame(8, 8, "pad")(marked(8, 8)), marked(8, 8))


def test_stretch_gives_up_the_shape() -> None:
    found = Frame(8, 8, "stretch")(marked(8, 32))[0]
    assert torch.equal(found[[0, 0, -1, -1], [0, -1, 0, -1]], torch.tensor([0, 60, 120, 180]))


@pytest.mark.parametrize("height, width, wide", [(64, 200, 100), (32, 1, 1), (16, 7, 14), (320, 3, 1), (31, 999, 1031)])
def test_lines_are_as_wide_as_they_come(height: int, width: int, wide: int) -> None:
    found = Frame(32)(marked(height, width))
    assert found.shape == (3, 32, wide)
    kept = Augmentation(crop=0.3).stored(Frame(32))(marked(height, width))
    seen = Augmentation(crop=0.3)(kept, Frame(32), np.random.default_rng(0), Visit(0, 0.0))
    assert kept.shape[1] == 39 and seen.shape[1] == 32 and abs(seen.shape[2] - wide) <= 1


def test_what_is_cut_away_costs_no_sharpness() -> None:
    for crop in (0.1, 0.36, 0.75):
        larger = Augmentation(crop=crop).stored(Frame(64, 48))
        part = (1 - crop) * larger.height * larger.width
        assert 64 * 48 <= part < 1.1 * 64 * 48
    assert Augmentation(flip=1, colour=1).stored(SQUARE) == SQUARE


# -- what is changed


def test_what_is_changed_follows_from_seed_epoch_and_row(rows: list[Picture]) -> None:
    def seen(item: int, seed: int = 1) -> Tensor:
        return Views(rows, SQUARE, augmentation=MUCH, seed=seed)[item].pixels

    assert len({seen(item, seed).numpy().tobytes() for item in (0, 5, 10) for seed in (1, 2)}) == 6
    views = Views(rows, SQUARE, augmentation=MUCH, seed=1)
    other_order = [views[item].pixels for item in (13, 2, 7)]
    assert all(torch.equal(a, seen(item)) for a, item in zip(other_order, (13, 2, 7)))
    assert views[13][1:] == ("text 3", "label 3", 3, 2)
    twice = Views([rows[0], rows[0]], SQUARE, augmentation=MUCH, seed=1)
    assert not torch.equal(twice[0].pixels, twice[1].pixels), "one picture, two rows"


def test_it_leaves_the_global_random_state_alone(rows: list[Picture]) -> None:
    before = torch.get_rng_state()
    Views(rows, SQUARE, augmentation=MUCH)[7]
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_changed_unless_asked(rows: list[Picture]) -> None:
    views = Views(rows, SQUARE)
    assert torch.equal(views[0].pixels, views[5].pixels) and len(list(views)) == len(views) == 5
    with pytest.raises(IndexError):
        views[-1]


def changed(picture: Tensor, count: int = 60, **bounds: float) -> list[Tensor]:
    augmentation = Augmentation(**bounds)
    frame = Frame(picture.shape[1], picture.shape[2])
    return [augmentation(picture, frame, np.random.default_rng(seed), Visit(0, seed / count)) for seed in range(count)]


def test_mirrored_left_to_right_as_often_as_asked() -> None:
    picture = marked(8, 8)
    mirrored = [torch.equal(each, picture.flip(-1)) for each in changed(picture, flip=0.3)]
    assert sum(mirrored) == 18
    assert all(torch.equal(each, picture) for each, other in zip(changed(picture, flip=0.3), mirrored) if not other)
    assert all(torch.equal(each, picture.flip(-1)) for each in changed(picture, flip=1))


def test_mirrored_in_every_second_epoch_or_as_evenly_as_can_be(rows: list[Picture]) -> None:
    """At first about half of the rows are; which epoch a row begins with is random, and follows from the seed."""
    still = Views(rows, SQUARE)
    for share, seeds in ((0.5, range(40)), (0.3, range(10))):
        starts = []
        for seed in seeds:
            views = Views(rows, SQUARE, augmentation=Augmentation(flip=share), seed=seed)
            for row in range(5):
                mirrored = [torch.equal(views[row + 5 * epoch].pixels, still[row].pixels.flip(-1))
                            for epoch in range(20)]
                counts = np.convolve(mirrored, np.ones(10), "valid")
                assert set(counts) == {10 * share}, "in any ten epochs in a row"
                if share == 0.5:
                    assert [a != b for a, b in zip(mirrored, mirrored[1:])] == [True] * 19
                starts.append(mirrored[0])
        assert 0.1 < np.mean(starts) < 0.9


def test_moved_by_whole_pixels_and_mirrored_at_the_edges() -> None:
    """Against torch's own reflection, and as far as asked in each direction."""
    picture, seen = torch.from_numpy(pixels(1, 16, 24)).permute(2, 0, 1), set()
    wide = torch.nn.functional.pad(picture.float(), (6, 6, 4, 4), mode="reflect").to(torch.uint8)
    for each in changed(picture, count=200, shift=0.25):
        found = [(down, right) for down in range(9) for right in range(13)
                 if torch.equal(each, wide[:, down:down + 16, right:right + 24])]
        assert len(found) == 1
        seen.add(found[0])
    assert {down for down, _ in seen} == set(range(9)) and {right for _, right in seen} == set(range(13))


def test_a_crop_is_a_part_of_the_picture() -> None:
    """Two ramps, seen through a crop, tell which part it is."""
    across = torch.arange(200, dtype=torch.uint8).expand(200, 200)
    picture = torch.stack([across, across.T, across])
    areas, ratios, middles = [], [], []
    for each in changed(picture, count=200, crop=0.5):
        left, right, top, bottom = (int(each[0, 100, 1]), int(each[0, 100, -2]), int(each[1, 1, 100]),
                                    int(each[1, -2, 100]))
        areas.append((right - left + 3) * (bottom - top + 3) / 200**2)
        ratios.append((right - left) / (bottom - top))
        middles.append((left + right) / 2)
    assert 0.48 < min(areas) < 0.6 and 0.9 < max(areas) <= 1.03 and np.mean(areas) == pytest.approx(0.75, abs=0.04)
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.4
    assert min(middles) < 80 and max(middles) > 120


def test_colours_change_within_bounds(threads: None) -> None:
    """Grey stays grey, and as bright as the two factors allow."""
    flat = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    levels = [int(each[0, 0, 0]) for each in changed(flat, colour=0.2)]
    assert all((each == each[0, 0, 0]).all() for each in changed(flat, colour=0.2))
    assert 78 <= min(levels) < 86 and 114 < max(levels) <= 120
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    spreads = [int(each[0, 0, 0]) - int(each[2, 0, 0]) for each in changed(colour, colour=0.5)]
    assert min(spreads) < 90 and max(spreads) > 200, "more and less colourful"


def test_a_mean_is_taken_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """By two, that of a large picture has other last bits, and once in thousands another pixel comes of it."""
    from torchvision.transforms.v2 import functional

    asked, adjust = [], functional.adjust_contrast
    monkeypatch.setattr(functional, "adjust_contrast", lambda *args: (asked.append(torch.get_num_threads()),
                                                                      adjust(*args))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    changed(marked(8, 8), count=3, colour=0.2)
    assert asked == [1, 1, 1] and torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(rows: list[Picture], workers: int, threads: None) -> None:
    order = Order(5, 2, 1, 7, by_epoch=True)
    large = Frame(224, 224)
    views = Views(rows, large, augmentation=MUCH, seed=7)
    whole = list(training_batches(views, list, order, 0, 9, 0))
    rest = list(training_batches(views, list, order, 4, 9, workers))
    assert {each.epoch for batch in whole for each in batch} == {0, 1, 2}
    for a, b in zip(sum(whole[4:], []), sum(rest, []), strict=True):
        assert torch.equal(a.pixels, b.pixels) and a[1:] == b[1:]


def test_a_file_that_vanished_meanwhile_is_reported(rows: list[Picture]) -> None:
    os.unlink(rows[2].path)
    with pytest.raises(UserError, match=r"2\.png there is no such file; it was all right when the data were checked"):
        Views(rows, SQUARE)[2]


def test_a_full_disk_is_reported(rows: list[Picture], monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stoker.files.write", full)
    with pytest.raises(UserError, match="No space left on device in .*: make room there, .* or use --no_cache_images"):
        resize(paths_of(rows), SQUARE)
    assert not list((own_home / "pictures").glob("*.bin"))
