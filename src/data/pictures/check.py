"""Which pictures can be trained on: every file is decoded once, and what cannot be used is named with the reason."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stoker import files
from stoker.config import UserError, printable
from stoker.data.pictures.resized import Fact, Frame, Resized, resize
from stoker.data.pictures.table import Picture, Splits
from stoker.data.text.labels import aligned_length

log = logging.getLogger(__name__)

NAMED = 20  # refused rows that the log names
SHOWN = 12  # labels
PERCENTILES = (50, 90, 99)
SURROGATES = re.compile("[\ud800-\udfff]")  # in JSON, and in names of another encoding: no tokenizer takes them


@dataclass(frozen=True)
class Limits:
    """What a model can be given. 0 or None: whatever there is.

    `lines`: texts are what is written there, in a single line. `labels` gives a text's label ids and `columns` how many
    columns a model's output has for so many pixels of width: with both, rows that CTC cannot align are refused.
    `stretch` is by how much narrower a row may come in training.
    """

    min_side: int = 0  # pixels, of the file
    max_side: int = 0
    max_width: int = 0  # pixels, in a frame of this height:
    height: int = 0
    max_text_length: int = 0
    labelled: bool = True  # a row without a text is of no use
    lines: bool = False
    labels: Callable[[str], Sequence[int]] | None = None
    columns: Callable[[int], int] | None = None
    stretch: float = 0.0


@dataclass(frozen=True)
class Written:
    """What stands on lines that are used."""

    widths: list[int]  # pixels, at the height that a model is given
    lengths: list[int]  # characters
    characters: int  # that differ, in training
    unseen: Mapping[str, int]  # characters that are judged by and never trained on, and how often

    def lines(self) -> Iterator[str]:
        for what, values in (("widths in pixels at the model's height", self.widths),
                             ("lengths in characters", self.lengths)):
            if values:
                yield f"{what}: {percentiles(values)}"
        yield f"characters to train on: {self.characters:,}; judged by alone: " + (", ".join(
            f"{character!r} {count:,}" for character, count in self.unseen.items()) or "none")


@dataclass(frozen=True)
class Report:
    """What the check found; `refused` are (split, file, why)."""

    rows: Mapping[str, int]  # read, by split
    used: Mapping[str, int]
    labels: Mapping[str, Counter[str]]  # of what is used, by split
    texts: Mapping[str, int]  # that differ
    groups: Mapping[str, int]
    refused: list[tuple[str, str, str]]
    shared: Mapping[str, int]  # groups, texts, pictures that are in training and in what is judged by
    repeated: int  # files whose picture another file has too, all splits together
    sizes: list[tuple[int, int]]  # height and width of every readable file
    written: Written | None = None

    def lines(self) -> Iterator[str]:
        """For a person, without the refused rows."""
        for split, count in self.rows.items():
            labels = self.labels[split]
            largest = labels.most_common(1)[0] if labels else ("", 0)
            told = (f", {len(labels):,} labels, the largest {largest[0]} ({largest[1] / labels.total():.1%})"
                    if labels else "")
            groups = f", {self.groups[split]:,} groups" if self.groups[split] else ""
            yield (f"{split}: {self.used[split]:,} of {count:,} rows{groups}, {self.texts[split]:,} different texts"
                   f"{told}")
        reasons = Counter(why.partition(":")[0] for _, _, why in self.refused)
        yield "refused: " + (", ".join(f"{count:,} {why}" for why, count in reasons.most_common()) or "none")
        yield "in training and judged by as well: " + ", ".join(f"{n:,} {what}" for what, n in self.shared.items())
        if self.repeated:
            yield f"files with the same picture as another: {self.repeated:,}"
        for number, what in enumerate(("heights", "widths")):
            if self.sizes:
                yield f"{what} in pixels: {percentiles([size[number] for size in self.sizes])}"
        if self.written:
            yield from self.written.lines()
        total = sum(self.labels.values(), Counter[str]())
        if total:
            more = f" and {len(total) - SHOWN:,} more" if len(total) > SHOWN else ""
            yield "labels: " + ", ".join(f"{label} {count:,}" for label, count in total.most_common(SHOWN)) + more


def percentiles(values: Sequence[int]) -> str:
    ordered = sorted(values)
    between = ", ".join(f"{p} % {ordered[math.ceil(p / 100 * len(ordered)) - 1]:,}" for p in PERCENTILES)
    return f"smallest {ordered[0]:,}, {between}, largest {ordered[-1]:,}"


def checked(splits: Splits, frames: Mapping[str, Frame], *, keep: bool,
            limits: Limits = Limits()) -> tuple[Splits, dict[str, Resized], Report]:
    """As `examined`, told in the log. Raises UserError where nothing is left of a split."""
    used, resized, report = examined(splits, frames, keep=keep, limits=limits)
    _log(report)
    for split, rows in used.items():
        if not rows:
            why = next((f": {path} is {why}" for at, path, why in report.refused if at == split), "")
            raise UserError(f"none of the {len(splits[split]):,} {split} pictures can be used{why}")
    return used, resized, report


def examined(splits: Splits, frames: Mapping[str, Frame], *, keep: bool,
             limits: Limits = Limits()) -> tuple[Splits, dict[str, Resized], Report]:
    """The rows that can be used; by split the files, decoded; and what was found.

    A picture that is judged by is left out of the training data, whatever its file is called. `keep` keeps the pictures
    on disk in the `frames` of their splits (`data.resized`).
    """
    resized = {split: resize([each.path for each in rows], frames[split] if keep else None)
               for split, rows in splits.items()}
    judged = {fact.digest for split, found in resized.items() if split != "train" for fact in found.facts.values()}
    judging = replace(limits, labels=None)  # what is hard to align is judged by
    used: Splits = {}
    refused = []
    for split, rows in splits.items():
        used[split] = []
        for row in rows:
            fact = resized[split].facts[row.path]
            if why := problem(row, fact, limits if split == "train" else judging) or _leak(split, fact, judged):
                refused.append((split, row.path, why))
            else:
                used[split].append(row)
    report = _report(splits, used, resized, refused)
    return used, resized, replace(report, written=_written(used, resized, limits)) if limits.lines else report


def problem(row: Picture, fact: Fact, limits: Limits) -> str:
    """Why a row is of no use, its kind before the colon; or ''."""
    sides = f"{fact.width:,} x {fact.height:,} pixels"
    if fact.problem:
        return f"unreadable: {fact.problem}"
    if SURROGATES.search(row.text + row.label):
        return "not Unicode: its text or label has half of a surrogate pair, or bytes of another encoding"
    if not fact.spread:
        return f"blank: all its {sides} are the same"
    if limits.labelled and not row.text:
        return ("without text: it takes a column `text`, or a.txt beside a.png" if limits.lines else
                "unlabelled: no text and no label")
    if min(fact.height, fact.width) < limits.min_side:
        return f"too small: {sides}, the shorter side must have {limits.min_side:,}"
    if limits.max_side and max(fact.height, fact.width) > limits.max_side:
        return f"too large: {sides}, the longer side may have {limits.max_side:,}"
    width = Frame(limits.height).width_of(fact.height, fact.width)
    if limits.max_width and width > limits.max_width:
        return f"too wide: {width:,} pixels at a height of {limits.height:,}, --max_width is {limits.max_width:,}"
    if limits.max_text_length and len(row.text) > limits.max_text_length:
        return f"long text: {len(row.text):,} characters, --max_text_length is {limits.max_text_length:,}"
    if limits.lines and len(lines := row.text.splitlines()) > 1:
        return f"several lines: {len(lines)} are written there, cut the picture into them"
    return _unaligned(row, width, limits)


def _unaligned(row: Picture, width: int, limits: Limits) -> str:
    if limits.labels is None or limits.columns is None:
        return ""
    labels = limits.labels(row.text)
    columns, needed = limits.columns(math.floor(width / (1 + limits.stretch))), aligned_length(labels)
    return f"not alignable: {columns} columns, its {len(labels)} labels need {needed}" if columns < needed else ""


def _leak(split: str, fact: Fact, judged: set[str]) -> str:
    return "judged by: the same picture is in another split" if split == "train" and fact.digest in judged else ""


def _report(splits: Splits, used: Splits, resized: Mapping[str, Resized],
            refused: list[tuple[str, str, str]]) -> Report:
    train = used.get("train", [])
    others = [each for split, rows in used.items() if split != "train" for each in rows]
    readable = {fact.path: fact for found in resized.values() for fact in found.facts.values() if not fact.problem}
    shared = {
        "groups": len({each.group for each in train if each.group} & {each.group for each in others}),
        "texts": len({each.text for each in train} & {each.text for each in others}),
        "pictures": sum(why.startswith("judged by") for _, _, why in refused),
    }
    return Report(rows={split: len(rows) for split, rows in splits.items()},
                  used={split: len(rows) for split, rows in used.items()},
                  labels={split: Counter(each.label for each in rows if each.label) for split, rows in used.items()},
                  texts={split: len({each.text for each in rows}) for split, rows in used.items()},
                  groups={split: len({each.group for each in rows} - {""}) for split, rows in used.items()},
                  refused=refused, shared=shared,
                  repeated=len(readable) - len({fact.digest for fact in readable.values()}),
                  sizes=[(fact.height, fact.width) for fact in readable.values()])


def _written(used: Splits, resized: Mapping[str, Resized], limits: Limits) -> Written:
    facts = [(row, resized[split].facts[row.path]) for split, rows in used.items() for row in rows]
    known = set[str]().union(*(row.text for row in used.get("train", [])))
    judged = Counter("".join(row.text for split, rows in used.items() if split != "train" for row in rows))
    frame = Frame(limits.height)
    return Written(widths=[frame.width_of(fact.height, fact.width) for _, fact in facts] if limits.height else [],
                   lengths=[len(row.text) for row, _ in facts], characters=len(known),
                   unseen={each: count for each, count in judged.most_common() if each not in known})


def _log(report: Report) -> None:
    for line in report.lines():
        log.info("Data check: %s", line)
    if report.written and report.written.unseen:
        log.warning("%s characters are judged by and never trained on: they cannot be read",
                    f"{len(report.written.unseen):,}")
    for split, path, why in report.refused[:NAMED]:
        log.warning("%s %s: %s", split, printable(path), why)
    if (more := len(report.refused) - NAMED) > 0:
        log.warning("and %s more: %s names all", f"{more:,}", files.hint("data check"))
