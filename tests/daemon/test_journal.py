"""Each step stands in the journal once, whatever happened while it was written."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.daemon.journal import Extent, Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (5, 10, 15):
        journal.append({"step": step, "train/loss": 1 / step})
    return journal


def steps(journal: Journal) -> list[int]:
    return [row["step"] for row in journal.rows()]


def test_figures_come_back_to_the_last_bit(journal: Journal) -> None:
    assert list(journal.rows()) == [{"step": step, "train/loss": 1 / step} for step in (5, 10, 15)]


def test_none_there_is_none_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.cut(5)
    assert steps(journal) == [] and not journal.path.exists()


@pytest.mark.parametrize("step, left", [(15, [5, 10, 15]), (14, [5, 10]), (10, [5, 10]), (0, [])])
def test_cut_forgets_what_came_after(journal: Journal, step: int, left: list[int]) -> None:
    journal.cut(step)
    assert steps(journal) == left
    journal.append({"step": 20})
    assert steps(journal) == [*left, 20]


@pytest.mark.parametrize("torn", ['{"step": 20, "train/lo', '{"step": 20}', "{", '{"step": 2'])
def test_a_last_line_torn_by_a_kill_is_left_out_and_cut_away(journal: Journal, torn: str) -> None:
    with open(journal.path, "a") as file:
        file.write(torn)
    assert steps(journal) == [5, 10, 15]
    journal.cut(15)
    journal.append({"step": 20})
    assert steps(journal) == [5, 10, 15, 20]


def test_what_json_does_not_know_is_written_as_a_string(journal: Journal) -> None:
    journal.append({"step": 20, "loss": math.nan, "ppl": math.inf, "gap": -math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = journal.path.read_text().splitlines()[-1]
    assert json.loads(line, parse_constant=refuse) == {"step": 20, "loss": "nan", "ppl": "inf", "gap": "-inf"}
    journal.cut(20)
    assert [float(value) for value in list(journal.rows())[-1].values()][2:] == [math.inf, -math.inf]


def test_a_torn_line_does_not_hide_what_comes_after_it(journal: Journal) -> None:
    """Also where nothing is cut at a resume, as in alerts.jsonl."""
    with open(journal.path, "a") as file:
        file.write('{"step": 20, "messa')
    before = list(journal.rows())
    journal.append({"step": 21}, {"step": 22})
    assert list(journal.rows()) == [*before, {"step": 21}, {"step": 22}]


@pytest.mark.parametrize("line", ['{"stfp": 20, "train/loss": 1}', '{"step": "20"}', '{"step": 20.0}', '{"step": true}',
                                  '{"step": null}', '[20]', '20', "[" * 100_000])
def test_a_row_without_a_whole_step_is_a_torn_row(journal: Journal, line: str,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads a row may count on its step; the rows around it stay."""
    lines = journal.path.read_text().splitlines(keepends=True)
    journal.path.write_text("".join([lines[0], f"{line}\n", *lines[1:]]))
    assert steps(journal) == [5, 10, 15]
    assert "metrics.jsonl is torn at" in caplog.text
    journal.cut(15)
    assert journal.path.read_text() == "".join(lines)


# -- what a journal has lost since a snapshot -----------------------------------------------------------------------


STEPS = [1, *range(10, 110, 10)]  # 11 rows


def written(folder: Path) -> tuple[Journal, dict[str, object]]:
    journal, extent = Journal(folder / "metrics.jsonl"), Extent()
    for step in STEPS:
        extent.add(journal.append({"step": step, "train/loss": 1 / step}))
    return journal, extent.state()


def test_the_extent_that_grew_is_that_of_the_whole(tmp_path: Path) -> None:
    journal, state = written(tmp_path)
    content = journal.path.read_bytes()
    assert state == {"rows": 11, "size": len(content), "step": 100, "sha256": hashlib.sha256(content).hexdigest()}
    assert journal.extent().state() == state
    journal.append({"step": 110})
    assert journal.damage(state, STEPS) == ""  # what came later is no damage
    assert Journal(tmp_path / "none.jsonl").extent().state() == Extent().state()


def without(*gone: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: [line for line in lines if json.loads(line)["step"] not in gone]


DAMAGES: dict[str, tuple[Callable[[list[str]], list[str]], str, str]] = {
    "the end": (lambda lines: lines[:4], "lost its rows of steps 40-100 (7 of 11)", "lost 7 of the 11 rows"),
    "the last": (lambda lines: lines[:-1], "lost its row of step 100 (1 of 11)", "lost its row of step 100"),
    "all": (lambda lines: [], "lost its rows of steps 1-100 (11 of 11)", "lost 11 of the 11 rows"),
    "the beginning": (lambda lines: lines[1:], "lost its row of step 1 (1 of 11)", "lost 1 of the 11 rows"),
    "two places": (without(20, 60, 70), "lost its rows of steps 20, 60-70 (3 of 11)", "lost 3 of the 11 rows"),
    "a key": (lambda lines: [line.replace('"step": 50,', '"stfp": 50,') for line in lines],
              "lost its row of step 50 (1 of 11)", "lost 1 of the 11 rows"),
    "a step": (lambda lines: [line.replace('"step": 50,', '"step": 950,') for line in lines],
               "lost its row of step 50 (1 of 11)", "lost 1 of the 11 rows"),
    "a digit": (lambda lines: [line.replace("0.02", "0.03") for line in lines],
                "has other figures up to step 100 than were written (SHA-256 differs)", "has other figures"),
    "a name": (lambda lines: [line.replace("loss", "lpss", 1) for line in lines],
               "has other figures", "has other figures"),
    "order": (lambda lines: lines[::-1], "has other figures", "has other figures"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_was_lost_is_named(tmp_path: Path, what: str) -> None:
    """By the steps, where they are known from elsewhere, else by their number."""
    journal, state = written(tmp_path)
    damage, named, counted = DAMAGES[what]
    journal.path.write_text("".join(damage(journal.path.read_text().splitlines(keepends=True))))
    journal.cut(100)
    assert journal.damage(state, [*STEPS, 110]).startswith(named)
    assert journal.damage(state, []).startswith(counted)


def test_rows_that_were_not_written_are_noticed(tmp_path: Path) -> None:
    journal, state = written(tmp_path)
    journal.append({"step": 50, "train/loss": 0.0})
    journal.cut(100)
    assert journal.damage(state, STEPS) == "has 1 rows more up to step 100 than were written"


def test_any_flipped_bit_of_a_journal_is_noticed(tmp_path: Path) -> None:
    journal, state = written(tmp_path)
    content = journal.path.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        journal.path.write_bytes(flipped)
        assert re.match("lost|has other", journal.damage(state, STEPS)), place
