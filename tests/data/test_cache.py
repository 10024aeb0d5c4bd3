"""A text is made once, and again when a bit of it is wrong; what a disk refuses is one line."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from damage import flip
from stoker.config import UserError
from stoker.data import cache

TEXT = "a\nwörd\r\n\0"


@pytest.fixture
def path(own_home: Path) -> Path:
    return own_home / "texts" / "one.txt"


def once(path: Path, *, again: bool = False) -> tuple[str, int]:
    """The text, and how often it was made for that."""
    made: list[str] = []
    found = cache.text(path, lambda: made.append(TEXT) or TEXT, again=again)  # type: ignore[func-returns-value]
    return found, len(made)


def test_a_text_is_made_once_unless_it_is_wanted_again(path: Path) -> None:
    assert [once(path), once(path), once(path, again=True)] == [(TEXT, 1), (TEXT, 0), (TEXT, 1)]


def test_any_damage_makes_it_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once(path)
    size = path.stat().st_size
    for place in range(size):
        flip(path, place)
        assert once(path) == (TEXT, 1), place
        os.truncate(path, place)
        assert once(path) == (TEXT, 1), place
    assert caplog.text.count(f"{path} is damaged: it is made again") == 2 * size


def test_a_file_of_a_former_version_is_made_again(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("no digest above it")
    assert once(path) == (TEXT, 1)


def test_what_cannot_be_read_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch,
                                           caplog: pytest.LogCaptureFixture) -> None:
    def unreadable(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    once(path)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "read_bytes", unreadable)
        assert once(path) == (TEXT, 1)
    assert "cannot be read (Input/output error): it is made again" in caplog.text


FULL = "make room there, set STOKER_HOME to another disk$"
FORBIDDEN = "set STOKER_HOME to a folder that can be written$"


@pytest.mark.parametrize("error, name, expected", [
    (errno.ENOSPC, None, FULL), (errno.EDQUOT, None, FULL), (errno.EFBIG, None, FULL), (errno.EIO, None, FULL),
    (errno.EACCES, "one.lock", FORBIDDEN), (errno.EROFS, b"one.lock", FORBIDDEN), (errno.ENOTDIR, "..", FORBIDDEN),
])
def test_what_the_disk_refuses_is_one_line(error: int, name: str | bytes | None, expected: str, path: Path) -> None:
    named = os.path.normpath(os.path.join(path.parent, os.fsdecode(name))) if name else None
    with pytest.raises(UserError, match=f"^{os.strerror(error)} in {path.parent}: {expected}") as caught:
        with cache.room(path.parent):
            raise OSError(error, os.strerror(error), os.fsencode(named) if isinstance(name, bytes) else named)
    assert len(caught.value.problems) == 1


def test_errors_of_other_files_are_not_the_caches(path: Path) -> None:
    for error in (OSError(errno.EACCES, "no", "/elsewhere/data.txt"), OSError(errno.EACCES, "no"), OSError("no"),
                  OSError(errno.ENOENT, "no", 3)):
        with pytest.raises(OSError) as caught, cache.room(path.parent):
            raise error
        assert caught.value is error


def test_it_says_how_much_room_and_which_option_needs_none(path: Path) -> None:
    with pytest.raises(UserError, match=r"make room there \(about 50 MB\), set .* another disk, or use --none$"):
        with cache.room(path.parent, about="50 MB", otherwise="--none"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_in_the_folders_place(own_home: Path) -> None:
    (own_home / "texts").write_text("")
    with pytest.raises(UserError, match="File exists in .*texts: set STOKER_HOME"):
        once(own_home / "texts" / "one.txt")


def test_a_failed_making_leaves_nothing(path: Path) -> None:
    make: Callable[[], str] = {}.popitem  # type: ignore[assignment]
    with pytest.raises(KeyError):
        cache.text(path, make)
    assert not list(path.parent.glob("*.txt")) and once(path) == (TEXT, 1)
