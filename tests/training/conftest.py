"""A text in the folder that a test works in."""

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(300)))
    return path
