"""The measurement that kills a training at chosen instants: a short one, and that it sees what differs."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.daemon.rundir import PROJECT, RunDir

KILLS, STEPS = 2, 30

Measure = Callable[[], tuple[int, str]]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Measure:
    """Exit code and what is printed; in this process, which has torch already, as its trainings do not."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    argv = ["--kills", str(KILLS), "--seed", "3", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kill_matrix.py", *argv])

    import kill_matrix

    options = kill_matrix.OPTIONS
    monkeypatch.setattr(kill_matrix, "STEPS", STEPS)
    monkeypatch.setattr(kill_matrix, "OPTIONS", [*options[:(at := options.index("--max_steps") + 1)], str(STEPS),
                                                 *options[at + 1:]])

    def call() -> tuple[int, str]:
        return kill_matrix.main(), capsys.readouterr().out

    return call


def test_two_kills_change_nothing_and_what_differs_is_named(tmp_path: Path, measure: Measure) -> None:
    code, out = measure()
    assert code == 0, out
    rows = re.findall(r"^(\S.*?) {2,}(\d*) {2,}(\d+) {2,}", out, re.MULTILINE)
    points, kills = ({place: int(row[i] or 0) for place, *row in rows} for i in (0, 1))
    assert kills.pop("all") == KILLS == sum(kills.values()) and kills["birth of the run"] == 1
    assert all(points[place] for place in ("save", "commit", "rotation", "metrics", "training step", "evaluation"))
    assert out.splitlines()[-1] == f"seed 3000: {KILLS} kills, same"

    run = RunDir(tmp_path / "lm_seed_3/course_00/killed/run")
    *before, last = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(before) + json.dumps({**json.loads(last), "train/loss": 0.0}) + "\n")
    (run.snapshots / ".snapshot_step_00000025").mkdir()
    code, out = measure()  # nothing is left to be trained
    assert code == 1, out
    assert f"seed 3000: {KILLS} kills, 2 DIFFERENCES\n    left behind: run/snapshots/.snapshot_step_00000025\n" in out
    assert re.search(r"^    /metrics\[\d+\]/train/loss: \d\.\d+ alone, 0.0 killed$", out, re.MULTILINE)
