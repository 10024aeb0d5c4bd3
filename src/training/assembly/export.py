"""What a finished run leaves: models/final, models/best, and the snapshots still wanted."""

import logging
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from stoker import config, files
from stoker.daemon.rundir import RunDir
from stoker.daemon.table import figure
from stoker.monitors.console import title, words
from stoker.training.callbacks.ema import EMA
from stoker.training.core import copied, evaluations, manifest, networks, pretrained
from stoker.training.core import device as devices
from stoker.training.core.media import Text
from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)

SAMPLE_LINES = 10


def export_models(trainer: Trainer, run: RunDir) -> None:
    """Write models/final and models/best, then delete the snapshots that are not needed any more.

    With EMA both hold the average, which is what was evaluated.
    """
    kept, folders = trainer.snapshots, {"final": run.models / "final", "best": run.models / "best"}
    best = _best(trainer) if trainer.best_step >= 0 else None
    restore = best is not None and trainer.cfg.early_stopping and trainer.cfg.early_stop_restore_best
    if not restore:
        _export(trainer, run, folders["final"], trainer.step)
    if best is not None:
        _load(trainer, best)
        _export(trainer, run, folders["best"], trainer.best_step)
        if restore:
            _export(trainer, run, folders["final"], trainer.best_step)
        name = trainer.stage.best[0]
        log.info("Best model saved: %s (%s %s at step %d)", folders["best"], name, figure(name, trainer.best),
                 trainer.best_step)
        _report_target(trainer)
    if trainer.cfg.delete_snapshots_after_training:
        kept.keep_only({trainer.best_step})
    with _averaged(trainer):
        _report_test_score(trainer)
        _report_sample(trainer)


def _best(trainer: Trainer) -> Path | None:
    """The snapshot of the best evaluation, verified. Where it is gone or damaged, the last model is still exported."""
    try:
        if best := trainer.snapshots.at_step(trainer.best_step):
            manifest.verify(best)
            return best
        why = "gone"
    except manifest.Damaged as damage:
        why = f"damaged ({damage})"
    log.error("the snapshot of step %d, the best, is %s: only the last model is exported", trainer.best_step, why)
    return None


def _report_target(trainer: Trainer) -> None:
    """Whether the best evaluation was what the stage is meant to reach, and on which data."""
    if (goal := trainer.stage.goal()) is None:
        return
    cfg: Any = trainer.cfg
    best, mode = trainer.stage.best
    value = ({best: trainer.best} | trainer.stage.derive({best: trainer.best}))[goal.metric]
    met = value < goal.value if mode == "min" else value > goal.value
    prefix = f"{evaluations.of(best)}/"
    aim = words({goal.metric: goal.value}, prefix).replace("=", " below " if mode == "min" else " above ")
    log.info("%s on validation data of %s; the goal, %s%s, is %s", words({goal.metric: value}, prefix), cfg.dataset,
             aim, goal.data and f" on {goal.data}", "reached" if met else "not reached")


def _report_test_score(trainer: Trainer) -> None:
    """Of the best model, where the data have a test split."""
    if "test" not in trainer.stage.splits():
        return
    done = trainer.evaluations.run("test", trainer.model, trainer.cfg, trainer.device, lambda: trainer.signals.stop)
    again = files.hint("evaluate RUN --split test")
    if done is None:
        log.info("test score abandoned; %s computes it", again)
    for scores in done or []:
        if scores.problem:  # the models are written
            log.error("test set not evaluated: %s; %s tries again", scores.problem, again)
        else:
            log.info("  -> %s: %s", title("test", scores.name),
                     words(scores.metrics, f"{scores.name}/", scores.intervals(trainer.cfg.seed)))


def _report_sample(trainer: Trainer) -> None:
    """A text that the best model makes, if it makes texts."""
    if not trainer.cfg.samples:
        return
    trainer.model.eval()
    try:
        with torch.no_grad(), devices.autocast(trainer.device, trainer.cfg.precision):
            made = trainer.stage.samples(trainer.model)
    except Exception:  # a sample is no reason for a run to fail that has done all it should
        log.exception("no sample could be made")
        return
    for text in [media.content for media in made.values() if isinstance(media, Text)][:1]:
        log.info("Sample of the best model:")
        for line in [line for line in text.splitlines() if line.strip()][:SAMPLE_LINES]:
            log.info("  | %s", "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))


def _ema(trainer: Trainer) -> EMA | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)


def _averaged(trainer: Trainer) -> AbstractContextManager[None]:
    """Within it the model is what was evaluated: with EMA, the average."""
    ema = _ema(trainer)
    return ema.averaged(trainer.model) if ema else nullcontext()


def _load(trainer: Trainer, snapshot: Path) -> None:
    state = trainer.snapshots.load(snapshot, trainer.model)
    if ema := _ema(trainer):
        ema.load_state_dict(state["callbacks"][ema.key]["state"])


def _export(trainer: Trainer, run: RunDir, folder: Path, step: int) -> None:
    """Write a model folder whole, or not at all."""
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # what a kill left
    hidden.mkdir()
    with _averaged(trainer), networks.merged(trainer.stage, trainer.model):
        trainer.stage.export(trainer.model, hidden)
    copied.copy_sources(trainer.stage, hidden)
    scores = pretrained.scores(run, step)
    sources = {name: source.note for name, source in trainer.stage.sources.items()}
    pretrained.note(hidden, trainer.stage.name, step, config.to_json(trainer.cfg), scores, sources)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(hidden, folder)
    files.sync_folder(folder.parent)
