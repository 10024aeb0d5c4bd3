"""Runs with --supervise as their user sees them, and data sets that kill or hang what reads them; real processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from desk import ENDLESS, Desk, living, until
from stoker.daemon import process
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import PROJECT, RunDir
from toys import QUICK, Regression, new_run, train

WORKERS = ["--num_workers", "2"]


def supervised(desk: Desk, ran: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """The PIDs that a start printed: of the trainer and of the supervisor."""
    trainer = desk.begun(ran)
    found = re.search(rf"^PID     {trainer} \(supervisor (\d+)\)$", ran.stdout, re.MULTILINE)
    assert found, ran.stdout
    desk.started.append(int(found[1]))
    return trainer, int(found[1])


def test_a_supervised_run(desk: Desk) -> None:
    """It is killed and goes on by itself; stopped, it stays so; its trainer goes on where the supervisor is killed. No
    loader worker outlives its trainer."""
    first, supervisor = supervised(desk, desk.train(*ENDLESS, *WORKERS, "--supervise", "--run_name", "watched"))
    row = desk.run("watched")
    assert (row["pid"], row["supervisor"], row["phase"]) == (first, supervisor, "training")
    family = until(lambda: len(found := process.family(first)) == 3 and found)
    os.kill(first, signal.SIGKILL)
    until(lambda: not any(living(pid) for pid in family), 5)
    second = until(lambda: (row := desk.run("watched"))["state"] == "training" and row["pid"] != first and row["pid"])
    assert desk.run("watched")["last_death"].endswith("SIGKILL, by whom is not known")
    assert re.search(rf"process {first} died at step \d+ \(training\): SIGKILL", desk.call("logs.sh", "watched").stdout)

    family = process.family(second)
    ran = desk.call("stop.sh", str(supervisor))
    assert ran.returncode == 0 and re.match(r"watched: stopped at step \d+ of 1000000: SIGTERM received\n", ran.stdout)
    assert not any(living(pid) for pid in [supervisor, *family])

    third, supervisor = supervised(desk, desk.call("resume.sh", "watched", "--yes"))  # its config says so
    family = until(lambda: len(found := process.family(third)) == 3 and found)
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: desk.run("watched")["unwatched"])
    before = desk.run("watched")["step"]
    until(lambda: desk.run("watched")["step"] > before)
    os.kill(third, signal.SIGKILL)
    until(lambda: not any(living(pid) for pid in family), 5)
    until(lambda: desk.run("watched")["state"] == "died", 5)  # its threads end later


def test_a_start_that_fails_is_reported_at_once(desk: Desk) -> None:
    """And not tried again and again: the text is too short, which shows itself when it is read."""
    (desk.folder / "short.txt").write_text("no\n")
    ran = desk.train("--dataset", str(desk.folder / "short.txt"), "--supervise", "--run_name", "short")
    assert ran.returncode == 2 and not (desk.results / "short").exists()
    assert ran.stderr.startswith("run_train_lm.sh: ") or "train_lm.py: " in ran.stderr


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from stoker.daemon import pulse
from toys import Points, Regression
from stoker.training.assembly import launch

pulse.PATIENCE = pulse.Patience(unknown=60, least=3, times_usual=0, times_longest=0)
HERE = Path(__file__).parent
metrics, done = HERE / "runs/mine/metrics.jsonl", HERE / "done"


def does_not_come_back():
    time.sleep(600)


class Troubled(Points):
    def __getitem__(self, index):
        if not done.exists() and metrics.exists() and len(metrics.read_text().splitlines()) > 4:
            done.touch()
            {trouble}
        return super().__getitem__(index)


class Stage(Regression):
    def dataset(self, split):
        return Troubled(self.cfg.rows if split == "train" else 7, self.cfg.width, 0 if split == "train" else 1000)


launch.main(Stage)
"""
STEPS = 60


@pytest.mark.parametrize("workers, trouble, cause", [
    (0, "does_not_come_back()", "stalled: no progress for"),
    pytest.param(1, "does_not_come_back()", "stalled: no progress for", marks=pytest.mark.slow),
    pytest.param(1, "os.kill(os.getpid(), signal.SIGKILL)", "RuntimeError: DataLoader worker", marks=pytest.mark.slow)],
    ids=["main", "worker", "dead"])
def test_a_data_set_that_hangs_or_kills_its_reader(tmp_path: Path, workers: int, trouble: str, cause: str) -> None:
    """The trouble passes, so the run comes to its end, with the figures of one that had none."""
    (tmp_path / "train_regression.py").write_text(PROGRAM.format(trouble=trouble))
    options = QUICK | {"max_steps": STEPS, "num_workers": workers, "eval_interval": 50, "snapshot_interval": 20,
                       "keep_last_n_snapshots": 3}
    flags = [word for name, value in options.items() for word in
             ([f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", str(value)])]
    ended = subprocess.run([sys.executable, "-P", str(tmp_path / "train_regression.py"), *flags, "--supervise",
                            "--no_compile", "--result_dir", str(tmp_path / "runs"), "--run_name", "mine"],
                           env=os.environ | {"PYTHONPATH": f"{PROJECT / 'run/python'}:{PROJECT / 'tests'}"}, text=True,
                           capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
    run = RunDir(tmp_path / "runs/mine")
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in run.deaths.read_text().splitlines()]
    assert [row["cause"].startswith(cause) for row in rows] == [True] and rows[0]["restarted"], rows
    logs = "".join(path.read_text() for path in (run.path / "logs").glob("train_*.log"))
    assert ("in does_not_come_back" in logs) == (trouble == "does_not_come_back()")
    alone = new_run(tmp_path / "alone", Regression)
    train(Regression, alone, **options)
    assert list(Journal(run.metrics).rows()) == list(Journal(alone.metrics).rows())
