"""Which pictures can be trained on: every file is decoded once, and what cannot be used is named with the reason."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stoker.data import check
from stoker.data.pictures.resized import Fact, Frame, Resized, resize
from stoker.data.pictures.table import Picture, Splits

SHOWN = 12  # labels
PERCENTILES = (50, 90, 99)
SURROGATES = re.compile("[\ud800-\udfff]")  # in JSON, and in names of another encoding: no tokenizer takes them


@dataclass(frozen=True)
class Limits(check.Limits):
    """What a model can be given. `lines`: texts are what is written there, in a single line. `columns` gives how many
    columns a model's output has for so many pixels of width: rows that CTC cannot align are refused. `stretch` is by
    how much narrower a row may come in training."""

    min_side: int = 0  # pixels, of the file
    max_side: int = 0
    max_width: int = 0  # pixels, in a frame of this height:
    height: int = 0
    lines: bool = False
    columns: Callable[[int], int] | None = None
    stretch: float = 0.0


@dataclass(frozen=True)
class Written:
    """What stands on lines that are used."""

    widths: list[int]  # pixels, at the height that a model is given
    lengths: list[int]  # characters
    characters: int  # that differ, in training
    unseen: Mapping[str, int]  # characters of the other splits that training never has, and how often

    def lines(self) -> Iterator[str]:
        for what, values in (("widths in pixels at the model's height", self.widths),
                             ("lengths in characters", self.lengths)):
            if values:
                yield f"{what}: {percentiles(values)}"
        yield f"characters in training: {self.characters:,}; in validation alone: " + (", ".join(
            f"{character!r} {count:,}" for character, count in self.unseen.items()) or "none")


@dataclass(frozen=True)
class Report(check.Report):
    """What the check found."""

    labels: Mapping[str, Counter[str]]  # of what is used, by split
    texts: Mapping[str, int]  # that differ
    groups: Mapping[str, int]
    repeated: int  # files whose picture another file has too, all splits together
    sizes: list[tuple[int, int]]  # height and width of every readable file
    written: Written | None = None

    def about(self, split: str) -> str:
        labels = self.labels[split]
        largest = labels.most_common(1)[0] if labels else ("", 0)
        of_labels = (f", {len(labels):,} labels, the largest {largest[0]} ({largest[1] / labels.total():.1%})"
                     if labels else "")
        groups = f", {self.groups[split]:,} groups" if self.groups[split] else ""
        return f"{groups}, {self.texts[split]:,} different texts{of_labels}"

    def further(self) -> Iterator[str]:
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

    def warnings(self) -> Iterator[str]:
        if self.written and self.written.unseen:
            yield (f"{len(self.written.unseen):,} characters of the validation texts never occur in training: they "
                   "cannot be read")


def percentiles(values: Sequence[int]) -> str:
    ordered = sorted(values)
    between = ", ".join(f"{p} % {ordered[math.ceil(p / 100 * len(ordered)) - 1]:,}" for p in PERCENTILES)
    return f"smallest {ordered[0]:,}, {between}, largest {ordered[-1]:,}"


def checked(splits: Splits, frames: Mapping[str, Frame], *, keep: bool, limits: Limits = Limits(),
            evaluated_split: str = "") -> tuple[Splits, dict[str, Resized], Report]:
    """As `examined`, reported in the log. Raises UserError where nothing is left of a split: see `check.log_report`."""
    found = examined(splits, frames, keep=keep, limits=limits)
    check.log_report(found[-1], "pictures", evaluated_split)
    return found


def examined(splits: Splits, frames: Mapping[str, Frame], *, keep: bool,
             limits: Limits = Limits()) -> tuple[Splits, dict[str, Resized], Report]:
    """The rows that can be used; by split the files, decoded; and what was found.

    A picture of another split is left out of the training data, whatever its file is called. `keep` keeps the pictures
    on disk in the `frames` of their splits (`data.resized`).
    """
    resized = {split: resize([each.path for each in rows], frames[split] if keep else None)
               for split, rows in splits.items()}
    evaluating = replace(limits, columns=None)  # what is hard to align is evaluated
    used, refused = check.sift(
        splits, lambda split, row: resized[split].facts[row.path],
        lambda split, row, fact: problem(row, fact, limits if split == "train" else evaluating), "picture")
    readable = {fact.path: fact for found in resized.values() for fact in found.facts.values() if not fact.problem}
    return used, resized, Report(
        rows={split: len(rows) for split, rows in splits.items()},
        used={split: len(rows) for split, rows in used.items()}, refused=refused,
        shared={"groups": check.overlap(used, lambda row: row.group),
                "texts": check.overlap(used, lambda row: row.text), "pictures": check.duplicates(refused)},
        labels={split: Counter(each.label for each in rows if each.label) for split, rows in used.items()},
        texts={split: len({each.text for each in rows}) for split, rows in used.items()},
        groups={split: len({each.group for each in rows} - {""}) for split, rows in used.items()},
        repeated=len(readable) - len({fact.digest for fact in readable.values()}),
        sizes=[(fact.height, fact.width) for fact in readable.values()],
        written=_written(used, resized, limits) if limits.lines else None)


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
    if long := limits.long_text(row.text):
        return long
    if limits.lines and len(lines := row.text.splitlines()) > 1:
        return f"several lines: {len(lines)} are written there, cut the picture into them"
    columns = limits.columns(math.floor(width / (1 + limits.stretch))) if limits.columns else math.inf
    return limits.unaligned(row.text, columns, "columns")


def _written(used: Splits, resized: Mapping[str, Resized], limits: Limits) -> Written:
    facts = [(row, resized[split].facts[row.path]) for split, rows in used.items() for row in rows]
    known = set[str]().union(*(row.text for row in used.get("train", [])))
    evaluated = Counter("".join(row.text for split, rows in used.items() if split != "train" for row in rows))
    frame = Frame(limits.height)
    return Written(widths=[frame.width_of(fact.height, fact.width) for _, fact in facts] if limits.height else [],
                   lengths=[len(row.text) for row, _ in facts], characters=len(known),
                   unseen={each: count for each, count in evaluated.most_common() if each not in known})
