"""Evaluates trained weights and leaves nothing behind."""

import json
import logging
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from stoker.config import UserError
from stoker.monitors.console import title, words
from stoker.training.assembly import confusions
from stoker.training.assembly.job import Job
from stoker.training.core import device as devices
from stoker.training.core import networks
from stoker.training.core.evaluation import ALL, Evaluations, Rows, Scores
from stoker.training.core.plan import resolve

log = logging.getLogger(__name__)


def show(job: Job) -> None:
    """Print the report; characters that standard output cannot encode are spelled out, such as `\\u2423`."""
    encoding = sys.stdout.encoding
    print(report(job).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def report(job: Job) -> str:
    """A line for each evaluation, such as `Validation: wer=12.3% (95%: 11.0-13.9) (740 samples; all rows of the
    validation split of speech.csv)`; with --confusions, below them what was confused; with --json, the same as a JSON
    document. Raises UserError where the split or the memory does not suffice."""
    stage, done = _run(job)
    confused = confusions.found(stage, done) if job.cfg.confusions else []
    if job.cfg.json:
        return json.dumps(_document(job, done) | ({"confusions": confused} if confused else {}), indent=2)
    lines = [_line(scores, job.cfg) for scores in done]
    return "\n".join([*lines, *(confusions.text(confused, stage.terms) if confused else ())])


def _document(job: Job, done: list[Scores]) -> dict[str, Any]:
    """The evaluations as values that JSON has; a figure that is not finite is null."""
    assert job.evaluated
    return {"weights": job.evaluated.place, "step": job.evaluated.step if job.evaluated.step >= 0 else None,
            "stage": job.stage.name, "dataset": job.cfg.dataset, "split": job.cfg.split,
            "evaluations": [_values(scores, job.cfg.seed) for scores in done]}


def _values(scores: Scores, seed: int) -> dict[str, Any]:
    assert scores.rows
    intervals = scores.intervals(seed)
    metrics = {name.removeprefix(f"{scores.name}/"): {"value": value if math.isfinite(value) else None,
                                                      "interval": intervals.get(name)}
               for name, value in scores.metrics.items()}
    return {"name": scores.name, "metrics": metrics, "size": scores.size,
            "rows": len(scores.rows.numbers), "splits": scores.rows.splits,
            "groups": len(set(scores.groups)) if scores.groups else None}


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
    return _run(job)[1]


def _run(job: Job) -> tuple[Any, list[Scores]]:
    """The stage with its data, and the scores."""
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
    return stage, done
