"""Lines changed: within bounds, as (seed, epoch, row) says, the same bits from a cache as from the files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from made_pictures import make_picture, pixels
from stoker.config import UserError
from stoker.data.loader import LengthOrder, training_batches
from stoker.data.pictures.line_augmentation import LineAugmentation, moved
from stoker.data.pictures.resized import Frame, luminance, resize
from stoker.data.pictures.table import Picture
from stoker.data.pictures.views import Views

FRAME = Frame(32, grey=True)
MUCH = LineAugmentation(stretch=0.3, slant=0.3, shift=0.1, weight=0.6, contrast=0.4, blur=1.5, noise=20, invert=0.3)
SIZES = [(32, 100), (20, 300), (64, 31), (7, 7), (40, 500)]


@pytest.fixture
def rows(tmp_path: Path) -> list[Picture]:
    return [Picture(str(make_picture(tmp_path / f"{i}.png", i, height=height, width=width)), f"text {i}")
            for i, (height, width) in enumerate(SIZES)]


def paths_of(rows: list[Picture]) -> list[str]:
    return [row.path for row in rows]


def bar(width: int = 100, at: int = 50, top: int = 8, bottom: int = 24) -> Tensor:
    """A dark upright bar on white."""
    found = torch.full((1, 32, width), 255, dtype=torch.uint8)
    found[:, top:bottom, at - 2:at + 2] = 0
    return found


def changed(picture: Tensor, count: int = 60, **bounds: float) -> list[np.ndarray]:
    augmentation = LineAugmentation(**bounds)
    return [augmentation(picture, FRAME, np.random.default_rng(seed))[0].numpy() for seed in range(count)]


def centre(ink: np.ndarray, axis: int) -> float:
    weights = (255.0 - ink).sum(1 - axis)
    return float((weights * np.arange(len(weights))).sum() / weights.sum())


def test_grey_is_the_luminance_that_pillow_has() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (luminance(torch.from_numpy(colours).permute(2, 0, 1))[0].numpy() ==
            np.asarray(Image.fromarray(colours).convert("L"))).all()
    grey = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(luminance(grey)[0], grey[0]), "grey stays as it is"


def test_kept_or_not_the_pixels_are_the_same(rows: list[Picture]) -> None:
    kept = resize(paths_of(rows), FRAME)
    for augmentation in (LineAugmentation(), MUCH):
        from_disk = Views(rows, FRAME, resized=kept, augmentation=augmentation, seed=3)
        from_files = Views(rows, FRAME, augmentation=augmentation, seed=3)
        for a, b in zip(from_disk, from_files, strict=True):
            assert torch.equal(a.pixels, b.pixels) and a[1:] == b[1:]
            assert a.pixels.dtype == torch.uint8 and a.pixels.shape[:2] == (1, 32)
    widths = [view.pixels.shape[2] for view in Views(rows, FRAME, resized=kept)]
    assert widths == [100, 480, 16, 32, 400] == [FRAME.width_of(*size) for size in SIZES]
    grey = np.asarray(Image.fromarray(pixels(0, *SIZES[0])).convert("L"))
    assert (Views(rows, FRAME)[0].pixels[0].numpy() == grey).all(), "as it is, where it fits"


def test_the_cache_holds_a_byte_a_pixel(rows: list[Picture], own_home: Path) -> None:
    resize(paths_of(rows), FRAME)
    [kept] = (own_home / "pictures").glob("*.bin")
    assert kept.stat().st_size == 32 * (100 + 480 + 16 + 32 + 400)
    expected = Views(rows, FRAME)[4].pixels
    os.truncate(kept, 1000)
    assert torch.equal(Views(rows, FRAME, resized=resize(paths_of(rows), FRAME))[4].pixels, expected), "made anew"


def test_grey_and_coloured_are_kept_apart(rows: list[Picture]) -> None:
    grey, coloured = resize(paths_of(rows), FRAME), resize(paths_of(rows), Frame(32))
    for row in rows:
        a, b = grey.pixels(row.path), coloured.pixels(row.path)
        assert a is not None and b is not None and a.shape == (1, *b.shape[1:]) and b.shape[0] == 3


def test_what_is_changed_follows_from_seed_epoch_and_row(rows: list[Picture]) -> None:
    def seen(item: int, seed: int = 1) -> Tensor:
        return Views(rows, FRAME, augmentation=MUCH, seed=seed)[item].pixels

    assert len({seen(item, seed).numpy().tobytes() for item in (0, 5, 10) for seed in (1, 2)}) == 6
    views = Views(rows, FRAME, augmentation=MUCH, seed=1)
    assert all(torch.equal(views[item].pixels, seen(item)) for item in (13, 2, 7))
    before = torch.get_rng_state()
    assert views[13][1:] == ("text 3", "", 3, 2) and torch.equal(torch.get_rng_state(), before)


def test_nothing_is_changed_unless_asked(rows: list[Picture]) -> None:
    views = Views(rows, FRAME, augmentation=LineAugmentation())
    assert torch.equal(views[0].pixels, views[5].pixels)
    assert all((each == bar()[0].numpy()).all() for each in changed(bar(), count=5))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(rows: list[Picture], workers: int) -> None:
    order = LengthOrder(5, 2, 1, 7, lengths=(100, 480, 16, 32, 400), batch_length=900)
    views = Views(rows, FRAME, augmentation=MUCH, seed=7)
    whole = list(training_batches(views, list, order, 0, 8, 0))
    rest = list(training_batches(views, list, order, 3, 8, workers))
    assert len({each.epoch for batch in whole for each in batch}) > 1
    for a, b in zip(sum(whole[3:], []), sum(rest, []), strict=True):
        assert torch.equal(a.pixels, b.pixels) and a[1:] == b[1:]


# -- what is changed


def test_stretched_within_bounds() -> None:
    widths = [each.shape[1] for each in changed(bar(400), count=200, stretch=0.25)]
    assert 320 <= min(widths) < 330 and 485 < max(widths) <= 500
    assert np.median(widths) == pytest.approx(400, abs=15), "as often narrower as wider"
    for each in changed(bar(400, at=100), count=40, stretch=0.25):
        assert centre(each, 1) / each.shape[1] == pytest.approx(0.25, abs=0.01), "and nothing is cut away"


def test_slanted_within_bounds() -> None:
    leans = []
    for each in changed(bar(), count=200, slant=0.25):
        assert each.shape[0] == 32 and 100 <= each.shape[1] <= 108
        leans.append((centre(each[8:10], 1) - centre(each[22:24], 1)) / 14)
        assert centre(each, 1) == pytest.approx((each.shape[1] - 1) / 2, abs=0.6), "about the middle"
    assert -0.26 < min(leans) < -0.22 and 0.22 < max(leans) < 0.26


def test_nothing_is_lost_at_the_ends() -> None:
    """Of a line that all but fills its frame the first and last strokes are whole, head and foot."""
    line = torch.full((1, 32, 300), 255, dtype=torch.uint8)
    line[:, :, 1:4] = line[:, :, -4:-1] = 0
    for each in changed(line, count=100, slant=0.4, shift=0.1):
        ink = (255.0 - each).sum(1) / 255
        assert ink.min() > 5.9 and ink.max() < 6.1, "two strokes of three columns in each row"
    for each in changed(line, count=100, stretch=0.3, slant=0.4):
        assert (255.0 - each).sum(1).min() / 255 > 5 * each.shape[1] / 315


def test_shifted_within_bounds() -> None:
    middles = [centre(each, 0) for each in changed(bar(), count=200, shift=0.1)]
    assert 12 < min(middles) < 13.2 and 17.8 < max(middles) < 19
    heights = [(255.0 - each).sum(0).max() / 255 for each in changed(bar(), count=200, shift=0.1)]
    assert 14 < min(heights) < 15 and 17 < max(heights) < 18


def test_what_comes_in_at_the_edges_is_as_they_are() -> None:
    """Grey paper stays grey all over, however it is moved."""
    flat = torch.full((1, 32, 77), 173, dtype=torch.uint8)
    assert all((each == 173).all() for each in changed(flat, stretch=0.4, slant=0.5, shift=0.3))
    image = Image.fromarray(np.full((32, 60), 9, np.uint8))
    assert (np.asarray(moved(image, stretch=1.0, slant=1.0, shift=0.3, zoom=0.7)) == 9).all()


def test_moved_by_nothing_is_the_same() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 90), dtype=np.uint8)
    assert (np.asarray(moved(Image.fromarray(picture), stretch=1, slant=0, shift=0, zoom=1)) == picture).all()


def test_bolder_and_thinner() -> None:
    ink = [(255.0 - each).sum() / 255 for each in changed(bar(), count=100, weight=1)]
    assert 28 <= min(ink) < 40 and 98 < max(ink) <= 108, "a bar of 4 x 16, less or more a pixel all around"


def test_contrast_and_brightness() -> None:
    seen = changed(bar(), count=200, contrast=0.4)
    spreads = [float(np.ptp(each)) for each in seen]
    assert 55 <= min(spreads) < 150 and max(spreads) == 255
    assert min(each.max() for each in seen) < 190, "paper darker"


def test_half_the_rows_stay_sharp_and_free_of_noise() -> None:
    flat = torch.full((1, 32, 200), 128, dtype=torch.uint8)
    noises = np.array([each.std() for each in changed(flat, count=200, noise=20)])
    assert 70 < (noises == 0).sum() < 130 and 17 < noises.max() < 20.5
    sharp = [(each == bar()[0].numpy()).all() for each in changed(bar(), count=200, blur=2)]
    assert 70 < sum(sharp) < 130
    assert max(int(each.min()) for each in changed(bar(), count=200, blur=2)) > 60


def test_inverted_as_often_as_asked() -> None:
    inverted = [(each == 255 - bar()[0].numpy()).all() for each in changed(bar(), count=200, invert=0.25)]
    assert 30 < sum(inverted) < 70


def test_a_file_that_vanished_meanwhile_is_reported(rows: list[Picture]) -> None:
    os.unlink(rows[2].path)
    with pytest.raises(UserError, match=r"2\.png there is no such file; it was all right when the data were checked"):
        Views(rows, FRAME, augmentation=MUCH)[2]
