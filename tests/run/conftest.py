"""A desk for each file of tests; no process outlives it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from desk import Desk, living


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    yield desk
    for pid in desk.started:
        if living(pid) and str(desk.results).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
