"""The check of a data set's rows, for sound and pictures: rows that cannot be used are refused, each with its reason.

Each modality derives `Limits` and `Report`, and says why one of its rows cannot be used.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from stoker import files
from stoker.config import UserError, printable
from stoker.data import made
from stoker.data.decode_cache import Found
from stoker.data.text.labels import aligned_length

if TYPE_CHECKING:
    from stoker.data.pictures.table import Picture
    from stoker.data.speech.recordings import Utterance

log = logging.getLogger(__name__)

LOGGED = 20  # refused rows that the log lists
Refused = tuple[str, str, str]  # split, file, reason, as "long text: 3,000 characters": counted by the words before ":"
R = TypeVar("R", bound="Utterance | Picture")
F = TypeVar("F", bound=Found)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which rows a model accepts; 0 or None: no limit. `labels` returns the label ids of a text; with it, rows that CTC
    cannot align are refused."""

    max_text_length: int = 0
    labelled: bool = True  # rows without a text are refused
    labels: Callable[[str], Sequence[int]] | None = None

    def long_text(self, text: str) -> str:
        """Why a text is too long, or ''."""
        if self.max_text_length and len(text) > self.max_text_length:
            return f"long text: {len(text):,} characters, --max_text_length is {self.max_text_length:,}"
        return ""

    def unaligned(self, text: str, count: float, what: str) -> str:
        """Why CTC cannot align a text with `count` frames or columns, or ''. `count` may be infinite: any text fits."""
        if not self.labels or math.isinf(count):
            return ""
        labels = self.labels(text)
        needed = aligned_length(labels)
        return f"not alignable: {count} {what}, its {len(labels)} labels need {needed}" if count < needed else ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the check found, by split. `shared`: number of speakers, texts, ... that training shares with the others."""

    rows: Mapping[str, int]  # rows that were read
    used: Mapping[str, int]  # rows that can be used
    refused: list[Refused]
    shared: Mapping[str, int]

    def lines(self) -> Iterator[str]:
        """The report as lines of text, without the list of refused rows."""
        for split, count in self.rows.items():
            yield f"{split}: {self.used[split]:,} of {count:,} rows{self.about(split)}"
        reasons = Counter(why.partition(":")[0] for _, _, why in self.refused)
        yield "refused: " + (", ".join(f"{count:,} {why}" for why, count in reasons.most_common()) or "none")
        yield "Overlap of training and validation: " + ", ".join(f"{n:,} {what}" for what, n in self.shared.items())
        yield from self.further()

    def about(self, split: str) -> str:
        """Text to add to the line of a split, after its number of rows: ", 3 speakers"."""
        return ""

    def further(self) -> Iterator[str]:
        yield from ()

    def warnings(self) -> Iterator[str]:
        yield from ()

    def listed(self) -> list[Refused]:
        """The rows that are listed one by one."""
        return self.refused


def sift(splits: Mapping[str, Sequence[R]], facts: Callable[[str, R], F], problem: Callable[[str, R, F], str],
         what: str) -> tuple[dict[str, list[R]], list[Refused]]:
    """Separate the rows that can be used from those that cannot. A training row whose content is in another split too
    is refused, whatever the name of its file. `problem` returns why a row of a split cannot be used, or ''; `what` is
    the word for a row in messages: "picture"."""
    evaluated = {facts(split, row).digest for split, rows in splits.items() if split != "train" for row in rows}
    used: dict[str, list[R]] = {}
    refused: list[Refused] = []
    for split, rows in splits.items():
        used[split] = []
        for row in rows:
            fact = facts(split, row)
            why = problem(split, row, fact)
            if not why and split == "train" and fact.digest in evaluated:
                why = f"duplicate: the same {what} is in another split"
            if why:
                refused.append((split, row.path, why))
            else:
                used[split].append(row)
    return used, refused


def overlap(used: Mapping[str, Sequence[R]], key: Callable[[R], str]) -> int:
    """The number of values, such as speakers, that training has in common with the other splits; '' does not count."""
    train = {key(row) for row in used.get("train", [])} - {""}
    return len(train & {key(row) for split, rows in used.items() if split != "train" for row in rows})


def duplicates(refused: Sequence[Refused]) -> int:
    return sum(why.startswith("duplicate") for *_, why in refused)


def log_report(report: Report, what: str, evaluated_split: str = "") -> None:
    """Log a report. `what` is the word for the rows: "pictures". Raises UserError where a split has no usable rows; of
    a model that is only evaluated, where the split `evaluated_split` has none or, if that is "all", no split has any.

    Rows of data that Stoker makes itself are counted, not listed: the user cannot mend them, and the same ones are left
    out every time."""
    for line in report.lines():
        log.info("Data check: %s", line)
    for line in report.warnings():
        log.warning("%s", line)
    listed = [row for row in report.listed() if not made.holds(row[1])]
    for split, path, why in listed[:LOGGED]:
        log.warning("%s %s: %s", split, printable(path), why)
    if (more := len(listed) - LOGGED) > 0:
        log.warning("and %s more: %s lists all", f"{more:,}", files.hint("data check"))
    splits = [*report.used]
    if evaluated_split == "all":
        _require(report, what, splits, "")
    for split in splits:
        if evaluated_split == split:
            _require(report, what, [split], "--split all evaluates those that there are")
        elif not evaluated_split:
            _require(report, what, [split], "give at least two with different texts, or mark them in a column `split`")


def _require(report: Report, what: str, splits: Sequence[str], advice: str) -> None:
    """Raises UserError where none of these splits has a usable row; `advice` is what to do where it has no row."""
    if sum(report.used[split] for split in splits):
        return
    rows, kind = sum(report.rows[split] for split in splits), ""
    if len(splits) == 1:
        kind = "training " if splits[0] == "train" else f"{splits[0]} "
    if not rows:
        raise UserError(f"the data have no {kind}{what}" + (f": {advice}" if advice else ""))
    example = next((f": {path} is {why}" for split, path, why in report.refused if split in splits), "")
    raise UserError(f"none of the {rows:,} {kind}{what} can be used{example}")
