"""The first step that is logged after a resume is compared with what was recorded of it before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.training.core.snapshots import Snapshots
from toys import Buffers, Killed, StopAt, new_run, train, with_callbacks


def recorded(run: RunDir, change: Any = lambda row: None, **options: Any) -> None:
    """Kill a run after step 5's log line, the newest snapshot being of step 4, and change what it recorded."""
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Buffers, Killed(7)), run, snapshot_interval=4, log_interval=1, **options)
    rows = list(Journal(run.metrics).rows())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    change(next(row for row in rows if row["step"] == 5))
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in Snapshots(run.snapshots, {}).found()[3:]:  # that of the epoch's end at step 6
        shutil.rmtree(path)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if " as recorded before" in line]


def test_a_step_done_again_comes_out_as_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Buffers)
    recorded(run)
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    assert told(caplog) == ["step 5 came out as recorded before: bit for bit"]


@pytest.mark.parametrize("factor, word", [(1 + 1e-12, "last bits"), (1.01, "more than rounding")])
def test_a_step_that_comes_out_otherwise_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: float,
                                                 word: str) -> None:
    """With the figure, both values, and what the receipt knows; training goes on."""
    run = new_run(tmp_path, Buffers)
    recorded(run, lambda row: row.update({"train/loss": row["train/loss"] * factor}))
    row = next(row for row in Journal(run.metrics).rows() if row["step"] == 5)
    _, ending = train(with_callbacks(Buffers, StopAt(-1)), run, resume=True, keep_last_n_snapshots=2)
    again = next(row for row in Journal(run.metrics).rows() if row["step"] == 5)
    (line,) = told(caplog)
    assert line.startswith(f"step 5 did not come out as recorded before: train/loss {row['train/loss']!r} then, "
                           f"{again['train/loss']!r} now. ")
    assert word in line and "keep_last_n_snapshots: 0 -> 2" in line and ending.state == "finished"


def test_lines_at_another_interval_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Buffers)
    recorded(run)
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True, log_interval=2)
    assert told(caplog) == []
