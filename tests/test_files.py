"""Whole or not at all: what stands under a file's name after a write that went wrong, by whatever cause."""

import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from stoker import files
from stoker.daemon import rundir

SOURCE = str(Path(files.__file__).parents[1])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that stands there already, alone in its folder."""
    path = tmp_path / "there"
    path.write_text("old")
    return path


def alone(path: Path) -> bool:
    return os.listdir(path.parent) == [path.name]


def test_what_a_killed_writer_left_is_tidied_away_and_nothing_else(old: Path) -> None:
    killed = ("import os, pathlib; from stoker import files; "
              "files.write(pathlib.Path('there'), lambda file: os.kill(os.getpid(), 9))")
    assert subprocess.run([sys.executable, "-c", killed], cwd=old.parent, env={"PYTHONPATH": SOURCE}).returncode == -9
    assert len(os.listdir(old.parent)) == 2
    kept = {"there", f".there.{os.getpid()}.stoker-tmp", ".hidden", ".hidden.tmp", "999999999.tmp",
            ".notes.2024", ".backup.999999999.tmp", ".thesis.999999999", ".my.status.json.999999999.tmp",
            "a.999999999.stoker-tmp", ".999999999.stoker-tmp", ".half.stoker-tmp"}
    for name in kept - {"there"}:
        (old.parent / name).touch()
    for name in (folders := {".folder.999999999", ".folder.999999999.tmp", ".folder.999999999.stoker-tmp"}):
        (old.parent / name).mkdir()
        (old.parent / name / "file").touch()
    (old.parent / ".link.999999999").symlink_to("there")
    for name in (".latest.log.999999999.stoker-tmp", ".latest.log.999999999"):  # the second as older versions did
        (old.parent / name).symlink_to("there")
    for name in (".status.json.999999999.tmp", f".{'0af' * 8}.bin.999999999.tmp", ".two\nlines.999999999.stoker-tmp"):
        (old.parent / name).touch()
    files.tidy(old.parent.parent)
    assert set(os.listdir(old.parent)) == kept | folders | {".link.999999999"} and old.read_text() == "old"
    assert all(os.listdir(old.parent / name) == ["file"] for name in folders)


def test_a_link_is_moved_into_place_under_a_name_that_is_tidied(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """As is what `write` leaves: the two writers of hidden names, killed before the rename."""
    monkeypatch.setattr(threading, "get_native_id", lambda: 999999999)
    for kill, writer in (("pathlib.Path.replace", lambda: rundir._link(tmp_path / "link", "there")),
                         ("os.replace", lambda: files.write(tmp_path / "file", "new"))):
        with monkeypatch.context() as patch:
            patch.setattr(kill, lambda *_: exec("raise KeyboardInterrupt"))
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(KeyboardInterrupt):
                writer()
    assert len(os.listdir(tmp_path)) == 2
    files.tidy(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_is_read_is_a_small_file(old: Path) -> None:
    assert files.read(old, most=3) == b"old"
    os.mkfifo(pipe := old.with_name("pipe"))
    for path, most, why in ((old, 2, "3 bytes, more than 2"), (pipe, 9, "instead of a regular file"),
                            (old.parent, 9, "Is a directory"), (Path("/dev/zero"), 9, "instead of a regular file")):
        with pytest.raises(OSError, match=why):
            files.read(path, most=most)
    with pytest.raises(FileNotFoundError):
        files.read(old.with_name("gone"), most=9)


@pytest.mark.parametrize("content", ["grün\n", "grün\n".encode(), lambda file: file.write("grün\n".encode())])
@pytest.mark.parametrize("sync", [True, False])
def test_a_write_replaces_the_whole(old: Path, content: str | bytes | Callable[[IO[bytes]], object],
                                    sync: bool) -> None:
    files.write(old, content, sync=sync)
    assert old.read_bytes() == "grün\n".encode()
    assert alone(old)


def test_a_reader_keeps_what_it_opened(old: Path) -> None:
    with open(old) as reader:
        files.write(old, "new")
        assert reader.read() == "old"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_writer_that_raises_midway_leaves_the_old(old: Path, error: BaseException) -> None:
    def half(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise error

    with pytest.raises(type(error)) as caught:
        files.write(old, half)
    assert caught.value is error
    assert old.read_text() == "old" and alone(old)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_system_s_error_number_is_kept(old: Path, monkeypatch: pytest.MonkeyPatch, call: str,
                                           number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError) as caught:
        files.write(old, "new")
    assert caught.value.errno == number
    assert old.read_text() == "old" and alone(old)


def test_a_write_into_no_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "no" / "file", "new")


def test_it_is_synced_before_it_gets_its_name(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed first, a file would be empty after a power cut."""
    order: list[str] = []

    def noted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def noting(*args: object) -> None:
            order.append(name)
            call(*args)
        return noting

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    files.write(old, "new")
    assert order == ["fsync", "replace", "fsync"], "the file, its name, the folder"
    order.clear()
    files.write(old, "new", sync=False)
    assert order == ["replace"]


def test_two_threads_may_write_one_file(old: Path) -> None:
    """As a second signal does, whose last status is written while the trainer writes one."""
    def meanwhile(file: IO[bytes]) -> None:
        file.write(b"1" * 10)
        other = threading.Thread(target=lambda: files.write(old, "2" * 5))
        other.start()
        other.join()
        assert old.read_text() == "22222"

    files.write(old, meanwhile)
    assert old.read_text() == "1111111111" and alone(old)


def test_json_is_written_for_people(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"one": [1, None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"one": [1, None]}
    assert text.endswith("}\n") and text.count("\n") > 2


def test_append_adds_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    files.append(path, "one\n")
    files.append(path, "zwölf\n")
    assert path.read_text() == "one\nzwölf\n"


def test_an_append_that_does_not_fit_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    """The kernel writes as much as fits and tells of the rest at the next write only."""
    path = tmp_path / "lines"
    path.write_text("x" * 79 + "\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[0][1]))
    try:
        with pytest.raises(OSError) as caught:
            files.append(path, "y" * 79 + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "x" * 79 + "\n"


HOLD = """
import sys
from pathlib import Path
from stoker import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_locked_waits_until_the_holder_has_ended_even_by_a_kill(tmp_path: Path) -> None:
    with holding(tmp_path / "new folder" / "lock") as first:
        assert first.stdout and first.stdout.readline() == b"held\n"
        with holding(tmp_path / "new folder" / "lock") as second:
            assert second.stdout and second.stdin
            assert select.select([second.stdout], [], [], 0.3) == ([], [], [])
            first.kill()
            assert second.stdout.readline() == b"held\n"
            second.stdin.close()
            assert second.wait() == 0


def holding(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": SOURCE})


def test_sha256_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_home_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    assert files.home() == tmp_path
    monkeypatch.setenv("STOKER_HOME", "")
    assert files.home() == Path.home() / ".cache" / "stoker"


# -- reading what others have made ----------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of things that are no regular files, or cannot be opened."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("name, why", [
    ("pipe", "cannot be read (it is a pipe, a socket or a device instead of a regular file)"),
    ("zero", "cannot be read (it is a pipe, a socket or a device instead of a regular file)"),
    ("loop", "cannot be read (Too many levels of symbolic links)"), ("folder", "is a folder"),
    ("none", "there is no such file"), ("a\0b", "cannot be read (no file can have such a name)"),
    ("\ud800", "cannot be read (no file can have such a name)"), ("x" * 300, "cannot be read (File name too long)")])
def test_only_regular_files_are_read(odd: Path, name: str, why: str) -> None:
    """The pipe has no writer: opened as usual it would wait for one."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught:
        files.read(odd / name, most=100)
    assert files.reason(caught.value) == why and len(os.listdir("/proc/self/fd")) == before
    assert files.identity(odd / name)[0] == str(odd / name), "what is refused can still be asked whether it changed"


def test_no_more_is_read_than_asked_for(old: Path) -> None:
    assert files.read(old, most=3) == b"old" and files.read(old, most=2, start=1, size=2) == b"ld"
    with pytest.raises(OSError) as caught:
        files.read(old, most=2)
    assert files.reason(caught.value) == "cannot be read (it has 3 bytes, more than 2)"
    with open(old, "r+b") as sparse:
        sparse.truncate(2**40)  # far more than the memory holds
    with pytest.raises(OSError, match="it has 1,099,511,627,776 bytes"):
        files.read(old, most=2**20)
