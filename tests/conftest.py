"""What all tests share: caches and runs of their own."""

import fcntl
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from stoker import wheels

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes of tests share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads sleep soon
# Else each process compiles all that it imports: one of tests all tests, which takes as long as to run 200 of them.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# a shell without job control lets what it starts in the background ignore Ctrl-C, and so would all that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests write lies in memory where there is room: every snapshot waits for the disk, and a disk that is busy made a
# test of 8 seconds take 110. pytest keeps the folders of tests that failed; all else goes when the tests have ended.
MEMORY, ROOM = "/dev/shm", 4 * 2**30
in_memory = "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
_shared = tempfile.TemporaryDirectory(prefix="stoker-tests-", dir=MEMORY if in_memory else None)
if in_memory:
    os.environ |= {"TMPDIR": _shared.name, "PYTEST_DEBUG_TEMPROOT": MEMORY}
    tempfile.tempdir = _shared.name

# Fixtures of a module or of the session run before any test's own: they too must not see the user's runs and caches.
os.environ |= {"STOKER_HOME": f"{_shared.name}/home", "STOKER_RESULTS": f"{_shared.name}/result"}


def pytest_unconfigure() -> None:
    _shared.cleanup()
    gc.freeze()  # Python's own end would look for garbage once more


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """One process compiles the tests, then the others collect what it has compiled. The garbage collector is not to
    look through all that torch and the tests consist of, now or ever."""
    if getattr(session.config.option, "dist", "no") != "no":
        return (yield)  # the process that only hands tests to others
    wheels.torchaudio()  # before transformers imports them as they are, which fails where no compiled part can load
    wheels.torchvision()
    gc.disable()
    with open(__file__) as own:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(own, fcntl.LOCK_SH)
        result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the caches, the list of runs or the result folder of the user, or of another test."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("STOKER_HOME", str(home))
    monkeypatch.setenv("STOKER_RESULTS", str(home.with_name(f"{home.name}-result")))
    return home


@pytest.fixture(scope="session", autouse=True)
def quick_runs() -> Iterator[None]:
    """A run in this process tries no bf16, times its steps once before it begins and draws no page of plots when it has
    finished: all of these take longer than training a toy. The tests of them put back what they test."""
    from stoker.training.assembly import estimate, session
    from stoker.training.core import device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "multiplies_bf16", lambda device: False)
        patch.setattr(session, "_draw", lambda run: None)
        patch.setattr(estimate, "FEWEST", 1)
        patch.setattr(estimate, "MOST", 1)
        yield
