"""What trainers died of: what can be known is told, and nothing else."""

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.daemon import deaths, machine, process
from stoker.daemon import table as tables
from stoker.daemon.rundir import RunDir

Make = Callable[..., RunDir]
Hold = Callable[..., subprocess.Popen[str]]


def group(root: Path, line: str, file: str, text: str) -> Path:
    for path, content in ((root / "proc/self/cgroup", line + "\n"), (root / "sys/fs/cgroup" / file, text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize("line, file, text", [
    ("0::/user.slice/me", "user.slice/me/memory.events", "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\n"),
    ("0::/../elsewhere", "memory.events", "oom 4\noom_kill 3\noom_group_kill 0\n"),
    ("3:cpu:/\n4:memory:/job\n0::/", "memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
    ("4:memory:/not/mounted", "memory/memory.oom_control", "oom_kill_disable 0\noom_kill 3\n"),
])
def test_the_control_group_counts_its_killed(tmp_path: Path, line: str, file: str, text: str) -> None:
    assert machine.memory_kills(group(tmp_path, line, file, text)) == 3


def test_where_nobody_counts_nothing_is_known(tmp_path: Path) -> None:
    assert machine.memory_kills(group(tmp_path, "0::/", "cgroup.stat", "")) is None


@pytest.mark.parametrize("text, known", [
    ("Memory cgroup out of memory: Killed process 4711 (python) total-vm:1kB", True),
    ("Out of memory: Killed process 4711 (python)", True), ("Killed process 47110 (python)", False),
    ("Killed process 471 (python)", False)])
def test_the_kernel_s_log_names_whom_it_killed(tmp_path: Path, text: str, known: bool) -> None:
    """A record of /dev/kmsg: priority, number, microseconds after boot."""
    (tmp_path / "kmsg").write_text(f"6,339,90000000,-;{text}\n")
    assert machine.was_killed_for_memory(4711, 80, tmp_path / "kmsg") == known
    assert not machine.was_killed_for_memory(4711, 100, tmp_path / "kmsg"), "another process of that PID, before"
    assert not machine.was_killed_for_memory(4711, 0, tmp_path / "none")


def test_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    me = process.me()
    monkeypatch.setattr(machine, "was_killed_for_memory", lambda pid, since: False)
    monkeypatch.setattr(machine, "memory_kills", lambda: 2)
    assert deaths.of(3, me, 2) == "exit code 3"
    assert deaths.of(-signal.SIGSEGV, me, 2).startswith("SIGSEGV")
    assert deaths.of(-signal.SIGKILL, me, 2) == deaths.of(-signal.SIGKILL, me, None) == "SIGKILL, by whom is not known"
    assert "most likely by the kernel" in deaths.of(-signal.SIGKILL, me, 1)
    assert "rebooted" not in deaths.unseen(me) and "not known" in deaths.unseen(me)
    assert "started anew since" in deaths.unseen(replace(me, boot="another"))
    monkeypatch.setattr(machine, "was_killed_for_memory", lambda pid, since: (pid, since < 1e9) == (os.getpid(), True))
    assert deaths.of(-signal.SIGKILL, me, 2) == deaths.unseen(me) == "SIGKILL by the kernel: out of memory"


def test_a_resumed_trainer_logs_what_the_one_before_died_of(make: Make, hold: Hold,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    run = make(state="training")
    hold(run)
    gone = replace(process.me(), pid=4711, boot="another")
    deaths.tell_last(run, replace(run.status(), step=5, phase="evaluating"), gone)
    assert "process 4711 died at step 5 (evaluating): the machine was started anew" in caplog.text
    last = deaths.last(run)
    assert last and (last.pid, last.step, last.code, last.restarted) == (4711, 5, None, False)
    assert tables.row(run)["last_death"] == f"at step 5: {last.cause}"
    caplog.clear()
    run.write_status(replace(run.status(), state="stopped"))
    deaths.tell_last(run, run.status(), gone)
    assert not caplog.text and tables.row(run)["last_death"] == ""
