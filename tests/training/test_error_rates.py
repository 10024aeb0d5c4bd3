"""Error rates against jiwer and torchaudio."""

import random

import jiwer
import pytest

from stoker import wheels
from stoker.training.core.error_rates import error_rate


def test_error_rates_are_those_of_jiwer() -> None:
    draw, words = random.Random(0), "a ab abc abcd bcd cd d".split()
    said = [" ".join(draw.choices(words, k=draw.randint(1, 8))) for _ in range(200)]
    heard = [" ".join(draw.choices(words, k=draw.randint(0, 8))) if draw.random() < 0.7 else text for text in said]
    word, character = error_rate(map(str.split, said), map(str.split, heard)), error_rate(said, heard)
    assert word.total / word.count == pytest.approx(jiwer.wer(said, heard), abs=1e-12)
    assert character.total / character.count == pytest.approx(jiwer.cer(said, heard), abs=1e-12)


def test_error_rates_are_those_of_torchaudio() -> None:
    """jiwer counts with the same library; this is a plain loop, and takes empty sentences too."""
    distance, draw = wheels.torchaudio().functional.edit_distance, random.Random(1)
    said = ["".join(draw.choices("ab \u00e4\u0301\U0001f642", k=draw.randint(0, 12))) for _ in range(100)]
    heard = ["".join(draw.choices("ab \u00e4\u0301\U0001f642", k=draw.randint(0, 12))) for _ in range(100)]
    for known, found in ((said, heard), ([text.split() for text in said], [text.split() for text in heard])):
        assert error_rate(known, found) == (sum(map(distance, known, found)), sum(map(len, known)))
    with pytest.raises(ValueError):
        error_rate(said, heard[:-1])
