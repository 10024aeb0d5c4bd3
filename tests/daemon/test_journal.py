"""Each step stands in the journal once, whatever happened while it was written."""

import json
import math
from pathlib import Path

import pytest

from daemon.journal import Journal


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
