"""What all tests share: caches and runs of their own."""

import signal
from pathlib import Path

import pytest

import config
import wheels

config.share_cores()  # the suite runs in several processes
wheels.torchaudio()  # before transformers imports them as they are, and fails where their compiled parts cannot load
wheels.torchvision()

# a shell without job control lets what it starts in the background ignore Ctrl-C, and so would all that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test does reaches the user's caches or list of runs."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("STOKER_HOME", str(home))
    return home
