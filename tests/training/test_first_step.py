"""The first step that is logged after a resume is compared with what was recorded of it before."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.training.core.snapshots import Snapshots
from toys import Buffers, Killed, StopAt, new_run, train, with_callbacks


def recorded(run: RunDir, change: Any = lambda row: None, *, stage: type[Buffers] = Buffers, **options: Any) -> None:
    """Kill a run after step 5's log line, the newest snapshot being of step 4, and change what it recorded."""
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(stage, Killed(7)), run, snapshot_interval=4, log_interval=1, **options)
    rows = list(Journal(run.metrics).rows())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    change(next(row for row in rows if row["step"] == 5))
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in Snapshots(run.snapshots, {}).found()[3:]:  # that of the epoch's end at step 6
        shutil.rmtree(path)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if " as recorded before" in line]


def test_a_step_done_again_comes_out_as_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Buffers)
    recorded(run)
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    assert logged(caplog) == ["step 5 came out as recorded before: bit for bit"]


@pytest.mark.parametrize("factor, word", [(1 + 1e-12, "last bits"), (1.01, "more than rounding")])
def test_a_step_that_comes_out_otherwise_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: float,
                                                     word: str) -> None:
    """With the figure, both values, and what the receipt knows; training goes on."""
    run = new_run(tmp_path, Buffers)
    recorded(run, lambda row: row.update({"train/loss": row["train/loss"] * factor}))
    row = next(row for row in Journal(run.metrics).rows() if row["step"] == 5)
    _, ending = train(with_callbacks(Buffers, StopAt(-1)), run, resume=True, keep_last_n_snapshots=2)
    again = next(row for row in Journal(run.metrics).rows() if row["step"] == 5)
    (line,) = logged(caplog)
    assert line.startswith(f"step 5 did not come out as recorded before: train/loss {row['train/loss']!r} then, "
                           f"{again['train/loss']!r} now. ")
    assert word in line and "keep_last_n_snapshots: 0 -> 2" in line and ending.state == "finished"


def test_lines_at_another_interval_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Buffers)
    recorded(run)
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True, log_interval=2)
    assert logged(caplog) == []


# -- a stage that declares an operator without a deterministic form --------------------------------------------------


class Declared(Buffers):
    nondeterministic = {"cpu": "max_unpool1d"}


WHY = "max_unpool1d has no deterministic form on cpu"


@pytest.fixture
def strict_afterwards() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.usefixtures("strict_afterwards")
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-12])
def test_a_step_done_again_is_reported_to_rounding(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                  factor: float) -> None:
    """Also where its figures are the same: weights that they do not show may differ in last bits."""
    caplog.set_level("INFO")
    run = new_run(tmp_path, Buffers)
    recorded(run, lambda row: row.update({"train/loss": row["train/loss"] * factor}))
    train(with_callbacks(Declared, StopAt(-1)), run, resume=True)
    assert logged(caplog) == [f"step 5 came out as recorded before: to rounding ({WHY})"]
    assert f"  to_rounding: not recorded -> {WHY}" in caplog.messages


@pytest.mark.usefixtures("strict_afterwards")
def test_more_than_rounding_is_a_warning_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path, Buffers)
    recorded(run, lambda row: row.update({"train/loss": row["train/loss"] * 1.01}), stage=Declared)
    train(with_callbacks(Declared, StopAt(-1)), run, resume=True)
    [line] = logged(caplog)
    assert "did not come out as recorded before" in line and "more than rounding" in line
    assert f"{WHY}, and such differences grow with each step" in line
