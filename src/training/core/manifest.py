"""The manifest of a snapshot: what it holds and was made by, and whether it is still as written. Needs no torch."""

import fcntl
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from stoker import files
from stoker.config import UserError
from stoker.daemon.rundir import MANIFEST

log = logging.getLogger(__name__)

FORMAT = 1

_held: list[int] = []  # open manifests of snapshots that this process reads


class Damaged(Exception):
    """A snapshot that is not as it was written; says which file and how."""


def write(path: Path, step: int, entries: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
    """Write the manifest of a snapshot whose other files are there; `entries`: the size and SHA-256 of each."""
    manifest = {"format": FORMAT, "step": step, "files": dict(entries), "made_by": dict(made_by)}
    write_sealed(path / MANIFEST, manifest)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that holds the SHA-256 of its own content."""
    files.write_json(path, {**content, "sha256": _digest(content)})


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and the SHA-256 of each file in a folder and those in it, by its path there."""
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(folder.rglob("*")) if path.is_file()}


def verify(path: Path, suffix: str = "") -> None:
    """Compare every file whose name ends so with the manifest. Raises Damaged."""
    check_files(path, {name: entry for name, entry in read(path)["files"].items() if name.endswith(suffix)})


def check_files(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare files with what `entries` gave for them once. Raises Damaged."""
    for name, entry in entries.items():
        file = folder / name
        try:
            _check_is_file(file)
            if file.stat().st_size != entry["size"]:
                raise Damaged(f"{name} has {file.stat().st_size} bytes, was written with {entry['size']}")
            if files.sha256(file) != entry["sha256"]:
                raise Damaged(f"{name} has other content than was written (SHA-256 differs)")
        except OSError as error:  # a disk that fails, a file of no permission
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error


def _check_is_file(path: Path) -> None:
    """A pipe in a file's place would be waited for without end."""
    if not path.is_file():
        raise Damaged(f"{path.name} is {'something else than a file' if path.exists() else 'missing'}")


def hold(path: Path) -> None:
    """Keep the run that writes a snapshot from deleting it for as long as this process lives, where the file system has
    locks. Raises Damaged where the snapshot has been deleted."""
    try:
        _held.append(os.open(path / MANIFEST, os.O_RDONLY))
        with suppress(OSError):
            fcntl.flock(_held[-1], fcntl.LOCK_SH)
        os.stat(path / MANIFEST)  # not deleted while this waited
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error


@contextmanager
def lock_for_deleting(path: Path) -> Iterator[bool]:
    """Whether no process holds the snapshot; as long as this lasts none can."""
    with (path / MANIFEST).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            log.debug("no lock of %s", path)
        yield True


def verified(path: Path, suffix: str = "") -> Path:
    """The same path, once all of it was compared, or what ends so. Raises UserError."""
    try:
        verify(path, suffix)
    except Damaged as damage:
        raise UserError(f"snapshot {path} is damaged: {damage}; name another one") from damage
    return path


def read(path: Path) -> dict[str, Any]:
    """Raises Damaged if there is none, and UserError if it is of another format."""
    try:
        if not path.is_dir():
            raise Damaged(f"it is {'no folder' if path.exists() else 'missing'}")
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error!r})") from error
    manifest = read_sealed(path / MANIFEST)
    if manifest["format"] != FORMAT:
        raise UserError(f"snapshot {path} has format {manifest['format']}, this version reads format {FORMAT}")
    return manifest


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises Damaged."""
    try:
        _check_is_file(path)
        content = json.loads(path.read_text())
        digest = content.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read ({error!r})") from error
    if digest != _digest(content):
        raise Damaged(f"{path.name} has other content than was written (SHA-256 differs)")
    return dict(content)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def step_of(path: Path) -> int:
    """The step a snapshot was taken at; -1 if its manifest is damaged. Raises UserError if it is of another format.

    A manifest is read again only once its file has changed: each save asks for the steps of all snapshots.
    """
    try:
        now = os.stat(path / MANIFEST)
    except (OSError, ValueError):
        return -1
    return _step_read(path, (now.st_ino, now.st_size, now.st_mtime_ns))


@lru_cache(maxsize=10_000)
def _step_read(path: Path, version: tuple[int, ...]) -> int:
    try:
        return int(read(path)["step"])
    except Damaged:
        return -1


def found(folder: Path) -> list[Path]:
    """Everything in a folder that is called a snapshot, oldest first, before these what has no manifest that can be
    read; `verify` checks whether they are whole."""
    return sorted(folder.glob("snapshot_*"), key=step_of)


def newest_good(folder: Path, before: float = math.inf) -> Path | None:
    """The newest snapshot of a step below `before` that verifies, damaged ones named in the log; None if there is none
    at all.

    Raises UserError if there are some and none is good: the run must not start over the old one.
    """
    paths = [path for path in found(folder) if step_of(path) < before]
    paths.sort(key=lambda path: step_of(path) >= 0, reverse=True)  # of which step the others are, nobody knows
    for path in reversed(paths):
        try:
            verify(path)
            return path
        except Damaged as damage:
            log.error("snapshot %s is damaged and not used: %s", path.name, damage)
            last = f"{path.name}: {damage}"
    if paths:
        raise UserError(f"none of the {len(paths)} snapshots in {folder} is whole, so the run cannot be resumed "
                        f"({last}); restore one from a copy, or start a new run")
    return None
