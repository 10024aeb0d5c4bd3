"""A process that holds a run's lock, as a trainer does, and runs to hold."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stoker.daemon import rundir
from stoker.daemon.rundir import RunDir, Status

SOURCE = Path(rundir.__file__).parents[2]

HOLD = """
import sys
from pathlib import Path
from stoker.daemon.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    {inside}
    print("held", flush=True)
    sys.stdin.read()
"""

Make = Callable[..., RunDir]
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs started without --result_dir."""
    monkeypatch.setenv("STOKER_RESULTS", str(tmp_path / "project/result"))
    return tmp_path / "project/result"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes runs in one result folder; what is not given is as in a run of the language model."""
    def make(name: str = "lm_corpus_nano", result: str = "result", *, stage: str = "lm", dataset: str = "corpus",
             preset: str = "nano", state: str = "stopped", pid: int = 0) -> RunDir:
        run = rundir.create(tmp_path / result, name, Status(stage, f"train_{stage}.py", dataset, preset))
        run.write_status(Status(**{**vars(run.status()), "state": state, "pid": pid}))
        return run
    return make


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts processes that hold a run's lock until they are killed or their input is closed."""
    started: list[subprocess.Popen[str]] = []

    def hold(run: RunDir, inside: str = "pass") -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLD.format(inside=inside), str(run.path)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                                   env={**os.environ, "PYTHONPATH": str(SOURCE)})
        started.append(process)
        assert process.stdout and process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()
