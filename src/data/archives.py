"""TAR archives, read in place, a member at a time; a compressed one is unpacked once, into the cache.

A member is named ARCHIVE!MEMBER: photos.tar!train/cat/1.jpg.
"""

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import files
from config import UserError
from progress import announced

log = logging.getLogger(__name__)

UNPACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NAME = r".+?\.(?:tar|tgz|tar\.gz|tar\.bz2|tar\.xz)"
SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
AT_ONCE = 2**20  # bytes
DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def is_archive(path: str | Path) -> bool:
    return re.fullmatch(NAME, str(path), re.IGNORECASE) is not None


def parted(path: str | Path) -> tuple[str, str]:
    """The file that a path names, and the member in it: '' where it is no archive's."""
    match = re.fullmatch(f"({NAME})!(.+)", str(path), re.IGNORECASE | re.DOTALL)
    return (match[1], match[2]) if match else (str(path), "")


def members(archive: Path) -> list[str]:
    """The names of the files in it, as they come. Raises UserError where it cannot be read, OSError."""
    return list(_index(str(archive), _state(archive)))


def read(archive: str, member: str) -> bytes:
    """Raises FileNotFoundError where there is no such member, EOFError where it is cut short, OSError, UserError."""
    found = _index(archive, _state(Path(archive))).get(_plain(member))
    if found is None:
        raise FileNotFoundError(f"{archive}!{member}")
    start, size = found
    with open(_plain_archive(Path(archive)), "rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise EOFError
    return content


def write(target: IO[bytes], contents: Iterable[tuple[str, bytes]]) -> None:
    """A TAR archive of (name, content): the same bytes from the same contents."""
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in contents:
            add(tar, name, content)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    import io

    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _state(archive: Path) -> tuple[int, int]:
    status = archive.stat()
    return status.st_size, status.st_mtime_ns


def _plain(member: str) -> str:
    return os.path.normpath(member)


@lru_cache(maxsize=16)
def _index(archive: str, state: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Name -> where its bytes begin, and how many there are. A hard link is what it links to."""
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(_plain_archive(Path(archive)), "r:") as tar:
            for member in tar:
                if member.islnk() and _plain(member.linkname) in found:
                    found[_plain(member.name)] = found[_plain(member.linkname)]
                elif member.isreg() and not member.issparse():
                    found[_plain(member.name)] = member.offset_data, member.size
    except DAMAGED as error:
        raise UserError(f"{archive}: cannot be read as a TAR archive ({error})") from error
    return found


def _plain_archive(archive: Path) -> Path:
    """The archive itself, or its unpacked copy, which is made where there is none."""
    unpack = UNPACKED.get(archive.suffix.lower())
    if unpack is None:
        return archive
    key = hashlib.sha256(f"{archive.absolute()} {_state(archive)}".encode()).hexdigest()[:16]
    copy = files.home() / "archives" / f"{key}.tar"
    if not copy.exists():
        with files.locked(copy.with_suffix(".lock")):
            if not copy.exists():
                _unpack(archive, unpack, copy)
    return copy


def _unpack(archive: Path, unpack: Callable[..., Any], copy: Path) -> None:
    log.info("Unpacking %s (once, kept in %s)", archive, copy)
    files.tidy(copy.parent)
    written: list[IO[bytes]] = []

    def write(file: IO[bytes]) -> None:
        written.append(file)
        with unpack(archive, "rb") as packed:
            shutil.copyfileobj(packed, file, AT_ONCE)

    try:
        with announced(lambda: f"Unpacking: {written[0].tell() / 1e6:,.0f} MB so far" if written else "Unpacking"):
            files.write(copy, write)
    except DAMAGED as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}): it is damaged, or cut short") from error
    except OSError as error:
        if not files.may_pass(error):
            raise
        raise UserError(f"{error.strerror} in {copy.parent}: make room there for {archive} unpacked, or set "
                        "STOKER_HOME to another disk") from error
