"""Subtitles as files say them, read back by a parser of the formats' grammar."""

import random
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from stoker.inference.subtitles import FEW, LINE, LONGEST, PAUSE, Subtitle, subtitles, written


def spoken(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Words one after the other, some without a moment between them, some after long pauses."""
    words, at = [], draw.uniform(0, 5000)
    for number in range(count):
        start = at + draw.choice([0, 0.02, 0.1, 0.3, draw.uniform(0, 3)])
        at = start + draw.choice([0.02, draw.uniform(0.05, 0.9)])
        words.append({"word": f"{number}" + "x" * draw.randint(0, 12), "start": round(start, 3), "end": round(at, 3)})
    return words


def parsed(text: str, kind: str) -> Iterator[tuple[float, float, list[str]]]:
    """By the grammar: a number from 1 on (SubRip) or none (WebVTT), times, lines, an empty line."""
    mark = {"srt": ",", "vtt": r"\."}[kind]
    clock = rf"(\d\d+):([0-5]\d):([0-5]\d{mark}\d{{3}})"
    if kind == "vtt":
        assert text.startswith("WEBVTT\n\n")
        text = text.removeprefix("WEBVTT\n\n")
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    for number, block in enumerate(blocks, 1):
        lines = block.split("\n")
        assert kind == "vtt" or lines.pop(0) == str(number)
        times = re.fullmatch(f"{clock} --> {clock}", lines.pop(0))
        assert times
        h, m, s, h2, m2, s2 = times.groups()
        yield (int(h) * 3600 + int(m) * 60 + float(s.replace(",", ".")),
               int(h2) * 3600 + int(m2) * 60 + float(s2.replace(",", ".")), lines)


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_each_word_is_in_one_subtitle_that_can_be_read(kind: str) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        words = spoken(draw, draw.randint(0, 80))
        found = list(parsed("".join(f"{line}\n" for line in written(subtitles(words), kind)), kind))
        shown = [(word, start, end) for start, end, lines in found for word in " ".join(lines).split()]
        assert [word for word, _, _ in shown] == [each["word"] for each in words]
        for (_, start, end), each in zip(shown, words):
            assert start <= each["start"] + 1e-6 and each["end"] <= end + 1e-6
        for start, end, lines in found:
            assert start < end <= start + LONGEST + 1e-6 and 1 <= len(lines) <= 2
            assert max(map(len, lines)) <= LINE
        assert all(end <= following for (_, end, _), (following, _, _) in pairwise(found))
        for before, after in pairwise(words):  # a long pause parts them
            if after["start"] - before["end"] >= PAUSE:
                assert not any(lines_have(lines, before) and lines_have(lines, after) for _, _, lines in found)


def lines_have(lines: list[str], word: dict[str, Any]) -> bool:
    return word["word"] in " ".join(lines).split()


def cost(words: list[dict[str, Any]], ends: tuple[int, ...]) -> float:
    """By the definition, of subtitles that end before these words."""
    gaps = [min(PAUSE, words[end]["start"] - words[end - 1]["end"]) for end in ends[:-1]]
    return FEW * len(ends) - sum(gaps) + PAUSE * len(gaps)


def test_no_other_cut_has_longer_pauses() -> None:
    """Against every way to part ten words."""
    for seed in range(12):
        words = spoken(random.Random(seed), 10)
        best = float("inf")
        for mask in range(2**9):
            ends = (*(place + 1 for place in range(9) if mask >> place & 1), 10)
            parts = [words[a:b] for a, b in zip((0, *ends), ends)]
            if all(allowed(part) for part in parts):
                best = min(best, cost(words, ends))
        counts = [len(" ".join(each.lines).split()) for each in subtitles(words)]
        chosen = tuple(sum(counts[:place + 1]) for place in range(len(counts)))
        assert cost(words, chosen) == pytest.approx(best)


def allowed(words: list[dict[str, Any]]) -> bool:
    spelled = [each["word"] for each in words]
    fits = len(" ".join(spelled)) <= LINE or any(
        max(len(" ".join(spelled[:k])), len(" ".join(spelled[k:]))) <= LINE for k in range(1, len(spelled)))
    return fits and words[-1]["end"] - words[0]["start"] <= LONGEST and all(
        b["start"] - a["end"] < PAUSE for a, b in pairwise(words)) or len(words) == 1


def word(text: str, start: float, end: float) -> dict[str, Any]:
    return {"word": text, "start": start, "end": end, "confidence": 1.0}


def test_subtitles_as_they_are_written() -> None:
    """By hand: the one word stands for a second, or until the next one; hours are counted."""
    found = subtitles([word("yes", 0.5, 0.75), word("no", 2.0, 2.25), word("a<b", 3 * 3600 + 61.5, 3 * 3600 + 70.0)])
    assert found == [Subtitle(0.5, 1.5, ("yes",)), Subtitle(2.0, 3.0, ("no",)),
                     Subtitle(10861.5, 10868.5, ("a<b",))]
    assert list(written(found[1:], "srt")) == ["1", "00:00:02,000 --> 00:00:03,000", "no", "",
                                               "2", "03:01:01,500 --> 03:01:08,500", "a<b", ""]
    assert list(written(found[2:], "vtt")) == ["WEBVTT", "", "03:01:01.500 --> 03:01:08.500", "a&lt;b", ""]
    assert list(written([], "srt")) == [] and list(written([], "vtt")) == ["WEBVTT", ""]


def test_a_word_longer_than_a_line_stands_alone() -> None:
    found = subtitles([word("a", 0, 0.1), word("x" * 50, 0.2, 0.4), word("b", 0.5, 0.6)])
    assert [each.lines for each in found] == [("a",), ("x" * 50,), ("b",)]


def test_lines_are_of_like_length() -> None:
    words = [word("abcd", place / 4, place / 4 + 0.2) for place in range(10)]
    assert [each.lines for each in subtitles(words)] == [("abcd abcd abcd abcd abcd",) * 2]
