"""Data sets that are made on this machine: once, in the cache, whole or not at all."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import files
from config import UserError

log = logging.getLogger(__name__)


def folder(where: Path, make: Callable[[Path], None], *, what: str, room: str) -> Path:
    """The folder `where`, which `make` is given under another name to fill, when it is not there yet. Raises UserError
    where there is no room."""
    with files.locked(where.with_suffix(".lock")):
        if not where.exists():
            half = where.with_name(f"half-{where.name}")
            shutil.rmtree(half, ignore_errors=True)  # by a start that was killed
            half.mkdir(parents=True)
            log.info("Making %s (once, kept in %s)", what, where)
            try:
                make(half)
                os.rename(half, where)
            except OSError as error:
                shutil.rmtree(half, ignore_errors=True)
                if not files.may_pass(error):
                    raise
                raise UserError(f"{error.strerror} in {where.parent}: make room there (about {room}), or set "
                                "STOKER_HOME to another disk") from error
    return where
