"""Which rows of a data set can be trained on, whatever is in them: the others are refused, each with its reason.

What a modality adds: its `Limits`, why a row cannot be used, and what its `Report` counts.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from stoker import files
from stoker.config import UserError, printable
from stoker.data.decode_cache import Found
from stoker.data.text.labels import aligned_length

if TYPE_CHECKING:
    from stoker.data.pictures.table import Picture
    from stoker.data.speech.recordings import Utterance

log = logging.getLogger(__name__)

NAMED = 20  # refused rows that the log names
Refused = tuple[str, str, str]  # split, file, why: its kind before the colon
R = TypeVar("R", bound="Utterance | Picture")
F = TypeVar("F", bound=Found)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model can be given. 0 or None: whatever there is. `labels` gives the label ids of a text; with them, rows
    that CTC cannot align are refused."""

    max_text_length: int = 0
    labelled: bool = True  # a row without a text is of no use
    labels: Callable[[str], Sequence[int]] | None = None

    def long_text(self, text: str) -> str:
        """Why a text is too long, or ''."""
        if self.max_text_length and len(text) > self.max_text_length:
            return f"long text: {len(text):,} characters, --max_text_length is {self.max_text_length:,}"
        return ""

    def unaligned(self, text: str, count: float, what: str) -> str:
        """Why CTC cannot put a text into `count` frames or columns, or ''; infinity: into any text's."""
        if not self.labels or math.isinf(count):
            return ""
        labels = self.labels(text)
        needed = aligned_length(labels)
        return f"not alignable: {count} {what}, its {len(labels)} labels need {needed}" if count < needed else ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the check found, by split; `shared` counts what training has in common with validation and test."""

    rows: Mapping[str, int]  # read
    used: Mapping[str, int]
    refused: list[Refused]
    shared: Mapping[str, int]

    def lines(self) -> Iterator[str]:
        """For a person, without the refused rows."""
        for split, count in self.rows.items():
            yield f"{split}: {self.used[split]:,} of {count:,} rows{self.about(split)}"
        reasons = Counter(why.partition(":")[0] for _, _, why in self.refused)
        yield "refused: " + (", ".join(f"{count:,} {why}" for why, count in reasons.most_common()) or "none")
        yield "Overlap of training and validation: " + ", ".join(f"{n:,} {what}" for what, n in self.shared.items())
        yield from self.further()

    def about(self, split: str) -> str:
        """What follows the count of a split's rows: ", 3 speakers"."""
        return ""

    def further(self) -> Iterator[str]:
        yield from ()

    def warnings(self) -> Iterator[str]:
        yield from ()

    def named(self) -> list[Refused]:
        """The rows that are reported one by one."""
        return self.refused


def sift(splits: Mapping[str, Sequence[R]], facts: Callable[[str, R], F], problem: Callable[[str, R, F], str],
         what: str) -> tuple[dict[str, list[R]], list[Refused]]:
    """The rows that can be used, and those that cannot. Training leaves out what is in another split as well, whatever
    its file is called. `problem` says why a row of a split is of no use, or ''; `what` is a row: "picture"."""
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
    """How many values, such as speakers, training has in common with the other splits; '' is none."""
    train = {key(row) for row in used.get("train", [])} - {""}
    return len(train & {key(row) for split, rows in used.items() if split != "train" for row in rows})


def duplicates(refused: Sequence[Refused]) -> int:
    return sum(why.startswith("duplicate") for *_, why in refused)


def log_report(report: Report, what: str) -> None:
    """Raises UserError where a split has no rows that can be used; `what` they are: "pictures"."""
    for line in report.lines():
        log.info("Data check: %s", line)
    for line in report.warnings():
        log.warning("%s", line)
    for split, path, why in report.named()[:NAMED]:
        log.warning("%s %s: %s", split, printable(path), why)
    if (more := len(report.named()) - NAMED) > 0:
        log.warning("and %s more: %s names all", f"{more:,}", files.hint("data check"))
    for split, count in report.used.items():
        if not count:
            example = next((f": {path} is {why}" for at, path, why in report.refused if at == split), "")
            raise UserError(f"none of the {report.rows[split]:,} {split} {what} can be used{example}")
