"""Programs that share a CPU: every one of them watches for others, and gives way while they are there."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from stoker import command, sharing

SOURCE = Path(command.__file__).parent
PROGRAMS = [str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py")) if "__main__" in path.read_text()]
DRAWING = ("monitors/plots.py",)  # it never imports torch


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in DRAWING])
def test_every_program_shares_the_cores(program: str, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Before it does anything else: here it finds a mistake."""
    begun: list[bool] = []
    monkeypatch.setattr(sharing, "start", lambda: begun.append(True))
    monkeypatch.setattr(sys, "path", list(sys.path))  # a script puts src/ into it
    monkeypatch.setattr(sys, "argv", ["program", "--no_such_option"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SOURCE / program), run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err and begun == [True]


def test_the_programs_are_found() -> None:
    assert {"training/train_lm.py", "inference/generate.py", "data/__main__.py", *DRAWING} <= {*PROGRAMS}
    assert not any("import torch" in (SOURCE / name).read_text() for name in DRAWING)


@pytest.mark.parametrize("own, threads", [({}, 2), ({"GOMP_SPINCOUNT": "77"}, 1), ({"OMP_WAIT_POLICY": "active"}, 1)])
def test_what_the_user_has_set_wins(own: dict[str, str], threads: int) -> None:
    """Then nothing is watched; else one thread does, however often it is asked for."""
    script = "import threading; from stoker import sharing; sharing.start(); sharing.start()"
    assert int(run(f"{script}; print(threading.active_count())", **own)) == threads


def test_others_are_there_at_once_and_gone_after_some_calm_seconds() -> None:
    watch = sharing.Watch()
    assert [watch.look(share) for share in (0.0, 0.05, 0.5, 0.05, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.05)] == [
        False, False, True, True, True, True, True, True, True, False, False]


WAITING = """
import os, sys, threading, hashlib, time
from stoker import sharing
if sys.argv[1] == "crowded":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before, block = sharing.waited(), bytes(2**20)
def work():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        hashlib.sha256(block)  # without the interpreter's lock
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
time.sleep(0.8)
print(sharing.waited() - before)
"""


def test_three_threads_on_one_core_wait_for_twice_the_time() -> None:
    """In 0.8 seconds for 1.6, while they compute for 0.8 at most."""
    assert float(run(WAITING, "crowded")) > 1.0


CROWD = """
import os, sys, time, threading
from stoker import sharing
def threads():
    return len(os.listdir("/proc/self/task"))
crowd = sharing.Crowd()
crowd.gather()
assert threading.active_count() == 1, "without libgomp there is nothing to do"
import torch
torch.ones(2**20).exp_()
counts = [threads()]
for change in (crowd.gather, crowd.gather, crowd.dissolve, crowd.dissolve, crowd.gather):
    change()
    time.sleep(0.5)
    counts.append(threads() - counts[0])
print(counts[1:], len(os.sched_getaffinity(0)) + 1)
"""


def test_libgomp_manages_more_threads_than_there_are_cores_while_there_is_a_crowd() -> None:
    """The library that torch brings with it. They sleep: the process computes nothing meanwhile."""
    counts, more = run(CROWD).rsplit(" ", 1)
    assert counts == str([int(more), int(more), 0, 0, int(more)])


def run(script: str, *argv: str, **own: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in sharing.SETTINGS}
    return subprocess.run([sys.executable, "-c", script, *argv], env=clean | {"PYTHONPATH": str(SOURCE.parent)} | own,
                          check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
