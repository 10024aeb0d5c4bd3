"""Whole starts: a stop while torch is imported, a refused resume, the end of a finished run."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from desk import SMALL, TINY, unless_typed
from in_process import trained
from stoker.config import Parsed, UserError
from stoker.daemon import logs
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import PROJECT, RunDir
from stoker.training.assembly import launch
from stoker.training.assembly.job import Job
from stoker.training.core import optim
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch
from stoker.training.core.signals import Signals
from stoker.training.trainer import Trainer
from toys import QUICK, Regression, new_run, session, train, with_callbacks

LITTLE = [*SMALL, *unless_typed(TINY, SMALL)]


LATE = """
import sys, time
from pathlib import Path

class Late:  # halfway through torch/__init__.py
    def find_spec(name, path=None, target=None):
        if name == "torch._C":
            Path("importing").touch()
            try:
                while not Path("go on").exists():
                    time.sleep(0.01)
            except BaseException:  # as some imports do
                pass

sys.meta_path.insert(0, Late)
"""


def test_a_stop_while_torch_is_imported(tmp_path: Path, text: Path) -> None:
    """It is answered, and obeyed when the import is over: within, it could abort the process."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    command = [sys.executable, "-P", str(PROJECT / "src/training/train_lm.py"), "--dataset", "text.txt", *SMALL,
               "--result_dir", "runs", "--run_name", "early"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONPATH": f"{tmp_path}:{PROJECT / 'run/python'}"})
    run = RunDir(tmp_path / "runs/early")
    while not (tmp_path / "importing").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    while "SIGTERM: stopping" not in run.latest_log.read_text():
        time.sleep(0.01)
    (tmp_path / "go on").touch()
    assert process.wait(60) == 0
    assert run.state() == "stopped" and run.status().reason == "SIGTERM received before training began"
    log = run.latest_log.read_text()
    assert "SIGTERM received before training began" in log and "Device:" not in log


def test_a_refused_resume_leaves_no_trace(tmp_path: Path, text: Path) -> None:
    stopped = trained("lm", "--dataset", "text.txt", *LITTLE, "--max_minutes", "0.00001", "--result_dir", "runs",
                      "--run_name", "mine")
    assert stopped.returncode == 0, stopped.stderr
    run = RunDir(tmp_path / "runs/mine")
    before = run.status(), sorted(path.name for path in (run.path / "logs").iterdir()), run.latest_log.resolve()
    assert before[0].state == "stopped"
    text.write_text("two three four\n" * 100 + text.read_text())
    again = trained("lm", "--resume", str(run.path), "--yes")
    assert again.returncode == 2 and again.stderr.count("the data are not those of the interrupted run") == 1
    assert "Traceback" not in again.stderr and "ERROR" not in again.stderr
    after = run.status(), sorted(path.name for path in (run.path / "logs").iterdir()), run.latest_log.resolve()
    statuses = [replace(status, heartbeat=0, awake=0) for status, *_ in (before, after)]
    assert statuses[0] == statuses[1] and after[1:] == before[1:]


def test_a_refused_run_leaves_the_link_to_the_one_before(tmp_path: Path) -> None:
    first = new_run(tmp_path, Regression)
    train(Regression, first)
    other = new_run(tmp_path, Regression)
    with pytest.raises(UserError, match="is of another model"):
        sitting_with_other_shape(other, first)
    other.remove()
    assert (tmp_path / "regression_toy").resolve() == first.path


def sitting_with_other_shape(run: RunDir, first: RunDir) -> None:
    sitting = session(Regression, run, width=6, snapshot=first.snapshots / "snapshot_epoch_0003")
    with run.lock():
        trainer, snapshot = sitting.prepare()
        trainer.fit(snapshot)


def test_a_finished_run_is_extended_and_runs_its_command_at_each_end(tmp_path: Path, text: Path) -> None:
    """The learning rate follows the longer plan; the command that was asked for runs at each end."""
    often = ["--log_interval", "1", "--warmup_steps", "0"]
    start = ["--dataset", "text.txt", *unless_typed(LITTLE, often), *often, "--result_dir", "runs", "--run_name",
             "mine", "--on_end", 'echo "$STOKER_STATE: $STOKER_REASON" >> ends; false']
    run = RunDir(tmp_path / "runs/mine")
    assert trained("lm", *start).returncode == 0 and run.state() == "finished"
    assert (tmp_path / "ends").read_text() == "finished: all steps done\n"
    assert "--on_end" in run.latest_log.read_text() and "exit code 1" in run.latest_log.read_text()
    assert "Trained for " in run.latest_log.read_text() and "; the estimate was " in run.latest_log.read_text()
    assert trained("lm", "--resume", "runs/mine", "--yes").returncode == 2
    assert trained("lm", "--resume", "runs/mine", "--yes", "--extend_steps", "6").returncode == 0
    rates = {row["step"]: row["lr"] for row in Journal(run.metrics).rows()}
    assert sorted(rates) == list(range(1, 16)) and run.status().of == 15
    assert rates[9] == pytest.approx(3e-4 * optim.rate(8, 9, warmup=0, min_ratio=0.1, schedule="cosine"))
    assert rates[10] == pytest.approx(3e-4 * optim.rate(9, 15, warmup=0, min_ratio=0.1, schedule="cosine"))
    assert "planned for 9 steps, now for 15" in run.latest_log.read_text()
    assert json.loads(run.config_file.read_text())["extend_steps"] == 0


def test_what_fails_before_a_resumed_run_trains_leaves_its_state(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run stays finished where its stage raises while it prepares the data."""
    class Broken(Regression):
        def prepare(self) -> None:
            raise ValueError("the data are damaged")

    run = new_run(tmp_path, Regression)
    train(Regression, run, **QUICK)
    before = replace(run.status(), state="finished", reason="all steps done")
    run.write_status(before)
    job = Job(Broken, Parsed(Broken.Config(**QUICK), frozenset(QUICK), ""), run)
    monkeypatch.setattr(launch, "_faults", lambda descriptor: nullcontext())
    monkeypatch.setattr(launch.logs, "to_file", lambda path, background: None)
    with Signals() as signals, run.lock():
        assert launch._locked(job, run, signals, False, None, None) == launch.FAILED
    after = run.status()
    assert replace(after, heartbeat=before.heartbeat, awake=before.awake) == before


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_what_fails_in_training_leaves_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception],
                                               caplog: pytest.LogCaptureFixture) -> None:
    """Also a user's mistake that shows itself only then: hours of training are not deleted for it."""
    class Fails(Callback):
        order = ACT

        def on_batch(self, trainer: Trainer, batch: Batch) -> None:
            if trainer.step == 4:
                raise error("a picture of the batch cannot be read")

    caplog.set_level(logging.INFO)
    run, stage = new_run(tmp_path, Regression), with_callbacks(Regression, Fails())
    job = Job(stage, Parsed(stage.Config(**QUICK), frozenset(QUICK), ""))
    monkeypatch.setattr(launch, "_faults", lambda descriptor: nullcontext())
    with ExitStack() as files, Signals() as signals, run.lock():
        monkeypatch.setattr(launch.logs, "to_file", lambda path, background: files.enter_context(logs.also_in(path)))
        assert launch._locked(job, run, signals, False, None, None) == launch.FAILED
    assert run.state() == "failed" and run.status().step == 4
    known = error is UserError  # its message says everything
    assert run.status().reason == f"{'' if known else 'RuntimeError: '}a picture of the batch cannot be read"
    lines = run.latest_log.read_text().splitlines()
    assert any("Traceback" in line for line in lines) != known and all(line.startswith("[20") for line in lines)
    assert (run.snapshots / "snapshot_epoch_0001" / "manifest.json").exists()
