"""What a finished run leaves: models/final, models/best, and the snapshots still wanted."""

import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import files
from daemon.rundir import RunDir
from training import manifest
from training.callbacks.ema import EMA
from training.trainer import Trainer

log = logging.getLogger(__name__)


def hand_out(trainer: Trainer, run: RunDir) -> None:
    """Write models/final and models/best, then delete the snapshots that are not needed any more.

    With EMA both hold the average, which is what was evaluated.
    """
    kept, folders = trainer.snapshots, {"final": run.models / "final", "best": run.models / "best"}
    best = kept.at_step(trainer.best_step) if trainer.best_step >= 0 else None
    if trainer.best_step >= 0 and best is None:
        log.warning("the snapshot of step %d, the best, is gone: only the last model is handed out", trainer.best_step)
    restore = best is not None and trainer.cfg.early_stopping and trainer.cfg.early_stop_restore_best
    if not restore:
        _export(trainer, folders["final"])
    if best is not None:
        _load(trainer, manifest.verified(best))
        _export(trainer, folders["best"])
        if restore:
            _export(trainer, folders["final"])
        log.info("Best model saved: %s (%s %.4f at step %d)", folders["best"], trainer.stage.best[0], trainer.best,
                 trainer.best_step)
    if trainer.cfg.delete_snapshots_after_training:
        kept.keep_only({trainer.best_step})


def _ema(trainer: Trainer) -> EMA | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)


def _load(trainer: Trainer, snapshot: Path) -> None:
    state = trainer.snapshots.load(snapshot, trainer.model)
    if ema := _ema(trainer):
        ema.load_state_dict(state["callbacks"][ema.key]["state"])


def _export(trainer: Trainer, folder: Path) -> None:
    """Write a model folder whole, or not at all."""
    hidden, ema = folder.with_name(f".{folder.name}"), _ema(trainer)
    shutil.rmtree(hidden, ignore_errors=True)  # what a kill left
    hidden.mkdir()
    with ema.averaged(trainer.model) if ema else nullcontext():
        trainer.stage.export(trainer.model, hidden)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(hidden, folder)
    files.sync_folder(folder.parent)
