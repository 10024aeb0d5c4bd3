"""Which words or characters a model confuses, and in which rows: all that `--confusions` reports, as plain values."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from stoker.training.core.error_rates import Pair
from stoker.training.core.transcripts import Source

WORST = 10  # rows


class Row(NamedTuple):
    """A row that was evaluated, with its errors and the length of its reference, both in words or characters."""

    source: Source
    group: str  # "" where it is not known
    errors: int
    total: int
    pair: Pair

    @property
    def rate(self) -> float:
        return self.errors / self.total if self.total else math.inf if self.errors else 0.0


class Edits(NamedTuple):
    """What became of the words or characters of all references, by the word or character."""

    right: Counter[str]
    replaced: Counter[tuple[str, str]]  # reference, hypothesis
    left_out: Counter[str]
    inserted: Counter[str]


def edits(pairs: Iterable[Pair]) -> Edits:
    """Count the edits of an alignment with as few errors as possible (Levenshtein, all costs 1), of each pair by
    itself. Where several alignments have as few, one of them counts."""
    from rapidfuzz.distance import Levenshtein

    found = Edits(Counter(), Counter(), Counter(), Counter())
    for reference, hypothesis in pairs:
        for step in Levenshtein.opcodes(reference, hypothesis):
            before, after = reference[step.src_start:step.src_end], hypothesis[step.dest_start:step.dest_end]
            if step.tag == "equal":
                found.right.update(before)
            elif step.tag == "replace":
                found.replaced.update(zip(before, after, strict=True))
            else:
                found.left_out.update(before)
                found.inserted.update(after)
    return found


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything as values that JSON has: the keys are documented in docs/operations.md."""
    found = edits(row.pair for row in rows)
    words = isinstance(rows[0].pair[0], list)
    units = _by_unit(found)
    sums = {name: sum(unit[name] for unit in units) for name in ("total", "right", "replaced", "left_out", "inserted")}
    errors, total = sum(row.errors for row in rows), sum(row.total for row in rows)
    return {
        "unit": "words" if words else "characters", "errors": errors, "rate": _rate(errors, total), **sums,
        "by_unit": units,
        "substitutions": [{"reference": said, "hypothesis": heard, "count": count}
                          for (said, heard), count in _most(found.replaced)],
        "worst": [_described(row, " " if words else "") for row in _worst(rows)],
        "by_group": _by_group(rows), "by_length": _by_length(rows)}


def _by_unit(found: Edits) -> list[dict[str, Any]]:
    """The counts of each word or character, those with the most errors first."""
    replaced = Counter[str]()
    for (said, _), count in found.replaced.items():
        replaced[said] += count
    names = sorted({*found.right, *replaced, *found.left_out, *found.inserted})
    units = [{"text": name, "total": found.right[name] + replaced[name] + found.left_out[name],
              "right": found.right[name], "replaced": replaced[name], "left_out": found.left_out[name],
              "inserted": found.inserted[name]} for name in names]
    return sorted(units, key=lambda unit: (-unit["replaced"] - unit["left_out"], -unit["inserted"]))


def _most(counts: Counter[Any]) -> list[tuple[Any, int]]:
    """The most frequent first, others in the order of the alphabet."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _worst(rows: Sequence[Row]) -> list[Row]:
    """The rows with the highest error rates; of those with the same rate, the ones with the most errors."""
    return sorted((row for row in rows if row.errors), key=lambda row: (-row.rate, -row.errors))[:WORST]


def _described(row: Row, between: str) -> dict[str, Any]:
    reference, hypothesis = (between.join(text) for text in row.pair)
    return {"path": row.source.path, "group": row.group or None, "length": row.source.length, **_summed([row]),
            "reference": reference, "hypothesis": hypothesis}


def _by_group(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The groups with the highest rates first; empty where no group is known."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    found = [{"group": group or None, "rows": len(own), **_summed(own)} for group, own in groups.items()]
    return sorted(found, key=lambda each: -(each["rate"] or 0)) if any(groups) else []


def _by_length(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By ranges of lengths, from a power of two to below the next."""
    ranges: dict[int, list[Row]] = {}
    for row in rows:
        ranges.setdefault(math.frexp(row.source.length)[1], []).append(row)
    return [{"from": 2.0 ** (power - 1), "below": 2.0 ** power, "rows": len(ranges[power]), **_summed(ranges[power])}
            for power in sorted(ranges)]


def _summed(rows: Sequence[Row]) -> dict[str, Any]:
    errors, total = sum(row.errors for row in rows), sum(row.total for row in rows)
    return {"total": total, "errors": errors, "rate": _rate(errors, total)}


def _rate(errors: int, total: int) -> float | None:
    return errors / total if total else None
