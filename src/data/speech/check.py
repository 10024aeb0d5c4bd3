"""Which recordings can be trained on: every file is decoded once, and what cannot be used is named with the reason."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stoker import files
from stoker.config import UserError, printable
from stoker.data.speech import audio
from stoker.data.speech.decoded import Decoded, Fact, decode
from stoker.data.speech.recordings import Splits, Utterance
from stoker.data.text.labels import aligned_length

log = logging.getLogger(__name__)

SILENT = 1e-3  # of full scale, -60 dB: no sample is louder
CLIPPED = 1e-3  # share of the samples at full scale from which on it is heard
FRAMES_A_SECOND = 100  # of the log-mel spectrogram
TALKER_FRAMES_A_SECOND = 12.5
NAMED = 20  # refused rows that the log names
PERCENTILES = (50, 90, 95, 99, 100)
STEP = 64  # a limit is recommended in these


@dataclass(frozen=True)
class Limits:
    """What a model can be given. 0 or None: whatever there is.

    `labels` gives a text's label ids and `frames` the frames that a model's output has for so many samples: with both,
    rows that CTC cannot align are refused. `speed` is how much faster a row may be played in training.
    """

    max_mel_length: int = 0
    max_text_length: int = 0
    labels: Callable[[str], Sequence[int]] | None = None
    frames: Callable[[int], int] | None = None
    speed: float = 0.0
    labelled: bool = True  # a row without a text is of no use


@dataclass(frozen=True)
class Report:
    """What the check found; `refused` and `clipped` are (split, file, why)."""

    rows: Mapping[str, int]  # read, by split
    seconds: Mapping[str, float]  # of what is used
    speakers: Mapping[str, int]
    used: Mapping[str, int]
    refused: list[tuple[str, str, str]]
    clipped: list[tuple[str, str, str]]
    shared: Mapping[str, int]  # speakers, texts, recordings that are in training and in what is judged by
    lengths: list[float]  # seconds of every readable row, sorted

    def lines(self) -> Iterator[str]:
        """For a person, without the refused rows."""
        for split, count in self.rows.items():
            speakers = f", {self.speakers[split]:,} speakers" if self.speakers[split] else ""
            yield (f"{split}: {self.used[split]:,} of {count:,} rows, {self.seconds[split] / 3600:.2f} h{speakers}")
        reasons = Counter(why.partition(":")[0] for _, _, why in self.refused)
        yield "refused: " + (", ".join(f"{count:,} {why}" for why, count in reasons.most_common()) or "none")
        if self.clipped:
            yield f"clipped, but used: {len(self.clipped):,}"
        yield "in training and judged by as well: " + ", ".join(f"{n:,} {what}" for what, n in self.shared.items())
        if self.lengths:
            yield mel_lengths(self.lengths)


def checked(splits: Splits, *, keep: bool, limits: Limits = Limits()) -> tuple[Splits, Decoded, Report]:
    """As `examined`, told in the log. Raises UserError where nothing is left of a split."""
    used, decoded, report = examined(splits, keep=keep, limits=limits)
    _log(report)
    for split, rows in used.items():
        if not rows:
            why = next((f": {path} is {why}" for at, path, why in report.refused if at == split), "")
            raise UserError(f"none of the {len(splits[split]):,} {split} recordings can be used{why}")
    return used, decoded, report


def examined(splits: Splits, *, keep: bool, limits: Limits = Limits()) -> tuple[Splits, Decoded, Report]:
    """The rows that can be used, their seconds as decoded; the decoded files; and what was found.

    A recording that is judged by is left out of the training data. `keep` keeps the samples on disk (`data.decoded`).
    """
    decoded = decode([each.path for rows in splits.values() for each in rows], keep=keep)
    judged = {decoded.facts[each.path].digest for split, rows in splits.items() if split != "train" for each in rows}
    used: Splits = {}
    refused, clipped = [], []
    for split, rows in splits.items():
        used[split] = []
        for row in rows:
            fact = decoded.facts[row.path]
            needed = limits if split == "train" else replace(limits, frames=None)  # what is hard to hear is judged by
            if why := problem(row, fact, needed) or _leak(split, fact, judged):
                refused.append((split, row.path, why))
                continue
            if fact.clipped > CLIPPED:
                clipped.append((split, row.path, f"clipped: {fact.clipped:.1%} of its samples"))
            used[split].append(replace(row, seconds=fact.seconds))
    return used, decoded, _report(splits, used, decoded, refused, clipped)


def problem(row: Utterance, fact: Fact, limits: Limits) -> str:
    """Why a row is of no use, its kind before the colon; or ''."""
    if fact.problem:
        return f"unreadable: {fact.problem}"
    if fact.peak < SILENT:
        return f"silent: its loudest sample is at {fact.peak:.1e} of full scale"
    if limits.labelled and not row.text:
        return "unlabelled: no text, or none but punctuation"
    if limits.max_mel_length and mel_length(fact.seconds) > limits.max_mel_length:
        return (f"too long: {fact.seconds:.1f} s are {mel_length(fact.seconds):,} frames, --max_mel_length is "
                f"{limits.max_mel_length:,}")
    if limits.max_text_length and len(row.text) > limits.max_text_length:
        return f"long text: {len(row.text):,} characters, --max_text_length is {limits.max_text_length:,}"
    return _unaligned(row, fact, limits)


def head_frames(samples: int, downsample_time: int, each: int) -> int:
    """Of an output that has `each` frames to every `downsample_time` of the spectrogram, begun ones too."""
    return -(-(samples // (audio.RATE // FRAMES_A_SECOND)) // downsample_time) * each


def mel_length(seconds: float) -> int:
    return math.ceil(seconds * FRAMES_A_SECOND)


def mel_lengths(seconds: Sequence[float], rate: float = FRAMES_A_SECOND) -> str:
    """Percentiles of lengths in frames, and the limit that they recommend. `seconds` is sorted."""
    at = {p: math.ceil(seconds[math.ceil(p / 100 * len(seconds)) - 1] * rate) for p in PERCENTILES}
    told = ", ".join(f"{'longest' if p == 100 else f'{p} %'} {frames:,}" for p, frames in at.items())
    most, nearly = (STEP * math.ceil(at[p] / STEP) for p in (100, 99))
    instead = f"; {nearly} takes 99 %" if nearly < most else ""
    return f"lengths in frames of 1/{rate:g} s: {told}; --max_mel_length {most} takes all{instead}"


def _unaligned(row: Utterance, fact: Fact, limits: Limits) -> str:
    if limits.labels is None or limits.frames is None:
        return ""
    labels = limits.labels(row.text)
    needed = aligned_length(labels)
    frames = limits.frames(int(fact.count / (1 + limits.speed)))
    return f"not alignable: {frames} frames, its {len(labels)} labels need {needed}" if frames < needed else ""


def _leak(split: str, fact: Fact, judged: set[str]) -> str:
    return "judged by: the same recording is in another split" if split == "train" and fact.digest in judged else ""


def _report(splits: Splits, used: Splits, decoded: Decoded, refused: list[tuple[str, str, str]],
            clipped: list[tuple[str, str, str]]) -> Report:
    train = used.get("train", [])
    others = [each for split, rows in used.items() if split != "train" for each in rows]
    shared = {
        "speakers": len({u.speaker for u in train if u.speaker} & {u.speaker for u in others}),
        "texts": len({u.text for u in train if u.text} & {u.text for u in others}),
        "recordings": sum(why.startswith("judged by") for _, _, why in refused),
    }
    return Report(rows={split: len(rows) for split, rows in splits.items()},
                  seconds={split: sum(u.seconds for u in rows) for split, rows in used.items()},
                  speakers={split: len({u.speaker for u in rows} - {""}) for split, rows in used.items()},
                  used={split: len(rows) for split, rows in used.items()}, refused=refused, clipped=clipped,
                  shared=shared, lengths=sorted(fact.count / audio.RATE for fact in decoded.facts.values()
                                                if not fact.problem))


def _log(report: Report) -> None:
    for line in report.lines():
        log.info("Data check: %s", line)
    for split, path, why in [*report.refused, *report.clipped][:NAMED]:
        log.warning("%s %s: %s", split, printable(path), why)
    if (more := len(report.refused) + len(report.clipped) - NAMED) > 0:
        log.warning("and %s more: %s names all", f"{more:,}", files.hint("data check"))
