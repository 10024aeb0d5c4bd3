"""A desk for each file of tests; no process outlives it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from desk import ROOT, Desk, living


@pytest.fixture(scope="session")
def ready() -> None:
    """.venv is as setup.cfg says, so that no start has to see to it first."""
    subprocess.run(["bash", "-c", ". ./run/lib.sh && setup"], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def desk(ready: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    yield desk
    for pid in desk.started:
        if living(pid) and str(desk.results).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
