"""TAR archives as tarfile and the tar command make them: read in place, member by member, compressed or not."""

import errno
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from config import UserError
from data import archives

CONTENTS = {"train/cat/1.jpg": b"one", "train/dog/2.jpg": b"two" * 1000, "a" * 150 + "/ä.png": b"", "last": b"x" * 511}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.link(tmp_path / "files/train/cat/1.jpg", tmp_path / "files/train/dog/same.jpg")
    return tmp_path


def pack(folder: Path, path: Path) -> None:
    subprocess.run(["tar", "--create", "--auto-compress", "--file", path, "--directory", folder, "."], check=True)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_as_the_command_makes_them(folder: Path, suffix: str) -> None:
    path = folder / f"a{suffix}"
    pack(folder / "files", path)
    expected = {**CONTENTS, "train/dog/same.jpg": b"one"}
    assert sorted(archives.members(path)) == sorted(archives.names(path)) == sorted(expected)
    for name, content in reversed(expected.items()):
        assert archives.read(str(path), name) == archives.read(str(path), f"./{name}") == content
    with pytest.raises(FileNotFoundError):
        archives.read(str(path), "train")


def test_a_compressed_one_is_unpacked_once(folder: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "a.tar.gz"

    def make(content: bytes) -> None:
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo("x")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    make(b"first")
    assert list(archives.names(path)) == ["x"] and not (own_home / "archives").exists(), "a look unpacks nothing"
    assert archives.read(str(path), "x") == b"first"
    [copy] = (own_home / "archives").glob("*.tar")
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_unpack", lambda *args: pytest.fail("was unpacked again"))
        assert archives.read(str(path), "x") == b"first"
    os.utime(path, ns=(0, 0))
    make(b"another")
    assert archives.read(str(path), "x") == b"another" and copy.exists()


def test_another_of_the_same_size_is_read_anew(tmp_path: Path) -> None:
    for name, content in (("x", b"one"), ("y", b"two")):
        with open(tmp_path / "a.tar", "wb") as file:
            archives.write(file, [(name, content)])
        os.utime(tmp_path / "a.tar", ns=(0, ord(name)))
        assert archives.members(tmp_path / "a.tar") == [name] and archives.read(f"{tmp_path}/a.tar", name) == content


def test_what_is_written_is_what_tarfile_reads(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        with open(tmp_path / name, "wb") as file:
            archives.write(file, CONTENTS.items())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert found == CONTENTS
    subprocess.run(["tar", "--list", "--file", tmp_path / "a.tar"], check=True, capture_output=True)


def test_which_paths_are_members() -> None:
    assert archives.parted("/x/a.tar!b/c.png") == ("/x/a.tar", "b/c.png")
    assert archives.parted("a.tar.gz!b!c.png") == ("a.tar.gz", "b!c.png")
    assert archives.parted("A.TGZ!x.tar!y") == ("A.TGZ", "x.tar!y")
    for path in ("/x/a!b.png", "/x/a.tar", "a.tar!", "well!.tar"):
        assert archives.parted(path) == (path, "")
    assert archives.is_archive("x/a.tar.xz") and not archives.is_archive("a.tar.zst") and not archives.is_archive("tar")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_damaged_ones_are_told(folder: Path, suffix: str, own_home: Path) -> None:
    path = folder / f"a{suffix}"
    pack(folder / "files", path)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"\0" * 100, b"no archive" * 300, whole[:20] + b"garbage" * 80):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as a TAR archive"):
            archives.members(path)
        with pytest.raises(UserError, match="cannot be read as a TAR archive"):
            list(archives.names(path))
    assert not list((own_home / "archives").glob("*.tar"))


def test_a_full_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        tar.add(folder / "files", arcname=".")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("files.write", full)
    with pytest.raises(UserError, match="No space left on device in .*: make room there for what is in .*a.tar.gz"):
        archives.members(folder / "a.tar.gz")
