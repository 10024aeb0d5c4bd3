"""A run's life as its user leads it: start, look, stop, go on, kill, with the scripts of run/ and real processes.

A start takes seconds, since it loads torch, so one run goes through many stations.
"""

import json
import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from desk import ENDLESS, ROOT, Desk, living, until

STAMP = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] ")


@dataclass(frozen=True)
class Begun:
    """A run, the trainer that a script has just started for it, and all that the script printed."""

    name: str
    pid: int
    printed: str


def begun(desk: Desk, ran: subprocess.CompletedProcess[str]) -> Begun:
    pid = desk.begun(ran)
    return Begun(next(line for line in ran.stdout.splitlines() if line.startswith("Run ")).split()[1], pid, ran.stdout)


def log_of(desk: Desk, name: str) -> str:
    return (desk.results / name / "logs" / "latest.log").read_text()


def went_on_from(desk: Desk, name: str) -> int:
    found = re.search(r"Resuming from .*, step (\d+)\n", log_of(desk, name))
    assert found
    return int(found.group(1))


# -- one run, from its start to its last stop -----------------------------------------------------------------------


def test_the_life_of_a_run(desk: Desk) -> None:
    """One test, since its parts follow each other: tests that run side by side may come in another order."""
    running = begun(desk, desk.train(*ENDLESS, "--run_name", "life"))
    for look in (the_pid_printed_is_the_trainer_s, it_has_left_the_terminal, a_hang_up_does_not_end_it,
                 it_is_seen_from_another_folder, its_log_is_found,
                 a_second_trainer_is_refused_and_the_first_unharmed):
        look(desk, running)

    kill_saves_and_stops(desk, stop_by_kill(desk, running))
    for try_ in (without_a_terminal_going_on_wants_a_yes, what_would_be_another_run_is_refused,
                 stopping_what_does_not_run_says_so):
        try_(desk)

    again, step = resume(desk)
    it_goes_on_where_it_was(desk, again, step)
    kill_9(desk, again)
    kill_9_is_seen(desk, again)
    it_goes_on_from_its_last_snapshot_and_stops_by_pid(desk)


# -- it runs --------------------------------------------------------------------------------------------------------


def the_pid_printed_is_the_trainer_s(desk: Desk, running: Begun) -> None:
    command = Path(f"/proc/{running.pid}/cmdline").read_text().split("\0")
    assert command[2].endswith("src/training/train_lm.py") and str(desk.corpus) in command
    for line in ("./run/logs.sh life -f", "./run/ps.sh", "./run/stop.sh life", "./run/board.sh life", "Epoch 1/"):
        assert line in running.printed


def it_has_left_the_terminal(desk: Desk, running: Begun) -> None:
    assert os.getsid(running.pid) == running.pid
    files = [os.readlink(f"/proc/{running.pid}/fd/{number}") for number in (0, 1, 2)]
    assert files[0] == "/dev/null" and "/logs/train_" in files[1] and files[1] == files[2]


def a_hang_up_does_not_end_it(desk: Desk, running: Begun) -> None:
    os.kill(running.pid, signal.SIGHUP)
    before = desk.run("life")["step"]
    until(lambda: desk.run("life")["step"] > before)
    assert living(running.pid)


def it_is_seen_from_another_folder(desk: Desk, running: Begun) -> None:
    listed = desk.call("ps.sh", "life", "--json", cwd=Path("/")).stdout
    assert listed.count("\n") == 1
    row = json.loads(listed)
    assert (row["state"], row["pid"], row["of"]) == ("training", running.pid, 1_000_000)
    assert row["step"] > 0 and row["loss"] < 8 and row["heartbeat_seconds"] < 10 and "samples/sec" in row["speed"]
    page = desk.call("ps.sh", cwd=Path("/")).stdout
    assert re.search(rf"^life +training +{running.pid} +\d+/1000000 ", page, re.MULTILINE)


def its_log_is_found(desk: Desk, running: Begun) -> None:
    shown = desk.call("logs.sh", "life", cwd=Path("/")).stdout
    assert "Device: cpu" in shown and "Step 5/1000000" in shown
    assert all(STAMP.match(line) for line in shown.splitlines())


def a_second_trainer_is_refused_and_the_first_unharmed(desk: Desk, running: Begun) -> None:
    second = desk.train(*ENDLESS, "--run_name", "life", "--yes")
    assert second.returncode == 2
    assert second.stderr == (f"run_train_lm.sh: run life is being trained already, by process {running.pid}; "
                             "stop it first: ./run/stop.sh life\n")
    before = desk.run("life")
    assert (before["state"], before["pid"]) == ("training", running.pid)
    until(lambda: desk.run("life")["step"] > before["step"])
    assert len(desk.runs()) == 1


# -- it is stopped by kill ------------------------------------------------------------------------------------------


def stop_by_kill(desk: Desk, running: Begun) -> str:
    """What `logs.sh -f` showed until then, which ends with the run."""
    with subprocess.Popen([str(ROOT / "run" / "logs.sh"), "life", "-f"], env=desk.env, text=True,
                          stdout=subprocess.PIPE) as following:
        assert following.stdout and following.stdout.readline()
        os.kill(running.pid, signal.SIGTERM)
        shown = following.communicate(timeout=30)[0]
    until(lambda: not living(running.pid) and desk.run("life")["pid"] is None)
    return shown


def kill_saves_and_stops(desk: Desk, stopped: str) -> None:
    row = desk.run("life")
    assert (row["state"], row["reason"], row["pid"]) == ("stopped", "SIGTERM received", None)
    saved = [path.name for path in (desk.results / "life" / "snapshots").iterdir()]
    assert any(name.endswith(f"{row['step']:08d}") or name.startswith("snapshot_epoch") for name in saved)
    assert "SIGTERM: finishing this step" in stopped and "Training stopped" in stopped.splitlines()[-2]
    assert stopped.endswith("Resume: ./run/resume.sh life\n")


def without_a_terminal_going_on_wants_a_yes(desk: Desk) -> None:
    for ran in (desk.call("resume.sh", "life"), desk.train("--resume", "life")):
        assert ran.returncode == 2
        assert "without a terminal to ask on, add --yes" in ran.stderr and ran.stderr.count("\n") == 1
    assert desk.run("life")["state"] == "stopped"


def what_would_be_another_run_is_refused(desk: Desk) -> None:
    ran = desk.call("resume.sh", "life", "--yes", "--lr", "1e-3", "--batch_size", "8")
    assert ran.returncode == 2 and ran.stderr.count("\n") == 2
    assert "--lr 0.001 differs from the 0.0003" in ran.stderr and "--batch_size 8 differs from the 4" in ran.stderr


def stopping_what_does_not_run_says_so(desk: Desk) -> None:
    ran = desk.call("stop.sh", "life")
    assert (ran.returncode, ran.stdout) == (0, "life is not running: stopped\n")


# -- it goes on, and is killed --------------------------------------------------------------------------------------


def resume(desk: Desk) -> tuple[Begun, int]:
    """The run again, and the step at which it was stopped."""
    step = desk.run("life")["step"]
    return begun(desk, desk.call("resume.sh", "life", "--yes", cwd=Path("/"))), step


def it_goes_on_where_it_was(desk: Desk, again: Begun, step: int) -> None:
    assert went_on_from(desk, "life") == step
    until(lambda: desk.run("life")["step"] > step + 10)
    steps = desk.steps("life")
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] > step, "each step stands there once"
    assert desk.run("life")["pid"] == again.pid
    assert "Step 1/" not in again.printed, "only the new log was shown"
    assert len(list((desk.results / "life" / "logs").glob("train_*.log"))) == 2


def kill_9(desk: Desk, again: Begun) -> None:
    os.kill(again.pid, signal.SIGKILL)
    until(lambda: not living(again.pid) and desk.run("life")["state"] != "training")  # its threads end later


def kill_9_is_seen(desk: Desk, again: Begun) -> None:
    row = desk.run("life")
    assert (row["state"], row["pid"], row["speed"]) == ("died", again.pid, "")


def it_goes_on_from_its_last_snapshot_and_stops_by_pid(desk: Desk) -> None:
    reached = desk.run("life")["step"]
    again = begun(desk, desk.call("resume.sh", "life", "--yes"))
    assert 0 < went_on_from(desk, "life") <= reached
    ran = desk.call("stop.sh", str(again.pid), cwd=Path("/"))
    assert ran.returncode == 0 and re.match(r"life: stopped at step \d+ of 1000000: SIGTERM received\n", ran.stdout)
    assert not living(again.pid)
    steps = desk.steps("life")
    assert steps == sorted(set(steps)), "what was done twice is written once"


# -- other endings --------------------------------------------------------------------------------------------------


def test_a_paused_run_is_stopped_by_the_beginning_of_its_name_and_deleted_when_one_is_sure(desk: Desk) -> None:
    run = begun(desk, desk.train(*ENDLESS))
    assert run.name.startswith("lm_corpus_2") and (desk.results / "lm_corpus").resolve().name == run.name
    assert desk.call("delete.sh", run.name, "--yes").returncode == 2, "it is running"
    os.kill(run.pid, signal.SIGSTOP)
    until(lambda: desk.run(run.name)["state"] == "paused")
    ran = desk.call("stop.sh", "lm_cor")
    assert ran.returncode == 0 and f"{run.name}: stopped at step" in ran.stdout, ran.stderr
    assert desk.run(run.name)["state"] == "stopped"
    unsure = desk.call("delete.sh", run.name)
    assert unsure.returncode == 2 and "add --yes" in unsure.stderr and desk.run(run.name)["state"] == "stopped"
    assert desk.call("delete.sh", str(run.pid), "--yes").returncode == 0
    assert not (desk.results / run.name).exists() and run.name not in [row["run"] for row in desk.runs()]
    assert all(link.exists() for link in desk.results.iterdir() if link.is_symlink())


TAKES_AWAY = """
from dataclasses import dataclass

from stoker.training.core.callback import Callback


@dataclass
class TakesAway(Callback):
    def on_step_end(self, trainer):
        kept = trainer.snapshots.folder
        if list(kept.glob("snapshot_step_*100")):
            kept.rename(kept.with_name("away"))
"""


def test_a_crash_is_a_failed_run_with_its_log(desk: Desk) -> None:
    """Its snapshots' folder is taken away while it trains: the next snapshot cannot be written."""
    (desk.folder / "taking.py").write_text(TAKES_AWAY)
    ran = desk.train_here("--max_steps", "1000000", "--snapshot_interval", "100", "--run_name", "crash", "--callback",
                          f"{desk.folder}/taking.py:TakesAway")
    assert ran.returncode == 1
    row = desk.run("crash")
    assert row["state"] == "failed" and "FileNotFoundError" in row["reason"]
    log = log_of(desk, "crash")
    assert "ERROR: Traceback" in log and log.splitlines()[-2].endswith(row["reason"])
    assert all(STAMP.match(line) for line in log.splitlines())
    assert "ERROR: Traceback" in ran.stderr, "in the foreground it is told there too"
