"""Words with their times -> subtitles, as SubRip (.srt) or WebVTT (.vtt, https://www.w3.org/TR/webvtt1/).

A subtitle has up to two lines of 42 characters and stands for up to seven seconds, as is common in television (BBC,
Netflix); it ends at pauses where that is possible.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LINE = 42  # characters
LONGEST, SHORTEST = 7.0, 1.0  # seconds that a subtitle stands; a short one stands longer where the next one permits
PAUSE = 1.0  # seconds: no subtitle has words before and after such a pause
FEW = 1.0  # what one more subtitle costs, in seconds of pause
FORMATS = ("srt", "vtt")

Word = Mapping[str, Any]  # {"word", "start", "end", ...}, times in seconds


@dataclass(frozen=True)
class Subtitle:
    start: float
    end: float
    lines: tuple[str, ...]


def subtitles(words: Sequence[Word]) -> list[Subtitle]:
    """Each word in exactly one, in order; none begins before the last has ended. A single word that is too long, in
    letters or in seconds, is a subtitle of its own; it stands for LONGEST at most.

    Of all ways to part the words, the one with the longest pauses between subtitles, less FEW for each subtitle."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n words: the cost, and where the last subtitle begins
    for end in range(1, len(words) + 1):
        pause = min(PAUSE, words[end]["start"] - words[end - 1]["end"]) if end < len(words) else PAUSE
        begins = _begins(words, end)
        best.append(min((best[begin][0] + FEW + PAUSE - pause, begin) for begin in begins))
    bounds = [len(words)]
    while bounds[-1]:
        bounds.append(best[bounds[-1]][1])
    bounds.reverse()
    return [_subtitle(words[begin:end], words[end]["start"] if end < len(words) else float("inf"))
            for begin, end in zip(bounds, bounds[1:])]


def written(found: Sequence[Subtitle], kind: str) -> Iterator[str]:
    """The lines of a file, of kind "srt" or "vtt"."""
    if kind == "vtt":
        yield from ("WEBVTT", "")
    for number, each in enumerate(found, 1):
        if kind == "srt":
            yield str(number)
        mark = "," if kind == "srt" else "."
        yield f"{_clock(each.start, mark)} --> {_clock(each.end, mark)}"
        yield from map(_escaped, each.lines) if kind == "vtt" else each.lines
        yield ""


def _begins(words: Sequence[Word], end: int) -> Iterator[int]:
    """Where a subtitle may begin that ends before word `end`."""
    yield end - 1
    for begin in range(end - 2, -1, -1):
        is_long = words[end - 1]["end"] - words[begin]["start"] > LONGEST
        is_parted = words[begin + 1]["start"] - words[begin]["end"] >= PAUSE
        if is_long or is_parted or not _lines(words[begin:end]):
            return
        yield begin


def _lines(words: Sequence[Word]) -> tuple[str, ...]:
    """The words as one line or as two of like length; () where they do not fit."""
    spelled = [str(each["word"]) for each in words]
    if len(text := " ".join(spelled)) <= LINE:
        return (text,)
    parted = [(" ".join(spelled[:place]), " ".join(spelled[place:])) for place in range(1, len(spelled))]
    return min((pair for pair in parted if max(map(len, pair)) <= LINE), key=lambda pair: max(map(len, pair)),
               default=())


def _subtitle(words: Sequence[Word], following: float) -> Subtitle:
    start = words[0]["start"]
    end = min(max(words[-1]["end"], start + SHORTEST), start + LONGEST, following)
    return Subtitle(start, end, _lines(words) or (str(words[0]["word"]),))


def _clock(seconds: float, mark: str) -> str:
    minutes, thousandths = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{thousandths // 1000:02d}{mark}{thousandths % 1000:03d}"


def _escaped(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
