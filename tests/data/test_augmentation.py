"""Augmentation of sound: each change does what its option says, within its bounds, and by its random numbers alone."""

from collections.abc import Callable

import numpy as np
import pytest

from stoker.data.speech import audio
from stoker.data.speech.augmentation import (
    FLOOR,
    NOISE,
    QUIETER,
    ROOMS,
    SLOPES,
    Augmentation,
    Sound,
    _noises,
    _response,
    reverberant,
)

RATE = audio.RATE
EVERYTHING = dict(speed=0.15, pitch=2, reverb=0.5, noise=5, babble=5, clip=0.5, codec=0.5, gain=6)


def tone(frequency: float = 200, seconds: float = 1.0, size: float = 0.1) -> np.ndarray:
    return (size * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def changed(samples: np.ndarray, *, times: int = 60, other: Callable[[float], np.ndarray] | None = None,
            **bounds: float) -> list[np.ndarray]:
    return [Augmentation(**bounds)(samples, np.random.default_rng(seed), other).samples for seed in range(times)]


def waves(samples: np.ndarray) -> float:
    """Of a tone, a second."""
    inside = samples[200:-200]
    return np.count_nonzero(np.diff(np.signbit(inside))) / 2 / len(inside) * RATE


def below(samples: np.ndarray, change: np.ndarray) -> float:
    """dB by which what was added is quieter."""
    return float(10 * np.log10(np.mean(samples**2) / np.mean((change - samples) ** 2)))


def test_nothing_is_changed_by_default() -> None:
    [same] = changed(tone(), times=1)
    assert (same == tone()).all()
    assert (Augmentation()(tone(), np.random.default_rng(0)).pitch) == 1


def test_faster_is_higher_and_shorter() -> None:
    found = changed(tone(), speed=0.1)
    lengths = {len(each) for each in found}
    assert len(lengths) > 2 and min(lengths) >= RATE / 1.1 - 1 and max(lengths) <= RATE / 0.9 + 1
    for each in found:
        assert waves(each) * len(each) / RATE == pytest.approx(200, abs=2)


def test_the_pitch_that_is_returned_is_the_pitch_that_is_heard() -> None:
    """The spectrogram is made as much longer."""
    for seed in range(30):
        sound = Augmentation(pitch=4)(tone(), np.random.default_rng(seed))
        assert 2**(-4 / 12) - 0.01 <= sound.pitch <= 2**(4 / 12) + 0.01
        assert waves(sound.samples) / 200 == pytest.approx(sound.pitch, abs=0.01)
        assert len(sound.samples) / RATE == pytest.approx(1 / sound.pitch, abs=0.001)


def test_silence_is_before_and_after() -> None:
    for each in changed(tone() + 0.2, silence=0.5):
        heard = np.flatnonzero(each)
        assert (each[heard[0]:heard[-1] + 1] == tone() + np.float32(0.2)).all()
    lengths = [len(each) - RATE for each in changed(tone(), silence=0.5)]
    assert 0 <= min(lengths) < 0.3 * RATE and 0.7 * RATE < max(lengths) <= RATE


def test_gain_grows_towards_the_end() -> None:
    """What would be too loud is made quieter as a whole, never cut off."""
    def decibels(samples: np.ndarray) -> list[float]:
        parts = [(np.abs(each[:RATE // 50]).max(), np.abs(each[-RATE // 50:]).max())
                 for each in changed(samples, gain=6)]
        return [float(20 * np.log10(end / start)) for start, end in parts]

    found = decibels(tone())
    assert -6 <= min(found) < -4 and 4 < max(found) <= 6
    assert decibels(9 * tone()) == pytest.approx(found, abs=0.01)
    assert max(np.abs(each).max() for each in changed(9 * tone(), gain=6)) == 1


def test_nothing_is_played_faster_than_asked_for() -> None:
    """So that the labels still have their frames."""
    for speed in (0.02, 0.05, 0.13):
        lengths = [len(each) for each in changed(tone(), speed=speed)]
        assert RATE / (1 + speed) <= min(lengths) < RATE < max(lengths) <= RATE / (1 - speed) + 1


def test_noise_and_babble_are_as_far_below_as_asked() -> None:
    """Babble in half of the rows; noise in all, in half of them as faint as a microphone's."""
    def other(place: float) -> np.ndarray:
        return tone(300 + 1000 * place, 0.7)

    distances = [below(tone(), each) for each in changed(tone(), noise=20)]
    assert 15 < sum(each > 20 + QUIETER for each in distances) < 45
    assert 19.9 < min(distances) < 26 and 80 < max(distances) < 20 + FLOOR + 0.1
    found = changed(tone(), babble=20, other=other)
    distances = [below(tone(), each) for each in found if (each != tone()).any()]
    assert 15 < len(distances) < 45
    assert 19.9 < min(distances) < 26 and 39 < max(distances) < 20 + QUIETER + 0.1
    assert all((each == tone()).all() for each in changed(tone(), babble=20)), "nobody else is there"
    silence = np.zeros(RATE, np.float32)
    assert not any(each.any() for each in changed(silence, noise=20, babble=20, reverb=1, clip=1, codec=1, other=other))


def test_the_noises_fall_as_their_slopes_say() -> None:
    frequencies = np.fft.rfftfreq(NOISE, 1 / RATE)
    for colour, slope in enumerate(SLOPES):
        power = np.abs(np.fft.rfft(_noises(colour)))**2
        low, high = (power[np.abs(frequencies / around - 1) < 0.1].mean() for around in (200, 3200))
        assert 10 * np.log10(low / high) == pytest.approx(slope * 10 * np.log10(16), abs=0.5)


def test_noise_lasts_as_long_as_the_longest_recording() -> None:
    long = np.tile(tone(), 40)
    assert len(long) > NOISE
    assert {len(each) for each in changed(long, times=6, noise=20)} == {len(long)}


def test_a_room_is_a_convolution_with_a_response_that_dies_away() -> None:
    for room in (0, 7, ROOMS - 1):
        response = _response(room)
        samples = np.random.default_rng(1).standard_normal(3000).astype(np.float32)
        assert reverberant(samples, room) == pytest.approx(np.convolve(samples, response)[:3000], abs=1e-3)
        assert response[0] == 1 and not response[1:RATE // 500].any()
        quarter = len(response) // 4
        assert np.abs(response[-quarter:]).mean() < 0.5 * np.abs(response[RATE // 500:quarter]).mean()
    assert len({_response(room).tobytes() for room in range(ROOMS)}) == ROOMS
    assert 20 < sum((each != tone()).any() for each in changed(tone(), reverb=0.5)) < 40


def test_clipping_cuts_off_the_loudest() -> None:
    found = [each for each in changed(tone(), clip=0.5) if (each != tone()).any()]
    assert 15 < len(found) < 45
    for each in found:
        top = np.abs(each).max()
        assert 0.0199 <= top <= 0.0801 and np.mean(np.abs(each) >= 0.999 * top) > 0.2
        quiet = np.abs(tone()) < top
        assert (each[quiet] == tone()[quiet]).all()


def test_coding_leaves_the_tone_and_adds_what_few_bits_add() -> None:
    found = [each for each in changed(tone(), codec=0.5) if (each != tone()).any()]
    assert 15 < len(found) < 45
    distances = [below(tone(), each) for each in found]
    assert 10 < min(distances) < 20 and 30 < max(distances) < 45
    assert any(len(np.unique(each)) <= 2 * 2**4 for each in found), "four bits"


def test_the_same_numbers_change_it_alike_whatever_else_is_switched_off() -> None:
    """A row is heard in the same room, with or without noise."""
    for name, bound in EVERYTHING.items():
        if name not in ("speed", "pitch", "babble"):
            which = [(each != tone()).any() for each in changed(tone(), times=20, **{name: bound})]
            others = [len(each) for each in changed(tone(), times=20, speed=0.1, **{name: bound})]
            assert others == [len(each) for each in changed(tone(), times=20, speed=0.1)], which


def test_a_share_of_the_recordings_stays_as_it_is() -> None:
    """The others are changed as without the option."""
    def heard(seed: int, **options: float) -> Sound:
        return Augmentation(**EVERYTHING, **options)(tone(), np.random.default_rng(seed), lambda place: tone(90))

    found, without = [heard(seed, unchanged=0.3) for seed in range(400)], [heard(seed) for seed in range(400)]
    assert 0.23 < sum(each.unchanged for each in found) / 400 < 0.37
    for each, other in zip(found, without):
        assert not other.unchanged and each.pitch == (1 if each.unchanged else other.pitch)
        assert np.array_equal(each.samples, tone() if each.unchanged else other.samples)


def test_it_is_a_function_of_its_random_numbers() -> None:
    def other(place: float) -> np.ndarray:
        return tone(300 + 1000 * place, 0.7)

    first, again = (changed(tone(), times=20, other=other, **EVERYTHING) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len({each.tobytes() for each in first}) == 20
    assert all(each.dtype == np.float32 and np.abs(each).max() <= 1 for each in first)
