"""One sitting of a run: prepare the data, build trainer and callbacks, train, hand out the models."""

import logging
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import files
from config import UserError
from daemon import machine, registry
from daemon.rundir import RunDir
from data.loader import Order
from monitors.console import Console
from monitors.gradients import Gradients
from monitors.journal import JournalWriter
from monitors.sanity import Sanity
from monitors.speed import Speed
from monitors.status import StatusWriter
from monitors.system import System
from monitors.tensorboard import TensorBoard
from monitors.weights import Weights
from training import device as devices
from training import receipt, snapshots
from training.callback import Callback
from training.callbacks.begin import Begin
from training.callbacks.early_stopping import EarlyStopping
from training.callbacks.load_weights import LoadWeights
from training.options import Options, epochs_of, fit_to_length, run_length
from training.signals import Signals
from training.snapshots import Damaged, Snapshots
from training.stage import Stage
from training.trainer import Ending, Trainer

if TYPE_CHECKING:
    from training.launch import Job

log = logging.getLogger(__name__)


class Session:
    """Trains a job in its run directory. The caller holds the run's lock."""

    def __init__(self, job: "Job", run: RunDir, signals: Signals, begun: threading.Event):
        """`begun` is set once nothing can be refused any more."""
        self.job, self.run, self.signals, self.begun = job, run, signals, begun

    def train(self) -> Ending:
        """Raises UserError before training has begun, and Interrupted if a stop came before that."""
        trainer, snapshot = self.prepare()
        self.signals.interruptible = False  # from here on there is something to save
        ending = trainer.fit(snapshot)
        if ending.state == "finished":
            _hand_out(trainer, self.run, trainer.snapshots)
        return ending

    def prepare(self) -> tuple[Trainer, Path | None]:
        """The trainer of this sitting, and the snapshot it is to go on from."""
        cfg: Options = self.job.cfg
        devices.settle(cfg.threads)
        device = devices.choose(cfg.device)
        cfg = replace(cfg, precision=devices.resolve_precision(device, cfg.precision), threads=devices.threads(),
                      resume="", yes=False)
        log.info("Device: %s", devices.describe(device))
        for line in [*self.job.notes, *config.unusual(cfg), *machine.warnings()]:
            log.warning("%s", line)
        stage = self.job.stage(cfg, self.run.path)
        stage.prepare()
        rows = _rows(stage)
        log.info("Loaded %s samples", f"{rows:,}")
        order = Order(rows, cfg.batch_size, cfg.grad_accum_steps, cfg.seed)
        if cfg.batch_size * cfg.grad_accum_steps > rows:
            log.warning("an update of %s x %s samples takes all %s there are: each epoch is one update",
                        f"{cfg.batch_size:,}", f"{cfg.grad_accum_steps:,}", f"{rows:,}")
        cfg, steps = self._fit(cfg, order)
        stage.cfg = cfg
        kept = Snapshots(self.run.snapshots, receipt.made_by(cfg, device))
        kept.tidy()
        snapshot = self._where_to_go_on(kept)
        weights = None if snapshot else self._initial_weights(cfg)
        callbacks = [*_callbacks(cfg, self.run, stage, weights), Begin(self.run, snapshot is None, self.begun)]
        return Trainer(stage, cfg, steps, order, kept, callbacks, self.signals, device), snapshot

    def _fit(self, cfg: Options, order: Order) -> tuple[Options, int]:
        """Settle the run's length and what depends on it. In a run that goes on all counts as typed: it is kept."""
        typed = self.job.parsed.typed
        steps = run_length(cfg, typed, order.steps_per_epoch)
        cfg, lines = fit_to_length(cfg, typed, steps, order.steps_per_epoch)
        for line in lines:
            log.info("%s", line)
        return replace(cfg, max_steps=steps, epochs=epochs_of(steps, order.steps_per_epoch)), steps

    def _where_to_go_on(self, kept: Snapshots) -> Path | None:
        """The snapshot to go on from, its receipt in the log; None for a new run and one that had not begun."""
        if self.job.run is None:
            return None
        snapshot = self.job.snapshot or kept.newest_good()
        if snapshot is None:
            log.info("no snapshot yet: the run had not begun, it starts now")
            return None
        if self.job.snapshot:
            _verified(snapshot)
        manifest = snapshots.read_manifest(snapshot)
        log.info("Going on from %s, step %d", snapshot, manifest["step"])
        changed = receipt.differences(manifest["made_by"], kept.made_by)
        log.info("Receipt: %s", f"{len(changed)} differences from the interrupted run" if changed else
                 "same configuration, code, packages, device and threads as the interrupted run")
        for line in changed:
            log.warning("  %s", line)
        return snapshot

    def _initial_weights(self, cfg: Options) -> Path | None:
        """The snapshot a run takes its weights from when it begins."""
        if not cfg.checkpoint_file:
            return None
        if (snapshot := registry.snapshot(cfg.checkpoint_file)) is None:
            raise UserError(f"--checkpoint_file {cfg.checkpoint_file} is gone: bring it back, or start a new run")
        return _verified(snapshot)


def _verified(snapshot: Path) -> Path:
    try:
        snapshots.verify(snapshot)
    except Damaged as damage:
        raise UserError(f"snapshot {snapshot} is damaged: {damage}; name another one") from damage
    return snapshot


def _rows(stage: Stage) -> int:
    rows = {split: len(stage.dataset(split)) for split in ("train", "validation")}  # type: ignore[arg-type]
    if empty := [split for split, count in rows.items() if not count]:
        raise UserError(f"there are no {' and no '.join(empty)} samples in the data: give more, or shorter samples")
    return rows["train"]


def _callbacks(cfg: Any, run: RunDir, stage: Stage, weights: Path | None) -> list[Callback]:
    """What every run has, then what the stage adds. Their order in the loop comes from their bands."""
    sanity = Sanity(run.alerts, run.incidents, cfg.sanity_check_interval)
    callbacks: list[Callback] = [sanity, Speed(), System(run.path)]
    if weights:
        callbacks.append(LoadWeights(weights))
    if cfg.early_stopping:
        callbacks.append(EarlyStopping.of(cfg, stage.best))
    if cfg.gradient_monitor and cfg.gradient_monitor_interval:
        callbacks.append(Gradients(cfg.gradient_monitor_interval))
    if cfg.weight_monitor and cfg.weight_monitor_interval:
        callbacks.append(Weights(cfg.weight_monitor_interval, cfg.weight_monitor_sample_size))
    views = [JournalWriter(run.metrics, run.timings), Console(), TensorBoard(run.tensorboard), StatusWriter(run)]
    return [*callbacks, *views, *stage.callbacks()]


# -- the models ---------------------------------------------------------------------------------------------------


def _hand_out(trainer: Trainer, run: RunDir, kept: Snapshots) -> None:
    """Write models/final and models/best, then delete the snapshots that are not needed any more."""
    best = kept.at_step(trainer.best_step) if trainer.best_step >= 0 else None
    if trainer.best_step >= 0 and best is None:
        log.warning("the snapshot of step %d, the best, is gone: only the last model is handed out", trainer.best_step)
    restore = best is not None and trainer.cfg.early_stopping and trainer.cfg.early_stop_restore_best
    if not restore:
        _export(trainer.stage, trainer.model, run.models / "final")
    if best is not None:
        snapshots.load_weights(_verified(best), trainer.model)
        _export(trainer.stage, trainer.model, run.models / "best")
        if restore:
            _export(trainer.stage, trainer.model, run.models / "final")
        log.info("Best model saved: %s (%s %.4f at step %d)", run.models / "best", trainer.stage.best[0], trainer.best,
                 trainer.best_step)
    if trainer.cfg.delete_snapshots_after_training:
        kept.keep_only({trainer.best_step})


def _export(stage: Stage, model: Any, folder: Path) -> None:
    """Write a model folder whole, or not at all."""
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # what a kill left
    hidden.mkdir()
    stage.export(model, hidden)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(hidden, folder)
    files.sync_folder(folder.parent)
