"""The folder of links that board.sh shows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.daemon import __main__ as commands
from stoker.daemon.rundir import RunDir

Make = Callable[..., RunDir]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    def board(*argv: str) -> Path:
        monkeypatch.setattr("sys.argv", ["daemon", "board", *argv])
        assert commands.main() == 0
        return Path(capsys.readouterr().out.strip())
    return board


def shown(folder: Path) -> dict[str, Path]:
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    return {str(link.relative_to(folder)): link.resolve() for link in links}


def test_a_run_is_shown_under_its_name(make: Make, board: Callable[..., Path]) -> None:
    one, other = make("one"), make("other")
    assert shown(board("one")) == {"one": one.tensorboard}
    assert shown(board()) == {"one": one.tensorboard, "other": other.tensorboard}
    one.remove()
    assert shown(board()) == {"other": other.tensorboard}, "what is gone is not shown any more"


def test_runs_of_one_name_are_distinguished_by_their_paths(make: Make, board: Callable[..., Path]) -> None:
    first, second, third = make("same", "a"), make("same", "b"), make("own")
    assert shown(board()) == {str(first.path).lstrip("/"): first.tensorboard,
                              str(second.path).lstrip("/"): second.tensorboard, "own": third.tensorboard}


def test_without_runs_there_is_an_empty_folder(board: Callable[..., Path]) -> None:
    assert board().is_dir() and shown(board()) == {}
