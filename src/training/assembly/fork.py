"""Continues from an older snapshot of a run in a new folder, so that nothing newer of that run is lost."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker import config, files
from stoker.config import UserError
from stoker.daemon import rundir
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir, Status
from stoker.training.core import copied, manifest
from stoker.training.core.options import OF_ONE_START

LONGEST_NAME = 200  # bytes: file systems take 255, and names are made from it


def has_newer(snapshot: Path) -> bool:
    """Whether the run of a snapshot has one of a later step."""
    return any(manifest.step_of(path) > manifest.step_of(snapshot) for path in manifest.found(snapshot.parent))


def create(snapshot: Path, cfg: Any) -> RunDir:
    """Make a run that holds what the snapshot's run had at that step; `cfg` is its config. The snapshot is linked where
    the file system can do that, since its files never change. Raises UserError where it is damaged, or no run can be
    written."""
    origin, step = RunDir(snapshot.parents[1]), manifest.step_of(manifest.verified(snapshot))
    name = cfg.run_name or f"{origin.name}_from_{_name(snapshot, step).removeprefix('snapshot_')}"
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"the new run would be called {name}, which is too long: give it a name with --run_name")
    old = origin.status()
    status = Status(old.stage, old.script, old.dataset, old.preset, step=step, of=old.of, typed=old.typed,
                    busy_seconds=old.busy_seconds * step / max(step, old.step, 1), origin=str(snapshot))
    return rundir.create(Path(cfg.result_dir) if cfg.result_dir else origin.path.parent, name, status,
                         exact=bool(cfg.run_name), fill=lambda run: _fill(run, snapshot, step, cfg))


def _fill(run: RunDir, snapshot: Path, step: int, cfg: Any) -> None:
    origin, copy = RunDir(snapshot.parents[1]), run.snapshots / _name(snapshot, step)
    copy.mkdir()
    try:
        for path in snapshot.iterdir():
            files.link_or_copy(path, copy / path.name)
    except FileNotFoundError as error:
        raise UserError(f"snapshot {snapshot} was deleted while it was copied, perhaps by the trainer of "
                        f"{origin.name}: name another one") from error
    files.write_json(run.config_file, config.to_json(replace(cfg, **OF_ONE_START)))
    own = {path.name for path in run.path.iterdir()} - {run.tensorboard.name} | {"wandb"} | {
        path.name for path in (origin.status_file, origin.lock_file, origin.deaths, origin.plots)}
    for path in origin.path.iterdir():  # journals, curves, the estimate, what the stage keeps there
        if path.name in own or path.name.startswith("."):
            continue
        if path.is_dir():
            put: Any = files.link_or_copy if path.name == copied.FOLDER else shutil.copy2
            shutil.copytree(path, run.path / path.name, dirs_exist_ok=True, copy_function=put)
        elif path.is_file():
            shutil.copy2(path, run.path / path.name)
    for journal in (run.metrics, run.timings, run.alerts):
        Journal(journal).cut(step)


def _name(snapshot: Path, step: int) -> str:
    """Of the copy: one that is looked for, also where the other was renamed or set aside."""
    return snapshot.name if snapshot.name.startswith("snapshot_") else f"snapshot_step_{step:08d}"
