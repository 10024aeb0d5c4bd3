"""Evaluates trained weights and leaves nothing behind."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

from stoker.config import UserError
from stoker.monitors.console import words
from stoker.training.assembly.job import Job
from stoker.training.core import device as devices
from stoker.training.core import networks
from stoker.training.core.evaluation import Evaluation, evaluate
from stoker.training.core.pretrained import resolve_parts

log = logging.getLogger(__name__)


def report(job: Job) -> str:
    """`Validation: loss=4.234 ppl=69.0 (740 samples, 94,720 tok)`. Raises UserError where that cannot be told."""
    done = scores(job)
    size = ", ".join(f"{number:,} {unit}" for unit, number in done.size.items())
    return f"{job.cfg.split.capitalize()}: {words(done.metrics, 'eval/')} ({size})"


def scores(job: Job) -> Evaluation:
    """Of the job's weights, on all of the split that it names."""
    assert job.evaluated
    cfg = job.cfg
    devices.settle(cfg.threads)
    device = devices.choose(cfg.device)
    cfg = replace(cfg, precision=devices.resolve_precision(device, cfg.precision if cfg.amp else "fp32"))
    log.info("Device: %s", devices.describe(device))
    for line in job.notes:
        log.warning("%s", line)
    with tempfile.TemporaryDirectory(prefix="stoker.") as folder:
        stage = job.stage(cfg, Path(folder))
        resolve_parts(stage, job.evaluated)
        stage.prepare()
    if cfg.split not in stage.splits():
        raise UserError(f"--split {cfg.split}: the data have none ({cfg.dataset} gives {', '.join(stage.splits())})")
    model = networks.build(stage, device)
    job.evaluated.load(stage, model)
    log.info("Weights taken from %s", job.evaluated)
    try:
        done = evaluate(stage, model, stage.dataset(cfg.split), cfg, device, lambda: False)
    except MemoryError as error:
        raise UserError(f"{error}: --precision bf16 or another --device may have room") from error
    assert done
    return done
