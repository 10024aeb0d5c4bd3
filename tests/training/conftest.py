"""What a test of training works on: a text in its folder, the weights of parts."""

from pathlib import Path

import pytest
import torch

from composed import folder_of, thinker


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(300)))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "source", thinker())


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "judge", {"weight": torch.arange(8.0)[None], "bias": torch.tensor([0.5])})
