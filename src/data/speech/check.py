"""The check of recordings: every file is decoded once, and those that cannot be used are listed with the reason."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stoker.data import check
from stoker.data.speech import audio
from stoker.data.speech.decoded import Decoded, Fact, decode
from stoker.data.speech.recordings import Splits, Utterance

OFFSET = 0.1  # of the loudness: a constant offset that is reported
FRAMES_A_SECOND = 100  # of the log-mel spectrogram
TALKER_FRAMES_A_SECOND = 12.5
PERCENTILES = (50, 90, 95, 99, 100)
STEP = 64  # a limit is recommended in these


@dataclass(frozen=True)
class Limits(check.Limits):
    """Which recordings a model accepts. `frames` returns the number of output frames for a number of samples; with it,
    rows that CTC cannot align are refused. `speed`: how much faster training may play a row, as a share."""

    max_mel_length: int = 0
    frames: Callable[[int], int] | None = None
    speed: float = 0.0


@dataclass(frozen=True)
class Report(check.Report):
    """What the check found; `doubtful` are (split, file, why) of rows that are used."""

    seconds: Mapping[str, float]  # of the used rows
    speakers: Mapping[str, int]
    doubtful: list[check.Refused]
    lengths: list[float]  # seconds of every readable row, sorted

    def about(self, split: str) -> str:
        speakers = f", {self.speakers[split]:,} speakers" if self.speakers[split] else ""
        return f", {self.seconds[split] / 3600:.2f} h{speakers}"

    def further(self) -> Iterator[str]:
        if self.doubtful:
            kinds = Counter(why.partition(":")[0] for _, _, why in self.doubtful)
            yield "used, but doubtful: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        if self.lengths:
            yield mel_lengths(self.lengths)

    def listed(self) -> list[check.Refused]:
        return [*self.refused, *self.doubtful]


def checked(splits: Splits, *, keep: bool, limits: Limits = Limits(),
            evaluated_split: str = "") -> tuple[Splits, Decoded, Report]:
    """As `examined`, reported in the log. Raises UserError where nothing is left of a split: see `check.log_report`."""
    found = examined(splits, keep=keep, limits=limits)
    check.log_report(found[-1], "recordings", evaluated_split)
    return found


def examined(splits: Splits, *, keep: bool, limits: Limits = Limits()) -> tuple[Splits, Decoded, Report]:
    """The rows that can be used, their seconds as decoded; the decoded files; and what was found.

    A recording of another split is left out of the training data. `keep` keeps the samples on disk (`data.decoded`).
    """
    decoded = decode([each.path for rows in splits.values() for each in rows], keep=keep)
    evaluating = replace(limits, frames=None)  # what is hard to align is evaluated
    found, refused = check.sift(
        splits, lambda split, row: decoded.facts[row.path],
        lambda split, row, fact: problem(row, fact, limits if split == "train" else evaluating), "recording")
    used = {split: [replace(row, seconds=decoded.facts[row.path].seconds) for row in rows]
            for split, rows in found.items()}
    doubtful = [(split, row.path, why) for split, rows in used.items() for row in rows
                for why in doubts(decoded.facts[row.path])]
    return used, decoded, Report(
        rows={split: len(rows) for split, rows in splits.items()},
        used={split: len(rows) for split, rows in used.items()}, refused=refused, doubtful=doubtful,
        shared={"speakers": check.overlap(used, lambda row: row.speaker),
                "texts": check.overlap(used, lambda row: row.text), "recordings": check.duplicates(refused)},
        seconds={split: sum(row.seconds for row in rows) for split, rows in used.items()},
        speakers={split: len({row.speaker for row in rows} - {""}) for split, rows in used.items()},
        lengths=sorted(fact.seconds for fact in decoded.facts.values() if not fact.problem))


def problem(row: Utterance, fact: Fact, limits: Limits) -> str:
    """Why a row is of no use, its kind before the colon; or ''."""
    if fact.problem:
        return f"unreadable: {fact.problem}"
    if fact.peak < audio.SILENT:
        return f"silent: its loudest sample is at {fact.peak:.1e} of full scale"
    if limits.labelled and not row.text:
        return "unlabelled: no text, or none but punctuation"
    if limits.max_mel_length and mel_length(fact.seconds) > limits.max_mel_length:
        return (f"too long: {fact.seconds:.1f} s are {mel_length(fact.seconds):,} frames, --max_mel_length is "
                f"{limits.max_mel_length:,}")
    frames = limits.frames(int(fact.count / (1 + limits.speed))) if limits.frames else math.inf
    return limits.long_text(row.text) or limits.unaligned(row.text, frames, "frames")


def doubts(fact: Fact) -> Iterator[str]:
    """What is odd about a row that can be used, its kind before the colon."""
    if fact.clipped > audio.CLIPPED:
        yield f"clipped: {fact.clipped:.1%} of its samples"
    if abs(fact.offset) > OFFSET * fact.rms:
        yield f"offset: its mean of {fact.offset:.1e} of full scale was subtracted"
    if fact.seconds < audio.SHORT:
        yield f"short: {fact.seconds:.2f} s"


def head_frames(samples: int, downsample_time: int, each: int) -> int:
    """Of an output that has `each` frames to every `downsample_time` of the spectrogram, begun ones too."""
    return -(-(samples // (audio.RATE // FRAMES_A_SECOND)) // downsample_time) * each


def mel_length(seconds: float) -> int:
    return math.ceil(seconds * FRAMES_A_SECOND)


def mel_lengths(seconds: Sequence[float], rate: float = FRAMES_A_SECOND) -> str:
    """Percentiles of lengths in frames, and the limit that they recommend. `seconds` is sorted."""
    at = {p: math.ceil(seconds[math.ceil(p / 100 * len(seconds)) - 1] * rate) for p in PERCENTILES}
    shown = ", ".join(f"{'longest' if p == 100 else f'{p} %'} {frames:,}" for p, frames in at.items())
    most, nearly = (STEP * math.ceil(at[p] / STEP) for p in (100, 99))
    instead = f"; {nearly} takes 99 %" if nearly < most else ""
    return f"lengths in frames of 1/{rate:g} s: {shown}; --max_mel_length {most} takes all{instead}"
