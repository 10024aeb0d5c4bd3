"""The manifest of a snapshot: what it holds and was made by, and whether it is still as written. Needs no torch."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import files
from config import UserError
from daemon.rundir import MANIFEST

log = logging.getLogger(__name__)

FORMAT = 1


class Damaged(Exception):
    """A snapshot that is not as it was written; says which file and how."""


def write(path: Path, step: int, entries: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
    """Write the manifest of a snapshot whose other files are there; `entries`: the size and SHA-256 of each."""
    manifest = {"format": FORMAT, "step": step, "files": dict(entries), "made_by": dict(made_by)}
    files.write_json(path / MANIFEST, manifest | {"sha256": _digest(manifest)})


def verify(path: Path) -> None:
    """Compare every file with the manifest. Raises Damaged."""
    manifest = read(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if file.stat().st_size != entry["size"]:
            raise Damaged(f"{name} has {file.stat().st_size} bytes, was written with {entry['size']}")
        if files.sha256(file) != entry["sha256"]:
            raise Damaged(f"{name} has other content than was written (SHA-256 differs)")


def verified(path: Path) -> Path:
    """The same path, once all of it was compared. Raises UserError."""
    try:
        verify(path)
    except Damaged as damage:
        raise UserError(f"snapshot {path} is damaged: {damage}; name another one") from damage
    return path


def read(path: Path) -> dict[str, Any]:
    """Raises Damaged if there is none, and UserError if it is of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        number, digest = manifest["format"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error!r})") from error
    if number != FORMAT:
        raise UserError(f"snapshot {path} has format {number}, this version reads format {FORMAT}")
    if digest != _digest(manifest):
        raise Damaged(f"{MANIFEST} has other content than was written (SHA-256 differs)")
    return dict(manifest)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def step_of(path: Path) -> int:
    """The step a snapshot was taken at; -1 if its manifest cannot be read."""
    try:
        return int(read(path)["step"])
    except (Damaged, UserError):
        return -1


def found(folder: Path) -> list[Path]:
    """The committed snapshots in a folder, oldest first; whether they are whole, `verify` tells."""
    return sorted(folder.glob("snapshot_*"), key=step_of)


def newest_good(folder: Path, before: float = math.inf) -> Path | None:
    """The newest snapshot of a step below `before` that verifies, damaged ones named in the log; None if there is none
    at all.

    Raises UserError if there are some and none is good: the run must not start over the old one.
    """
    paths = [path for path in found(folder) if step_of(path) < before]
    for path in reversed(paths):
        try:
            verify(path)
            return path
        except Damaged as damage:
            log.error("snapshot %s is damaged and not used: %s", path.name, damage)
    if paths:
        raise UserError(f"none of the {len(paths)} snapshots in {folder} is whole, so the run cannot go on; restore "
                        "one from a copy, or start a new run")
    return None
