"""Evaluates trained weights and leaves nothing behind."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from stoker.config import UserError
from stoker.monitors.console import title, words
from stoker.training.assembly.job import Job
from stoker.training.core import device as devices
from stoker.training.core import networks
from stoker.training.core.evaluation import ALL, Evaluations, Rows, Scores
from stoker.training.core.plan import resolve

log = logging.getLogger(__name__)


def report(job: Job) -> str:
    """A line for each evaluation, such as `Validation: wer=12.3% (95%: 11.0-13.9) (740 samples; all rows of the
    validation split of speech.csv)`. Raises UserError where the split or the memory does not suffice."""
    return "\n".join(_line(scores, job.cfg) for scores in evaluated(job))


def _line(scores: Scores, cfg: Any) -> str:
    size = ", ".join(f"{number:,} {unit}" for unit, number in scores.size.items())
    intervals = scores.intervals(cfg.seed)
    by = f"; intervals by {len(set(scores.groups)):,} groups" if intervals and scores.groups else ""
    assert scores.rows
    return (f"{title(cfg.split, scores.name)}: {words(scores.metrics, f'{scores.name}/', intervals)} "
            f"({size}; {_which(scores.rows, cfg)}{by})")


def _which(rows: Rows, cfg: Any) -> str:
    """Which rows were evaluated."""
    parts = ", ".join(f"{size:,} {split}" for split, size in rows.splits.items())
    some = f"{len(rows.dataset):,} of {rows.total:,} rows" if len(rows.dataset) < rows.total else "all rows"
    of = "" if rows.own else f" of {cfg.dataset}"
    return f"{some}{of}: {parts}" if cfg.split == ALL else f"{some} of the {cfg.split} split{of}"


def evaluated(job: Job) -> list[Scores]:
    """The scores of the job's weights on the split of --split. Raises UserError."""
    assert job.evaluated
    every = job.cfg.split == ALL
    with tempfile.TemporaryDirectory(prefix="stoker.") as folder:
        setup = resolve(job.stage, job.stage.all_rows(job.cfg) if every else job.cfg, Path(folder))
        cfg: Any = setup.cfg
        log.info("Device: %s", devices.describe(setup.device))
        for line in job.notes:
            log.warning("%s", line)
        if every and cfg.dataset == job.evaluated.options.get("dataset"):
            log.warning("the model was trained on some of the rows of %s, which --split all evaluates", cfg.dataset)
        setup.prepare(job.evaluated)
    stage, device = setup.stage, setup.device
    if cfg.split not in (*stage.splits(), ALL):
        raise UserError(f"--split {cfg.split}: the data have none ({cfg.dataset} gives {', '.join(stage.splits())})")
    model = networks.build(stage, device)
    job.evaluated.load(stage, model)
    log.info("Weights loaded from %s", job.evaluated)
    done = Evaluations(stage, cfg).run(cfg.split, model, cfg, device, lambda: False)
    assert done is not None
    if problems := [scores.problem for scores in done if scores.problem]:
        raise UserError(f"{problems[0]}: --precision bf16 or another --device may have room")
    return done
