"""What --confusions adds to an evaluation: what was confused, where, and by whom; as values and as text."""

from collections.abc import Iterator, Sequence
from typing import Any

from stoker.config import UserError, printable
from stoker.daemon.table import figure
from stoker.training.core import confusions
from stoker.training.core.confusions import Row
from stoker.training.core.evaluation import Scores
from stoker.training.core.stage import Stage
from stoker.training.core.transcripts import Terms, Transcribing

SHOWN = 10  # words, substitutions and groups, each
MARK = "\u2423"  # stands for a blank, which could not be seen


def found(stage: Stage, done: Sequence[Scores]) -> list[dict[str, Any]]:
    """A report for each error rate of the stage's texts. Raises UserError where `score` returns no texts with it."""
    assert isinstance(stage, Transcribing)
    return [{"metric": rate, **confusions.report(_rows(stage, rate, done))} for rate in stage.text_rates]


def _rows(stage: Any, rate: str, done: Sequence[Scores]) -> list[Row]:
    scores = next((each for each in done if rate in each.pairs), None)
    if scores is None:
        raise UserError(f"stage {stage.name} names {rate} in text_rates, but score() does not return it as "
                        "error_rates(references, texts)")
    assert scores.rows
    sources = [source for split in scores.rows.splits for source in stage.text_sources(split)]
    numbers = scores.rows.numbers
    errors, totals = (values.tolist() for values in scores.rates[rate])
    return [Row(sources[number], *row) for number, *row in zip(
        numbers, scores.rows.groups or [""] * len(numbers), errors, totals, scores.pairs[rate], strict=True)]


# -- as text --------------------------------------------------------------------------------------------------------


def text(reports: Sequence[dict[str, Any]], terms: Terms) -> Iterator[str]:
    """The reports as lines; rows, groups and lengths by the first rate only."""
    for report in reports:
        yield from _units(report, terms)
    yield from _worst(reports[0], terms)
    yield from _parts(reports[0], terms)


def _units(report: dict[str, Any], terms: Terms) -> Iterator[str]:
    units, said, right = report["unit"], terms.reference, f"{terms.hypothesis} right"
    one = units.removesuffix("s")
    by = {unit["text"]: unit for unit in report["by_unit"]}
    yield ""
    yield (f"{units.capitalize()}: {report['total']:,} {said}, {report['right']:,} {right}, {report['replaced']:,} "
           f"replaced, {report['left_out']:,} left out; {report['inserted']:,} inserted")
    wrong = [[unit["text"], unit["total"], unit["right"], unit["replaced"], unit["left_out"]]
             for unit in _most(report["by_unit"], "replaced", "left_out")]
    yield from _table(f"{units.capitalize()} most often wrong", [one, said, right, "replaced", "left out"], wrong)
    pairs = [[each["reference"], each["hypothesis"], each["count"], by[each["reference"]]["total"],
              by[each["reference"]]["right"]] for each in report["substitutions"][:SHOWN]]
    yield from _table(f"{units.capitalize()} most often replaced", [said, f"-> {terms.hypothesis}", "times",
                                                                    f"{said} in all", right], pairs)
    for kind, name in (("left_out", "left out"), ("inserted", "inserted")):
        rows = [[unit["text"], unit[kind], unit["total"], unit["right"]]
                for unit in _most(report["by_unit"], kind)]
        yield from _table(f"{units.capitalize()} most often {name}", [one, "times", f"{said} in all", right], rows)


def _most(units: Sequence[dict[str, Any]], *errors: str) -> list[dict[str, Any]]:
    """Those with the most errors of these kinds."""
    def count(unit: dict[str, Any]) -> int:
        return sum(unit[kind] for kind in errors)

    return [unit for unit in sorted(units, key=count, reverse=True)[:SHOWN] if count(unit)]


def _worst(report: dict[str, Any], terms: Terms) -> Iterator[str]:
    if not report["worst"]:
        return
    width = max(len(terms.reference), len(terms.hypothesis))
    yield ""
    yield f"{terms.rows.capitalize()} with the highest error rates"
    for row in report["worst"]:
        group = f", {terms.group} {row['group']}" if row["group"] else ""
        yield printable(f"  {row['path']}: {_percent(row)} (errors {row['errors']:,}, {report['unit']} "
                        f"{row['total']:,}), {row['length']:.4g} {terms.length}{group}")
        yield printable(f"    {terms.reference:{width}}  {row['reference']}")
        yield printable(f"    {terms.hypothesis:{width}}  {row['hypothesis']}")


def _parts(report: dict[str, Any], terms: Terms) -> Iterator[str]:
    """The error rates of groups and of ranges of lengths."""
    columns, unit = [terms.rows, report["unit"], "errors", "error rate"], report["unit"].removesuffix("s")
    groups, lengths = ([[_name(row), row["rows"], row["total"], row["errors"], _percent(row)] for row in rows]
                       for rows in (report["by_group"], report["by_length"]))
    more = f", the {SHOWN} highest of {len(groups):,}" if len(groups) > SHOWN else ""
    yield from _table(f"{unit.capitalize()} error rates by {terms.group}{more}", [terms.group, *columns],
                      groups[:SHOWN])
    yield from _table(f"{unit.capitalize()} error rates by length", [terms.length, *columns], lengths)


def _name(row: dict[str, Any]) -> str:
    return f"{row['from']:g} to {row['below']:g}" if "from" in row else row["group"] or "(not known)"


def _percent(row: dict[str, Any]) -> str:
    return figure("wer", row["rate"])


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """An empty line, a title and a table, whose numbers stand to the right; nothing where there are no rows."""
    if not rows:
        return
    lines = [list(header), *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = [isinstance(cell, str) and not cell.endswith("%") for cell in rows[0]]
    yield ""
    yield title
    for line in lines:
        yield "  " + "  ".join(cell.ljust(width) if to_left else cell.rjust(width)
                               for cell, width, to_left in zip(line, widths, left)).rstrip()


def _shown(cell: Any) -> str:
    if not isinstance(cell, str):
        return f"{cell:,}"
    if cell == " ":
        return MARK
    return ascii(cell)[1:-1] if cell.isspace() else printable(cell)
