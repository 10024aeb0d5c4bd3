"""A long recording in pieces: nothing is lost, cuts are in pauses, and no more is held than a part."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stoker.data.speech import cuts
from stoker.data.speech.audio import RATE
from stoker.data.speech.cuts import EDGE, PART, PAUSE, Pause, by_energy, pieces

SECOND = RATE
WINDOW = 10 * SECOND


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def recording(*stretches: tuple[float, float]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Stretches of (seconds of speech, seconds of the pause after it) over faint noise -> samples; from where to where
    there is speech. Its loudness changes five times a second, as that of syllables."""
    parts, places, at = list[np.ndarray](), list[tuple[int, int]](), 0
    for number, (speech, pause) in enumerate(stretches):
        sound = noise(speech, 0.1, number)
        sound *= 0.3 + np.abs(np.sin(np.pi * 5 * np.arange(len(sound)) / RATE)).astype(np.float32)
        places.append((at, at + len(sound)))
        parts += [sound, np.zeros(round(pause * RATE), np.float32)]
        at += len(sound) + len(parts[-1])
    return np.concatenate(parts) + noise(at / RATE, 1e-4, 99)[:at], places


def drawn(draw: np.random.Generator, seconds: float) -> tuple[np.ndarray, list[tuple[int, int]]]:
    stretches, longest = list[tuple[float, float]](), draw.choice([2, 20, 90])
    while sum(map(sum, stretches)) < seconds:
        stretches.append((draw.uniform(0.3, longest), draw.uniform(0.01, longest / 2)))
    return recording(*stretches)


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_the_recording_and_no_word_is_lost(seed: int) -> None:
    draw = np.random.default_rng(seed)
    samples, places = drawn(draw, 150)
    for find in (by_energy(1.0), cuts.whole):
        blocks = np.split(samples, np.sort(draw.integers(0, len(samples), 30)))
        found = list(pieces(iter(blocks), find, longest=WINDOW))
        ends = np.cumsum([len(piece.samples) for piece in found]).tolist()
        assert [piece.start for piece in found] == [0, *ends[:-1]]
        assert np.array_equal(np.concatenate([piece.samples for piece in found]), samples)
        assert all(0 < len(piece.samples) <= PART for piece in found)
        for piece in found:
            if not piece.speech:
                end = piece.start + len(piece.samples)
                assert all(b <= piece.start or a >= end for a, b in places)
        assert find is not cuts.whole or all(piece.speech for piece in found)


def test_pieces_are_the_speech_and_the_edges_of_pauses() -> None:
    """0.15 s are no pause; the recording begins and ends with one."""
    samples, places = recording(*[(2.5, 0.4), (3.0, 0.15), (2.0, 0.7), (4.0, 3.0), (0.2, 0.5)])
    samples = np.concatenate([noise(0.3, 1e-4), samples])
    found = list(pieces(iter([samples]), by_energy(1.0), longest=WINDOW))
    assert [piece.speech for piece in found] == [False, True] * 4 + [False]
    edge = EDGE / RATE
    wanted = [(a + 0.3 - edge, b + 0.3 + edge) for a, b in [(0.0, 2.5), (2.9, 8.05), (8.75, 12.75), (15.75, 15.95)]]
    heard = [(piece.start / RATE, (piece.start + len(piece.samples)) / RATE) for piece in found if piece.speech]
    assert heard == [pytest.approx(each, abs=0.021) for each in wanted]


def test_a_few_words_in_a_minute_are_found() -> None:
    samples, places = recording((0.1, 30.0), (0.3, 20.0), (0.2, 40.0))
    samples = np.concatenate([noise(70, 1e-4, 5), samples])
    heard = [piece for piece in pieces(iter([samples]), by_energy(0.3), longest=WINDOW) if piece.speech]
    assert sum(len(piece.samples) for piece in heard) < 5 * SECOND
    for a, b in places:
        assert any(piece.start <= a + 70 * SECOND and b + 70 * SECOND <= piece.start + len(piece.samples)
                   for piece in heard)


def test_loud_sound_that_never_changes_is_heard() -> None:
    steady = noise(20, 0.2)
    assert [piece.speech for piece in pieces(iter([steady]), by_energy(1.0), longest=WINDOW)] == [True]


def test_without_pauses_it_is_cut_at_the_quietest_place_in_reach() -> None:
    samples = noise(130, 0.1)
    samples[55 * SECOND:55 * SECOND + 640] *= 0.1
    samples[40 * SECOND:40 * SECOND + 640] = 0
    found = list(pieces(iter([samples]), cuts.whole, longest=WINDOW))
    assert found[1].start == pytest.approx(55 * SECOND + 320, abs=320)
    assert all(50 * SECOND <= len(piece.samples) <= PART for piece in found[:-1])


def test_pauses_with_noise_are_found_beside_digital_silence() -> None:
    samples, places = recording((3.0, 1.0), (3.0, 1.0), (3.0, 1.0))
    samples = np.concatenate([samples + noise(len(samples) / SECOND, 1e-3, 7), np.zeros(5 * SECOND, np.float32)])
    heard = [piece for piece in pieces(iter([samples]), by_energy(0.3), longest=WINDOW) if piece.speech]
    assert len(heard) == len(places) == 3


def test_a_sound_that_grows_is_not_cut_into_crumbs() -> None:
    samples = noise(200, 0.1) * np.linspace(0.01, 1, 200 * SECOND, dtype=np.float32)
    found = list(pieces(iter([samples]), cuts.whole, longest=PART))
    assert min(len(piece.samples) for piece in found[:-1]) >= PART


def test_no_more_is_held_than_a_part_and_a_block() -> None:
    """A day of sound, of which each block is forgotten: what waits was read and is in no piece yet."""
    read = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(60):
            read += len(block)
            yield block

    block = np.concatenate([noise(9, 0.1), noise(1, 1e-4)])
    for piece in pieces(blocks(), by_energy(1.0), longest=WINDOW):
        assert read - piece.start <= PART + 2 * len(block)
    assert read == 600 * SECOND


def test_nothing_has_no_pieces() -> None:
    assert not list(pieces(iter([]), by_energy(1.0), longest=WINDOW))


def test_pauses_by_silero_are_what_it_leaves_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns where there is speech; importing it changes the number of threads."""
    speech = [{"start": 2 * PAUSE, "end": 10 * PAUSE}, {"start": 10 * PAUSE + 9, "end": 20 * PAUSE}]
    asked: list[int] = []

    class Package(SimpleNamespace):
        def __getattr__(self, name: str) -> object:
            torch.set_num_threads(1)
            raise AttributeError(name)

    def timestamps(samples: torch.Tensor, model: str, *, sampling_rate: int) -> list[dict[str, int]]:
        asked.append(sampling_rate)
        assert model == "model"
        return speech

    monkeypatch.setitem(__import__("sys").modules, "silero_vad", Package(
        load_silero_vad=lambda: "model", get_speech_timestamps=timestamps))
    found: list[Pause] = cuts.by_silero(1.0)(np.zeros(30 * PAUSE, np.float32))
    assert found == [(0, 2 * PAUSE), (20 * PAUSE, 30 * PAUSE)] and asked == [RATE]
