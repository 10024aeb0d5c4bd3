"""Texts in the cache, each below a line with its SHA-256: a text that does not match it counts as missing.

    text       a text that is made once
    read       what was written; None where it is not there, or damaged
    write      a text or a note
    room       turns an error of the disk into one line that says what to do

Notes are JSON. Numbers, which are too many to be read at every start, are in `blocks.py`. Standard library only.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker import files
from stoker.config import UserError

log = logging.getLogger(__name__)


def text(path: Path, make: Callable[[], str], *, again: bool = False) -> str:
    """What `make` returned when it was first called for this path. `again`: call it whatever is there.

    Raises UserError where the disk refuses to keep it.
    """
    with room(path.parent), files.locked(path.with_suffix(".lock")):
        files.tidy(path.parent)
        content = None if again else read(path)
        if content is None:
            content = make()
            write(path, content)
    return content


def read(path: Path) -> str | None:
    """What `write` put there; None where nothing is there. What is damaged is named in the log, and None as well."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): it is made again", path, error.strerror)
        return None
    if digest != _digest(content):
        log.warning("%s is damaged: it is made again", path)
        return None
    return content.decode()


def write(path: Path, content: str) -> None:
    """Raises OSError."""
    encoded = content.encode()
    files.write(path, _digest(encoded) + b"\n" + encoded)


@contextmanager
def room(where: Path, *, about: str = "", otherwise: str = "") -> Iterator[None]:
    """Turn what the system says of a full disk, or of a folder that cannot be written, into a UserError.

    `where`: the folder that is written to; `about`: how much room is needed; `otherwise`: the option that needs none.
    """
    try:
        yield
    except OSError as error:
        if files.may_pass(error) or error.errno == errno.EFBIG:
            what = f"make room there{about and f' (about {about})'}, set STOKER_HOME to another disk"
        elif _on_the_way(error.filename, where):
            what = "set STOKER_HOME to a folder that can be written"
        else:
            raise
        raise UserError(f"{error.strerror} in {where}: {what}{otherwise and f', or use {otherwise}'}") from error


def _on_the_way(named: object, where: Path) -> bool:
    """Whether the file that an error names is in a folder, or is one of those above it."""
    path = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else Path()
    return path.is_relative_to(where) or path.is_absolute() and where.is_relative_to(path)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
