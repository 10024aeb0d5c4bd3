"""The one way Stoker writes files: whole or not at all, with the error number kept.

    write      a new file under its final name: hidden, fsynced, renamed
    tidy       away with what a kill left half written
    append     lines at the end of a file: all of them or none
    overwrite  a small file in the room it has, where a full disk has none for a new one
    may_pass   whether it is worth trying again
    link_or_copy   a file of another folder, in no more room where that can be
    opened     a regular file, to be read: nothing that waits for ever or never ends
    read       its bytes, no more than so many
    reason     why a file cannot be read, in words
    sha256     of a file's bytes
    identity   what tells whether a file is still the same
    home       where caches and the list of runs are kept
    results    where runs are kept unless they are given a place
    hint       how a command of ours is typed here

A reader never meets half a file: what exists under its final name is whole.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "run/lib.sh").is_file() else None  # None: installed without one
HIDDEN = re.compile(r"\..+\.(\d+)\.stoker-tmp", re.DOTALL)  # the number is its writer's, see `hidden`
OLDER = re.compile(r"\.(?:(?:status|run_config|estimate)\.json|[0-9a-f]{16,32}\.\w+)\.(\d+)\.tmp|\.latest\.log\.(\d+)")


def home() -> Path:
    """Caches and the list of runs: `$STOKER_HOME`, or `~/.cache/stoker`. Safe to delete."""
    return Path(os.environ.get("STOKER_HOME") or Path.home() / ".cache" / "stoker")


def results() -> Path:
    """The folder of runs started without `--result_dir`: `$STOKER_RESULTS`; else `result/` of the checkout that this
    package is used from, or of the working folder where it is installed without one."""
    return Path(os.environ.get("STOKER_RESULTS") or (CHECKOUT or Path()) / "result").resolve()


def hint(command: str) -> str:
    """How a command is typed here: `./run/ps.sh` where the package lies in a checkout, else `stoker ps`."""
    name, space, words = command.partition(" ")
    return f"./run/{name}.sh{space}{words}" if CHECKOUT else f"stoker {command}"


def write(path: Path, content: bytes | memoryview | str | Callable[[IO[bytes]], Any], *, sync: bool = True) -> None:
    """Put a whole file at `path`, replacing what stands there.

    `content` is the bytes, the text (UTF-8), or a function that writes to the open file: it gets the file
    object rather than a name, because libraries that open files themselves hide the error number.
    `sync=False` leaves out the fsync, for files worth nothing after a power cut.
    Raises OSError as the system gave it; then `path` is as it was before.
    """
    half = hidden(path)
    try:
        with open(half, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(half, path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def hidden(path: Path) -> Path:
    """The name beside `path` under which this thread prepares what it then moves there. `tidy` knows it by its ending,
    which no other program uses, and by the number whether its writer lives."""
    return path.with_name(f".{path.name}.{threading.get_native_id()}.stoker-tmp")  # two threads may write one file


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    write(path, json.dumps(value, indent=2) + "\n", sync=sync)


def append(path: Path, text: str, *, sync: bool = False) -> None:
    """Add whole lines to a file. Raises OSError as the system gave it; then the file is as it was before."""
    with open(path, "a+b", buffering=0) as file:
        size = file.tell()
        torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a kill: it would swallow the first line
        left = memoryview((b"\n" if torn else b"") + text.encode())
        try:
            while left:  # on a full disk the system writes a part, and only then says so
                left = left[file.write(left):]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def overwrite(path: Path, content: str) -> None:
    """Put `content` in place of what stands there, filled up with spaces to the same size. Needs no more room than the
    file has, but a reader may meet half of it. Raises OSError, and changes nothing, where it is too long for that."""
    there, new = path.stat(), content.encode()
    if len(new) > 512 * there.st_blocks:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    with open(path, "r+b", buffering=0) as file:
        file.write(new.ljust(there.st_size))


def may_pass(error: BaseException) -> bool:
    """Of an error in writing: whether it is worth trying again. A file that is too big will stay so."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def tidy(folder: Path) -> None:
    """Remove the files and links that a writer which was killed left under a hidden name, in a folder and those in it.

    Of the names that older versions used, only those that begin with the name of one of our own files.
    """
    for path in folder.rglob(".*"):
        left = HIDDEN.fullmatch(path.name) or OLDER.fullmatch(path.name)
        if left and (path.is_symlink() or path.is_file()) and not Path("/proc", left[left.lastindex or 1]).exists():
            path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder outlive a power cut."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link, for files that nobody changes in place. Raises FileNotFoundError where there is no source."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def opened(path: str | Path) -> IO[bytes]:
    """A regular file, open for reading. Raises OSError, also for a folder, for a pipe, socket or device, from which a
    reader may wait for ever or read without end, and for a name that no file can have."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for a writer
    except ValueError as error:
        raise OSError(errno.EINVAL, "no file can have such a name", repr(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe, a socket or a device instead of a regular file", str(path))


def read(path: str | Path, *, most: int, start: int = 0, size: int | None = None) -> bytes:
    """The bytes of a regular file, or `size` of them from `start` on; as many as it had when it was opened. Raises
    OSError, also where that is more than `most`."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {most:,}", str(path))
        file.seek(start)
        return file.read(size)


def reason(error: OSError) -> str:
    """Why a file cannot be read, as the end of a sentence that begins with its name."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return "is a folder" if isinstance(error, IsADirectoryError) else f"cannot be read ({error.strerror or error})"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(path: str | Path) -> list[str | int]:
    """A file's path, size and time; size -1 where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: no file can have such a name
        return [str(path), -1, 0]
    return [str(path), status.st_size, status.st_mtime_ns]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock while the block runs; wait for whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
