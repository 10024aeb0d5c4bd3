"""TAR archives as tarfile and the tar command make them: read in place, member by member, compressed or not."""

import errno
import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from stoker.config import UserError
from stoker.data.sources import archives

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
    subprocess.run(["tar", "--create", "--auto-compress", "--sort=name", "--file", path, "--directory", folder, "."],
                   check=True)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_as_the_command_makes_them(folder: Path, suffix: str) -> None:
    path = folder / f"a{suffix}"
    pack(folder / "files", path)
    expected = {**CONTENTS, "train/dog/same.jpg": b"one"}
    assert sorted(archives.members(path)) == sorted(archives.names(path)) == sorted(expected)
    for name, content in reversed(expected.items()):
        for named in (name, f"./{name}"):
            assert archives.read(str(path), named, most=len(content)) == content
    with pytest.raises(FileNotFoundError):
        archives.read(str(path), "train", most=9999)


def test_a_compressed_one_is_unpacked_once(folder: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "a.tar.gz"

    def make(content: bytes) -> None:
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo("x")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    make(b"first")
    assert list(archives.names(path)) == ["x"] and not (own_home / "archives").exists(), "a look unpacks nothing"
    assert archives.read(str(path), "x", most=9999) == b"first"
    [copy] = (own_home / "archives").glob("*.tar")
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_unpack", lambda *args: pytest.fail("was unpacked again"))
        assert archives.read(str(path), "x", most=9999) == b"first"
    os.utime(path, ns=(0, 0))
    make(b"another")
    assert archives.read(str(path), "x", most=9999) == b"another" and copy.exists()


def test_another_of_the_same_size_is_read_anew(tmp_path: Path) -> None:
    for name, content in (("x", b"one"), ("y", b"two")):
        with open(tmp_path / "a.tar", "wb") as file:
            archives.write(file, [(name, content)])
        os.utime(tmp_path / "a.tar", ns=(0, ord(name)))
        assert archives.members(tmp_path / "a.tar") == [name]
        assert archives.read(f"{tmp_path}/a.tar", name, most=3) == content


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
def test_damaged_ones_are_reported(folder: Path, suffix: str, own_home: Path) -> None:
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


def test_a_full_disk_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        tar.add(folder / "files", arcname=".")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stoker.files.write", full)
    with pytest.raises(UserError, match="No space left on device in .*: make room there for what is in .*a.tar.gz"):
        archives.members(folder / "a.tar.gz")


def member(name: str, content: bytes = b"x", *, size: int | None = None, kind: bytes = tarfile.REGTYPE,
           **pax: str) -> bytes:
    """One whose header may claim what it likes."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = len(content) if size is None else size, kind, pax
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


HOSTILE = {
    "negative": member("a", size=-1024), "endless": member("a", size=2**60), "beyond": member("a", size=5000),
    "negative by PAX": member("a", **{"size": "-512"}), "endless by PAX": member("a", **{"size": str(2**60)}),
    "more by PAX than there is": member("a", **{"GNU.sparse.realsize": "1500"}) + member("b"),
    "a huge PAX header": member("a", size=2**40, kind=tarfile.XHDTYPE),
    "a huge name": member("a", size=2**33, kind=tarfile.GNUTYPE_LONGNAME),
    "a chain of headers": member("a", b"a\0", kind=tarfile.GNUTYPE_LONGNAME) * 5000 + member("a"),
    "a sparse map without end": member("a", b"9999999\n" + b"1" * 504, **{
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a", "GNU.sparse.realsize": "9"}),
    "garbage between": b"garbage!" * 64 + member("a"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_hostile_one_is_refused(tmp_path: Path, own_home: Path, what: str, suffix: str) -> None:
    """Behind a member that is fine: tarfile reads on and on, or takes it for the end, or all the memory."""
    content = member("first", b"fine") + HOSTILE[what] + archives.END
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    for listed in (archives.names, archives.members):
        with pytest.raises(UserError, match="a.tar.*: cannot be read as a TAR archive") as caught:
            list(listed(path))
        assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def test_an_archive_may_unpack_to_so_much(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = member("first", b"fine") + member("zeros", bytes(2_000_000)) + archives.END
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(archives, "UNPACKED", 1_000_000)
    with pytest.raises(UserError, match="unpacked it has more than 1,000,000 bytes"):
        archives.members(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match="its header gives member 'zeros' an impossible size, 2,000,000 bytes"):
        list(archives.names(tmp_path / "a.tar.gz"))
    assert not list((own_home / "archives").glob("*tar*[!k]"))
    monkeypatch.setattr(archives, "TIMES", 1000)
    assert archives.members(tmp_path / "a.tar.gz") == list(archives.names(tmp_path / "a.tar.gz")) == ["first", "zeros"]


def test_names_of_other_encodings_are_names(tmp_path: Path) -> None:
    content = bytearray(member("a.png"))
    content[0] = 0xE4
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    (tmp_path / "a.tar").write_bytes(bytes(content) + archives.END)
    assert archives.members(tmp_path / "a.tar") == ["\udce4.png"]
    assert archives.read(str(tmp_path / "a.tar"), "\udce4.png", most=1) == b"x"
