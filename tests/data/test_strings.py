"""Strings of words: each by one speaker, made of that speaker's words in the order that its text says."""

import csv
from pathlib import Path

import numpy as np
import pytest

from sounds import make_sound
from stoker.config import UserError
from stoker.data.speech import audio, strings
from stoker.data.speech.recordings import Utterance


@pytest.fixture
def words(tmp_path: Path) -> list[Utterance]:
    return [Utterance(str(make_sound(tmp_path / f"{speaker}_{word}.wav", 0.2, seed=10 * s + w)), word, 0.0, speaker)
            for s, speaker in enumerate(("anna", "bo")) for w, word in enumerate(("one", "two", "three"))]


def test_a_string_is_its_words(words: list[Utterance], tmp_path: Path) -> None:
    path = strings.make(words, tmp_path / "out", count=20, longest=4, pause=0.1, seed=0)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    sound = {(word.speaker, word.text): audio.read(word.path) for word in words}
    assert len(rows) == 40 and {len(row["transcription"].split()) for row in rows} == {1, 2, 3, 4}
    for row in rows:
        samples, at = audio.read(path.parent / row["audio_path"]), 0
        for word in row["transcription"].split():
            expected = sound[row["speaker"], word]
            ends = range(at + 3200, at + 4900)
            at = next(end for end in ends if np.allclose(samples[end - 3200:end], expected, atol=1e-4))
        assert at == len(samples) == pytest.approx(float(row["seconds"]) * 16000, abs=8)


def test_the_same_seed_is_the_same(words: list[Utterance], tmp_path: Path) -> None:
    made = {name: strings.make(words, tmp_path / name, count=3, longest=3, pause=0.1, seed=seed).read_text()
            for name, seed in (("a", 0), ("b", 0), ("c", 1))}
    assert made["a"] == made["b"] != made["c"]
    rows = list(csv.DictReader(made["a"].splitlines()))
    texts = [[row["transcription"] for row in rows if row["speaker"] == name] for name in ("anna", "bo")]
    assert texts[0] != texts[1], "each speaker says other strings"


def test_mistakes(words: list[Utterance], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already: name a new folder"):
        strings.make(words, tmp_path, count=1, longest=1, pause=0, seed=0)
    with pytest.raises(UserError, match="none.wav there is no such file: take it out of the data"):
        gone = [Utterance(str(tmp_path / "none.wav"), "one")]
        strings.make(gone, tmp_path / "x", count=1, longest=1, pause=0, seed=0)
