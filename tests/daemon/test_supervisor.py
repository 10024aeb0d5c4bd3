"""A supervisor and its trainers, real processes; the trainers do by a plan what trainers may come to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from desk import until
from stoker.daemon import deaths, process
from stoker.daemon.rundir import PROJECT, RunDir

# Each start does the next word of the plan; the last is repeated.
TRAINER = """
import faulthandler, json, os, signal, sys, time
from dataclasses import replace
from pathlib import Path
from stoker.daemon import process, pulse, rundir
from stoker.daemon.rundir import RunDir, Status

folder, plan = Path(sys.argv[1]), Path(sys.argv[1]) / "plan"
words = plan.read_text().split()
word, step = words[0].partition(":")[::2]
plan.write_text(" ".join(words[1:] or words))
if word == "refuse":
    sys.exit(2)
if word == "yesterday":  # the clock is set back, then a death
    word, now = "kill", time.time
    time.time = lambda: now() - 86400
if word == "vanish":
    os.kill(os.getpid(), signal.SIGKILL)
run = RunDir(folder / "run")
if not run.path.exists():
    rundir.create(folder, "run", Status("toy", "train_toy.py", "toy", ""))
with run.lock():
    log = run.new_log()
    watching = process.find(int(os.environ["STOKER_SUPERVISOR"]))
    run.write_status(replace(run.status(), state="preparing", reason="", pid=os.getpid(), started=time.time(),
                             phase="preparing", budget=60.0, supervisor=watching.to_json()))
    faulthandler.register(signal.SIGUSR2, open(log, "ab"))
    beat = pulse.Pulse(run, pulse.Patience(unknown=60, least=0.6, times_usual=0, times_longest=0))

    def end(state, code, why=""):
        run.write_status(replace(run.status(), state=state, reason=why))
        os._exit(code)

    if word == "unprepared":
        end("failed", 1, "UserError: no data")
    signal.signal(signal.SIGTERM, lambda *_: end("stopped", 0, "SIGTERM received"))
    for _ in range(3):
        beat.enter(pulse.TRAINING, state="training", step=int(step or 0))
    beat.write()
    if step:
        snapshot = run.snapshots / f"snapshot_step_{int(step):08d}"
        snapshot.mkdir(exist_ok=True)
        (snapshot / "manifest.json").write_text(json.dumps({"step": int(step)}))
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "fail":
        end("failed", 1, "RuntimeError: a bad day")
    if word == "halt":
        end("stopped", 75, "no room")

    def hangs_in_a_system_call():
        time.sleep(600)

    if word == "hang":
        if not os.fork():
            hangs_in_a_system_call()
        hangs_in_a_system_call()
    while word in ("go", "slow"):
        for _ in range(1 if word == "go" else 7):  # a sleep ends though its process was paused meanwhile
            time.sleep(0.05)
        beat._written = 0
        beat.mark()
    end("finished", 0, "all steps done")
"""

SUPERVISOR = """
import logging, sys
from stoker.daemon import logs
from stoker.daemon.supervisor import Supervisor, Waits
logs.to_console()
command = [sys.executable, "-c", open(sys.argv[2]).read(), sys.argv[1]]
sys.exit(Supervisor(command, lambda run, begun: command,
                    Waits(restarts=(0.1, 0.1, {wait}), look=0.1, stacks=0.3)).supervise())
"""

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(plan: str, wait: float = 0.1) -> subprocess.Popen[bytes]:
        (tmp_path / "plan").write_text(plan)
        (tmp_path / "trainer.py").write_text(TRAINER)
        started.append(subprocess.Popen([sys.executable, "-c", SUPERVISOR.format(wait=wait), str(tmp_path),
                                         str(tmp_path / "trainer.py")], stderr=subprocess.DEVNULL,
                                        env=os.environ | {"PYTHONPATH": str(PROJECT / "run/python")}))
        return started[-1]

    yield start
    for supervisor in started:
        supervisor.kill()
        supervisor.wait()
    run = RunDir(tmp_path / "run")
    if run.path.exists() and (holder := run.holder()):
        os.kill(holder.pid, signal.SIGKILL)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def training(run: RunDir) -> int:
    """The PID of the trainer, once it trains."""
    until(lambda: run.status_file.exists() and run.holder() and run.state() == "training", 20)
    return run.status().pid


def rows(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.deaths.read_text().splitlines()] if run.deaths.exists() else []


def test_what_died_goes_on(start: Start, run: RunDir) -> None:
    assert start("kill:3 fail:5 finish:7").wait(20) == 0
    assert run.state() == "finished"
    assert [(row["step"], row["code"], row["phase"], row["restarted"]) for row in rows(run)] == [
        (3, -9, "training", True), (5, 1, "training", True)]
    assert rows(run)[0]["cause"].startswith("SIGKILL") and rows(run)[1]["cause"] == "RuntimeError: a bad day"
    told = "".join(path.read_text() for path in (run.path / "logs").glob("train_*.log"))
    assert f"process {rows(run)[0]['pid']} died at step 3 (training): SIGKILL" in told


def test_deaths_without_progress_come_to_an_end(start: Start, run: RunDir) -> None:
    supervisor = start("kill:3")
    assert supervisor.wait(20) == 1
    assert [row["restarted"] for row in rows(run)] == [True, True, True, False]
    assert run.state() == "failed" and run.holder() is None
    assert run.status().reason.startswith("4 deaths without a new snapshot between them; the last: SIGKILL")


def test_deaths_with_progress_between_them_do_not(start: Start, run: RunDir) -> None:
    assert start("kill:1 kill:2 kill:2 vanish kill:3 kill:3 kill:3 finish").wait(30) == 0
    assert len(rows(run)) == 7 and run.state() == "finished"
    assert [row["phase"] for row in rows(run)][2:5] == ["training", "preparing", "training"]


@pytest.mark.parametrize("plan, code, state", [("halt", 75, "stopped"), ("unprepared", 1, "failed"),
                                               ("finish", 0, "finished")])
def test_what_ended_by_itself_is_not_started_again(start: Start, run: RunDir, plan: str, code: int, state: str) -> None:
    assert start(plan + " finish:9").wait(20) == code
    assert run.state() == state and run.status().step == 0
    assert [row["restarted"] for row in rows(run)] == ([False] if plan == "unprepared" else [])


@pytest.mark.parametrize("plan, code", [("refuse", 2), ("vanish", 1)])
def test_without_a_run_there_is_nothing_to_go_on_with(start: Start, run: RunDir, plan: str, code: int) -> None:
    assert start(plan + " finish").wait(20) == code and not run.path.exists()


def test_a_restart_that_is_refused_is_a_failed_run(start: Start, run: RunDir) -> None:
    assert start("kill refuse").wait(20) == 1
    assert run.state() == "failed" and "could not be resumed: refused" in run.status().reason


def test_a_stalled_trainer_leaves_its_stacks_and_is_replaced(start: Start, run: RunDir) -> None:
    """Also those of its children, where the hang may be; the children themselves end with it only if they saw to it."""
    supervisor = start("hang:3 finish")
    until(lambda: run.status_file.exists() and run.holder() and run.state() == "stalled", 20)
    family = process.family(run.status().pid)
    assert supervisor.wait(20) == 0 and run.state() == "finished"
    cause = rows(run)[0]["cause"]
    assert cause.startswith("stalled: no progress for 1s in phase 'training'"), cause
    told = "".join(path.read_text() for path in (run.path / "logs").glob("train_*.log"))
    assert told.count("in hangs_in_a_system_call") == len(family) == 2
    os.kill(family[1], signal.SIGKILL)


def test_a_paused_trainer_is_left_alone(start: Start, run: RunDir) -> None:
    supervisor = start("go")
    pid = training(run)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: run.state() == "paused")
    time.sleep(1.5)  # more than twice the budget
    assert supervisor.poll() is None and run.state() == "paused" and not rows(run)
    os.kill(pid, signal.SIGCONT)
    until(lambda: run.state() == "training")
    time.sleep(0.5)
    assert run.status().pid == pid and not rows(run)


def test_a_supervisor_that_was_paused_with_its_trainer_blames_nobody(start: Start, run: RunDir) -> None:
    """As when the machine sleeps, or its whole container is frozen: neither of the two sees the other paused."""
    supervisor = start("slow")
    pid = training(run)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for one in (pid, supervisor.pid):
            os.kill(one, number)
        time.sleep(1.2)
    assert run.status().pid == pid and not rows(run)


def test_a_clock_that_is_set_back_is_no_reason_to_look_away(start: Start, run: RunDir) -> None:
    assert start("yesterday:3 finish:7").wait(20) == 0
    assert run.state() == "finished" and [row["step"] for row in rows(run)] == [3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("who", ["supervisor", "trainer"])
def test_a_stop_of_either_ends_both(start: Start, run: RunDir, who: str, number: signal.Signals) -> None:
    supervisor = start("go")
    pid = training(run)
    os.kill(pid if who == "trainer" else supervisor.pid, number)
    assert supervisor.wait(20) in (0, 75)
    assert process.find(pid) is None and run.state() == "stopped" and number.name in run.status().reason.replace(
        "SIGTERM", number.name)
    assert not any(row["restarted"] for row in rows(run))


def test_a_stop_between_two_trainers(start: Start, run: RunDir) -> None:
    supervisor = start("kill", wait=60)
    until(lambda: run.status_file.exists() and run.state() == "restarting" and len(rows(run)) == 3)
    assert run.holder() is None
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 75
    assert run.state() == "stopped" and run.status().reason.startswith("SIGTERM received; SIGKILL")


def test_a_supervisor_that_writes_of_a_dead_trainer_is_not_seen_as_one(start: Start, run: RunDir) -> None:
    start("kill", wait=60)
    until(lambda: run.status_file.exists() and run.state() == "restarting" and len(rows(run)) == 3)
    last = run.last_holder()
    assert last and last.pid == rows(run)[-1]["pid"]


def test_a_trainer_outlives_its_supervisor(start: Start, run: RunDir) -> None:
    supervisor = start("go")
    pid = training(run)
    watching = run.supervisor()
    assert watching and watching.pid == supervisor.pid
    until(lambda: run.doubt(watching) == "")
    holder = run.holder()
    assert holder and run.doubt(holder) == "", "both may be signalled"
    supervisor.kill()
    supervisor.wait()
    assert run.supervisor() is None
    before = run.status().heartbeat
    until(lambda: run.status().heartbeat > before)
    assert run.state() == "training" and run.status().pid == pid


def test_while_it_waits_without_a_supervisor_a_run_has_died(start: Start, run: RunDir) -> None:
    supervisor = start("kill", wait=60)
    until(lambda: run.status_file.exists() and run.state() == "restarting" and len(rows(run)) == 3)
    supervisor.kill()
    supervisor.wait()
    assert run.state() == "died"


def test_the_last_death_is_known(start: Start, run: RunDir) -> None:
    start("kill:3 go")
    until(lambda: run.deaths.exists())
    last = deaths.last(run)
    assert last and (last.step, last.code, last.restarted) == (3, -9, True)


def test_on_a_full_disk_it_waits_for_room(start: Start, run: RunDir) -> None:
    """A snapshot like the last one would not fit; a file full of holes stands for it."""
    supervisor = start("kill:3 finish:7", wait=2.0)
    until(lambda: run.deaths.exists())
    weights = run.snapshots / "snapshot_step_00000003" / "model.safetensors"
    weights.touch()
    os.truncate(weights, 2**42)
    time.sleep(4.0)
    assert supervisor.poll() is None and run.status().state == "restarting"
    weights.unlink()
    assert supervisor.wait(20) == 0 and run.state() == "finished"


def test_a_broken_manifest_is_no_reason_to_give_up(start: Start, run: RunDir) -> None:
    supervisor = start("kill:3 finish:7", wait=1.0)
    until(lambda: run.deaths.exists())
    (run.snapshots / "snapshot_step_00000003" / "manifest.json").write_text("{")
    assert supervisor.wait(20) == 0 and run.state() == "finished"
