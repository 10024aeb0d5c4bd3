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
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from stoker import files
from stoker.config import UserError
from stoker.progress import announced

log = logging.getLogger(__name__)

NAME = r".+?\.(?:tar|tgz|tar\.gz|tar\.bz2|tar\.xz)"
PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# what tarfile and those that unpack raise; ValueError and RecursionError where numbers or chains of headers are hostile
DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError, RecursionError)
AT_ONCE = 2**20  # bytes
HEADER = 2**20  # bytes of one header: a name, and what PAX adds to it; more would only take memory
UNPACKED, TIMES = 2**30, 100  # bytes, or times its own size, that an archive may become: pictures hardly shrink
END = bytes(2 * tarfile.BLOCKSIZE)


def is_archive(path: str | Path) -> bool:
    return re.fullmatch(NAME, str(path), re.IGNORECASE) is not None


def parted(path: str | Path) -> tuple[str, str]:
    """The file that a path names, and the member in it: '' where it is no archive's."""
    match = re.fullmatch(f"({NAME})!(.+)", str(path), re.IGNORECASE | re.DOTALL)
    return (match[1], match[2]) if match else (str(path), "")


def names(archive: Path) -> Iterator[str]:
    """The names of the files in it, one after the other as they come: unpacks no more than is asked for. Raises
    UserError where it cannot be read, OSError."""
    try:
        with _unpacked(archive) as file:
            yield from (os.path.normpath(member.name) for member in _headers(file, _most(archive))
                        if member.isreg() or member.islnk())
    except DAMAGED as error:
        raise _damaged(archive, error) from error


def members(archive: Path) -> list[str]:
    """The names of the files that can be read from it. Raises UserError where it cannot be read, OSError."""
    return list(_index(str(archive), _state(archive)))


def read(archive: str, member: str, *, most: int) -> bytes:
    """Raises FileNotFoundError where there is no such member, UserError where the archive cannot be read, OSError, also
    where the member has more than `most` bytes."""
    place = _index(archive, _state(Path(archive))).get(os.path.normpath(member))
    if place is None:
        raise FileNotFoundError(f"{archive}!{member}")
    start, size = place
    return files.read(_plain(Path(archive)), most=most, start=start, size=size)


def write(target: IO[bytes], contents: Iterable[tuple[str, bytes]]) -> None:
    """A TAR archive of (name, content): the same bytes from the same contents."""
    for name, content in contents:
        target.write(entry(name, content))
    target.write(END)


def entry(name: str, content: bytes) -> bytes:
    """A file of a TAR archive, as it stands in there."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _state(archive: Path) -> tuple[int, int]:
    status = archive.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def _index(archive: str, state: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Name -> where its bytes begin, and how many there are. A hard link is what it links to."""
    found: dict[str, tuple[int, int]] = {}
    try:
        plain = _plain(Path(archive))
        with files.opened(plain) as file:
            for member in _headers(file, plain.stat().st_size):
                name = os.path.normpath(member.name)
                if member.isreg() and not member.issparse():
                    found[name] = member.offset_data, member.size
                elif member.islnk() and (linked := os.path.normpath(member.linkname)) in found:
                    found[name] = found[linked]
    except DAMAGED as error:
        raise _damaged(archive, error) from error
    return found


class _Headers:
    """A file from which tarfile reads headers only, and none so large that it could fill the memory."""

    def __init__(self, file: IO[bytes]):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def _headers(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """The members of an archive of at most `size` bytes, without their contents. Raises what DAMAGED lists, also where
    a member does not lie within the archive, and where tarfile would take damage for the end."""
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
        while member := tar.next():
            tar.members.clear()  # tarfile remembers all: 2 kB each
            room = tar.offset - member.offset_data  # negative, tarfile would begin at earlier members again
            within = 0 <= member.size <= room or not member.isreg() or member.issparse()
            if room < 0 or tar.offset > size or not within:
                raise tarfile.ReadError(f"its header gives member {member.name[:99]!r} an impossible size, "
                                        f"{member.size:,} bytes")
            yield member
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"no header at byte {tar.offset:,}")


def _damaged(archive: str | Path, error: Exception) -> UserError:
    return UserError(f"{archive}: cannot be read as a TAR archive ({error}): it is damaged, cut short, or no archive")


def _unpacking(archive: Path) -> Callable[..., Any] | None:
    """What opens a compressed file as what it was; None where it is not compressed."""
    with files.opened(archive) as file:
        head = file.read(max(map(len, PACKED)))
    return next((unpack for start, unpack in PACKED.items() if head.startswith(start)), None)


def _unpacked(archive: Path) -> Any:
    """An archive, compressed or not, open as what it was."""
    return (_unpacking(archive) or open)(archive, "rb")


def _most(archive: Path) -> int:
    """Bytes that an archive may have, unpacked."""
    return max(UNPACKED, TIMES * archive.stat().st_size)


def _plain(archive: Path) -> Path:
    """The archive itself, or its unpacked copy, which is made where there is none."""
    unpack = _unpacking(archive)
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
    unpacked, most = [0], _most(archive)

    def write(file: IO[bytes]) -> None:
        with unpack(archive, "rb") as packed:
            while part := packed.read(AT_ONCE):
                unpacked[0] += file.write(part)
                if unpacked[0] > most:
                    raise tarfile.ReadError(f"unpacked it has more than {most:,} bytes")

    try:
        with announced(lambda: f"Unpacking {archive}: {unpacked[0] / 2**20:,.0f} MB so far"):
            files.write(copy, write)
    except DAMAGED as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        if not files.may_pass(error):
            raise
        raise UserError(f"{error.strerror} in {copy.parent}: make room there for what is in {archive}, or set "
                        "STOKER_HOME to another disk") from error
