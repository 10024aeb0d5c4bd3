"""Damages that tests do to files, and a disk that is full."""

import errno
import os
from pathlib import Path
from typing import NoReturn


def flip(path: Path, place: int) -> None:
    """One bit of a file, in place: who has it open, or mapped, sees it too. Its size and its time stay as they were."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def full_disk(*args: object, **kwargs: object) -> NoReturn:
    """In place of a function that writes."""
    raise OSError(errno.ENOSPC, "No space left on device")
