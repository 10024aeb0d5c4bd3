"""Changes of spectrograms: a tone moves to where the warp says, gains are dB, time is warped and not lost, and rows do
not depend on each other."""

import math

import pytest
import torch
from torch import Tensor

from stoker.model.mel import RANGE, LogMel
from stoker.model.spectral_changes import (
    BANDS,
    FRAMES,
    NUMBERS,
    STEP,
    TRACT,
    SpectralChanges,
    _centres,
    places,
    spec_augment,
)

M = 80
MIDDLE = torch.full((1, NUMBERS), 0.5)  # random numbers that change nothing
MICROPHONE = slice(1 + len(TRACT), 9 + len(TRACT))
LINE = slice(MICROPHONE.stop, MICROPHONE.stop + 4)
SAME, NONE = torch.ones(1), torch.zeros(1, 3, 0, BANDS)


def spectrogram(frequency: float, seconds: float = 0.5) -> tuple[Tensor, Tensor]:
    samples = torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * 16000)) / 16000)[None] * 0.1
    return LogMel(M)(samples + 1e-4 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(0)),
                     torch.tensor([samples.shape[1]]))


def drawn(place: int | slice, value: float) -> Tensor:
    draws = MIDDLE.clone()
    draws[:, place] = value
    return draws


def loudest(mel: Tensor) -> float:
    """Hz of the band that is loudest on average."""
    return float(_centres(M)[mel[0].mean(0).argmax()])


def test_the_middles_of_the_bands_are_those_of_the_filters() -> None:
    filters = LogMel(M).filters[::2]
    bins = torch.arange(filters.shape[0]) * 40.0
    for band in range(40, M):  # wide enough to have a middle among the bins
        assert float(_centres(M)[band]) == pytest.approx(float(bins[filters[:, band].argmax()]), abs=41)


def test_without_bounds_the_bits_are_the_same() -> None:
    mel, frames = spectrogram(1000)
    found, same = SpectralChanges()(mel, frames, torch.rand(1, NUMBERS), NONE, SAME)
    assert found is mel and same is frames


@pytest.mark.parametrize("octaves", [-0.3, 0.15, 0.3])
@pytest.mark.parametrize("frequency", [500.0, 1500.0, 3000.0])
def test_a_longer_vocal_tract_moves_what_is_heard_down(octaves: float, frequency: float) -> None:
    mel, frames = spectrogram(frequency)
    found, same = SpectralChanges(warp=0.3)(mel, frames, drawn(0, 0.5 + octaves / 0.6), NONE, SAME)
    assert loudest(found) == pytest.approx(frequency * 2**octaves, rel=0.05) and torch.equal(same, frames)


def test_the_highest_frequency_stays() -> None:
    mel, frames = spectrogram(7900)
    found, _ = SpectralChanges(warp=0.3)(mel, frames, drawn(0, 0.0), NONE, SAME)
    assert loudest(found) > 7300  # nearly: it is 100 Hz below


def test_what_was_played_faster_is_made_longer_and_stays_as_high() -> None:
    mel, frames = spectrogram(1200, 0.5)  # a tone of 1,000 Hz, played 1.2 times as fast
    found, longer = SpectralChanges()(mel, frames, torch.rand(1, NUMBERS), NONE, torch.tensor([1.2]))
    assert longer.tolist() == [62] and found.shape == (1, 62, M)  # of 50 frames and what playing it faster left over
    assert loudest(found) == pytest.approx(1200, rel=0.05)


def test_gains_are_decibels() -> None:
    mel, frames = spectrogram(1000)
    found, _ = SpectralChanges(colour=10)(mel, frames, drawn(MICROPHONE, 0.999999), NONE, SAME)
    assert found == pytest.approx(mel, abs=1e-5), "all bands louder: relative to the loudest nothing changed"
    draws = MIDDLE.clone()
    draws[:, MICROPHONE.start] = 0.999999  # 80 Hz
    found, _ = SpectralChanges(colour=10)(mel, frames, draws, NONE, SAME)
    assert (found - mel)[0, :, 0].mean() * 10 * RANGE / 2 == pytest.approx(10, abs=1.5)
    assert found[0, :, 60:] == pytest.approx(mel[0, :, 60:], abs=1e-5)


def test_a_narrow_line_loses_what_is_low_and_what_is_high() -> None:
    mel, frames = spectrogram(1000)
    draws = MIDDLE.clone()
    draws[:, LINE] = torch.tensor([0.0, 0.0, 0.5, 0.5])
    found, _ = SpectralChanges(narrow=0.3)(mel, frames, draws, NONE, SAME)
    heard = found[0].amax(0) > -1
    assert _centres(M)[heard].min() == pytest.approx(250, abs=40)
    assert _centres(M)[heard].max() == pytest.approx(3500, rel=0.05)
    draws[:, LINE] = 0.4
    unchanged, _ = SpectralChanges(narrow=0.3)(mel, frames, draws, NONE, SAME)
    assert unchanged == pytest.approx(mel, abs=1e-6)


def test_contrast_moves_loud_and_quiet_apart() -> None:
    mel, frames = spectrogram(1000)
    found, _ = SpectralChanges(contrast=0.2)(mel, frames, drawn(LINE.stop, 0.0), NONE, SAME)
    assert found.max() == 1 and found == pytest.approx(1 + 0.8 * (mel - 1), abs=1e-5)


def test_rhythm_keeps_beginning_end_and_order() -> None:
    frames = torch.tensor([200, 120])
    mel = torch.linspace(-1, 1, 200)[None, :, None].expand(2, -1, M).clone()
    mel[1, 120:] = 0
    draws = torch.rand(2, NUMBERS, generator=torch.Generator().manual_seed(1))
    found, same = SpectralChanges(rhythm=0.5)(mel, frames, draws, NONE, torch.ones(2))
    assert torch.equal(same, frames)
    for row, count in enumerate(frames.tolist()):
        times = found[row, :count, 0]
        assert times[0] == mel[row, 0, 0] and times[-1] == pytest.approx(float(mel[row, count - 1, 0]), abs=1e-5)
        steps = times.diff()
        assert (steps > 0).all() and steps.max() / steps.min() > 1.2
        assert steps.max() / steps.min() < math.exp(2 * 0.5) * 1.1


def test_elastic_deformation_moves_by_its_fields() -> None:
    """Up by a third of an octave where the field says so, in between less; later by frames; louder by decibels."""
    mel, frames = spectrogram(1000, 0.6)
    up = torch.zeros(1, 3, places(60), BANDS)
    up[:, 0, -1] = 1.0
    found, same = SpectralChanges(elastic=1 / 3)(mel, frames, MIDDLE, up, SAME)
    assert torch.equal(same, frames) and found[0, :48] == pytest.approx(mel[0, :48], abs=1e-4)
    tops = _centres(M)[found[0].argmax(1)]
    assert tops[59] == pytest.approx(1000 * 2 ** (11 / 12 / 3), rel=0.05) and 1000 < tops[54] < tops[59]
    steps = torch.full((1, 60, M), -1.0)
    steps[:, 30:] = 1.0
    later = torch.zeros(1, 3, places(60), BANDS)
    later[:, 1] = 4 / FRAMES / 0.1
    moved, _ = SpectralChanges(elastic=0.1)(steps, frames, MIDDLE, later, SAME)
    assert (moved[0, :34] == -1).all() and (moved[0, 34:] == 1).all()
    louder = torch.zeros(1, 3, places(60), BANDS)
    louder[:, 2, 0] = -10 / 4  # dB, at an elasticity of 0.1
    quieter, _ = SpectralChanges(elastic=0.1)(torch.ones(1, 60, M), frames, MIDDLE, louder, SAME)
    expected = 1 - 10 / 40 * (1 - torch.arange(60) / STEP).clamp(min=0)
    assert quieter[0, :, 0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("changes", [
    SpectralChanges(warp=0.2, colour=8, narrow=0.5, contrast=0.2, rhythm=0.3, elastic=0.1), SpectralChanges(warp=0.2)])
def test_each_row_is_changed_as_if_alone(changes: SpectralChanges) -> None:
    """Also beside longer rows; what is beyond its frames is 0."""
    generator = torch.Generator().manual_seed(2)
    mel, draws = torch.rand(2, 100, M, generator=generator) * 2 - 1, torch.rand(2, NUMBERS, generator=generator)
    frames, pitch = torch.tensor([100, 60]), torch.tensor([0.9, 1.1])
    mel[1, 60:] = 0
    fields = torch.randn(2, 3, places(100), BANDS, generator=generator)  # of 91 and 68 frames
    both, lengths = changes(mel, frames, draws, fields, pitch)
    alone, length = changes(mel[1:, :60], frames[1:], draws[1:], fields[1:, :, :places(68)], pitch[1:])
    assert torch.equal(length, lengths[1:])
    assert both[1, :length[0]] == pytest.approx(alone[0], abs=1e-4)
    assert not both[1, lengths[1]:].any()
    assert not changes.colour or both.amax((1, 2)) == pytest.approx(torch.ones(2))


def test_spec_augment_blanks_out_what_the_draws_say_and_no_more() -> None:
    mel, frames = torch.ones(300, 50, 20), torch.full((300,), 50)
    frames[1::2] = 30
    draws = torch.rand(300, 2, 4, generator=torch.Generator().manual_seed(0))
    masked = spec_augment(mel, frames, draws, widest_band=4, longest_time=0.1)
    assert torch.equal(masked, spec_augment(mel, frames, draws, widest_band=4, longest_time=0.1))
    bands, times = (masked == 0).all(1), (masked == 0).all(2)  # (300, 20), (300, 50)
    assert torch.equal(masked == 0, bands[:, None] | times[:, :, None])
    assert bands.sum(1).max() == 8 and times[::2].sum(1).max() > 4
    assert (times.sum(1) <= 2 * 0.1 * frames).all() and not times[1::2, 30:].any()
    assert bands.any(0).all() and times[::2].any(0).all(), "every place may be hit"


def test_spec_augment_may_be_off() -> None:
    mel = torch.randn(2, 30, 20)
    frames = torch.tensor([30, 20])
    assert torch.equal(spec_augment(mel, frames, torch.rand(2, 2, 4), widest_band=0, longest_time=0), mel)
