"""A PID is not yet a process: zombies, odd names, PIDs that are used again."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker.daemon import process

PR_SET_NAME = 15  # linux/prctl.h


def test_i_am_a_process() -> None:
    me = process.me()
    assert me.pid == os.getpid()
    assert me == process.find(os.getpid())
    assert process.Process(**me.to_json()) == me
    assert not process.is_paused(me.pid)


def test_start_is_in_ticks_after_boot() -> None:
    """The field that tells two processes of one PID apart, against the clock."""
    up = float(Path("/proc/uptime").read_text().split()[0])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = process.find(child.pid)
        assert found and abs(found.started / os.sysconf("SC_CLK_TCK") - up) < 5
        child.communicate()


@pytest.mark.parametrize("pid", [0, 2**22 + 1, 10**30])
def test_no_process(tmp_path: Path, pid: int) -> None:
    assert process.find(pid) is None
    assert not process.is_paused(pid)
    assert process.owner(pid) is None and not process.writes(pid, tmp_path)


def test_whose_a_process_is_and_what_it_writes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.touch()
    assert process.owner(os.getpid()) == os.geteuid()
    assert not process.writes(os.getpid(), one)
    with open(one):
        assert not process.writes(os.getpid(), one), "somebody looks at it"
    with open(one, "a"):
        one.rename(tmp_path / "renamed")
        assert process.writes(os.getpid(), tmp_path / "renamed") and not process.writes(os.getpid(), other)
    assert not process.writes(os.getpid(), tmp_path / "renamed")


def test_a_zombie_is_no_process() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, but stays in the table
        assert Path(f"/proc/{child}/stat").exists()
        assert process.find(child) is None
    finally:
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", [b"a b", b"a) Z (b", b") T 1 2 3", b"\xff\xfe"])
def test_a_name_may_hold_anything(name: bytes) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        ctypes.CDLL(None).prctl(PR_SET_NAME, name)
        os.write(writer, b"named")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 5)
        assert name in Path(f"/proc/{child}/stat").read_bytes()
        found = process.find(child)
        assert found and found.pid == child and found.started >= process.me().started
        assert not process.is_paused(child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_paused_until_it_is_continued() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert process.is_paused(child.pid) and process.find(child.pid)
        os.kill(child.pid, signal.SIGCONT)
        os.waitid(os.P_PID, child.pid, os.WCONTINUED | os.WNOWAIT)
        assert not process.is_paused(child.pid)
        child.kill()
