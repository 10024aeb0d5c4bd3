"""Data sets that are made on this machine: once, in the cache, whole or not at all, with a digest of every file."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from stoker import files
from stoker.config import Damaged
from stoker.data import cache
from stoker.data.sources import archives

log = logging.getLogger(__name__)

MANIFEST, DIGESTS = "manifest.csv", "digests.note"


def folder(where: Path, make: Callable[[Path], None], *, what: str, room: str) -> Path:
    """The folder `where`, which `make` is given under another name to fill, when it is not there yet. Raises UserError
    where there is no room.

    The manifest is verified at each call, other files when they are read (`verify`).
    """
    with cache.room(where.parent, about=room), files.locked(where.with_suffix(".lock")):
        if not _is_whole(where):
            shutil.rmtree(where, ignore_errors=True)
            half = where.with_name(f"half-{where.name}")
            shutil.rmtree(half, ignore_errors=True)  # by a start that was killed
            half.mkdir(parents=True)
            log.info("Making %s (once, kept in %s)", what, where)
            try:
                make(half)
                digests = {path.name: files.sha256(path) for path in sorted(half.iterdir())}
                cache.write(half / DIGESTS, json.dumps(digests))
                os.rename(half, where)
            except OSError:
                shutil.rmtree(half, ignore_errors=True)
                raise
    return where


def holds(path: str) -> bool:
    """Whether a file, or the archive that it is in, was made here. A copy of ours in a folder of the user's was not."""
    file = Path(archives.parted(path)[0])
    return file.absolute().is_relative_to(files.home().absolute()) and file.name in _digests(file.parent)


def verify(path: str) -> None:
    """Raise Damaged if a file, or the archive that it is in, was made here and is not what was made: then its folder
    has been removed. Any other file passes."""
    file = Path(archives.parted(path)[0])
    digest = _digests(file.parent).get(file.name)
    if digest and _sha256(*files.identity(file)) != digest:
        shutil.rmtree(file.parent, ignore_errors=True)
        raise Damaged(f"{file} is damaged: it is not what was made. Its folder was removed; start again, or resume, "
                      "and it is made again")


def _is_whole(where: Path) -> bool:
    """Whether the folder is there, and its manifest is what was written."""
    digests = _read(where)
    found = MANIFEST in digests and (where / MANIFEST).exists() and files.sha256(where / MANIFEST) == digests[MANIFEST]
    if where.exists() and not found:
        log.warning("%s is damaged: it is made again", where)
    return found


def _read(where: Path) -> Mapping[str, str]:
    return json.loads(cache.read(where / DIGESTS) or "{}")  # type: ignore[no-any-return]


_digests = lru_cache(maxsize=16)(_read)  # what is made again at the same place has the same digests


@lru_cache(maxsize=16)
def _sha256(path: str, size: int, time: int) -> str:
    return files.sha256(Path(path)) if size >= 0 else ""
