"""The one evaluation loop: a model scored on all rows of a data set."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stoker import progress
from stoker.data.loader import evaluation_batches
from stoker.data.workers import Abandoned, workers_that_fit
from stoker.training.core import device as devices
from stoker.training.core import rng
from stoker.training.core.blocks import first_line
from stoker.training.core.figures import Moment
from stoker.training.core.options import Options
from stoker.training.core.stage import Stage
from stoker.training.core.totals import Totals

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """`metrics` are the stage's figures under eval/..., `size` what was scored: {"samples": 40, "tok": 10240}."""

    metrics: dict[str, float]
    size: dict[str, int]


def evaluate(stage: Stage, model: Any, dataset: Any, cfg: Options, device: torch.device,
             stopped: Callable[[], object]) -> Evaluation | None:
    """Score a model on all rows; None if `stopped` said so in between. Leaves the global randomness as it was.

    Where the memory does not suffice it is done in smaller batches; raises MemoryError where that is not possible.
    """
    try:
        return _evaluate(stage, model, dataset, cfg, device, stopped)
    except Abandoned:
        return None
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        why = first_line(error)
    if not stage.divisible or cfg.batch_size == 1:
        raise MemoryError(f"an evaluation in batches of {cfg.batch_size} does not fit into memory ({why})")
    cfg = replace(cfg, batch_size=(cfg.batch_size + 1) // 2)
    log.warning("evaluation: out of memory; it is done in batches of %s", cfg.batch_size)
    return evaluate(stage, model, dataset, cfg, device, stopped)


def _evaluate(stage: Stage, model: Any, dataset: Any, cfg: Options, device: torch.device,
              stopped: Callable[[], object]) -> Evaluation | None:
    sums, size, gathered = Totals(), Counter[str](), defaultdict[str, list[Tensor]](list)
    rows = range(min(cfg.batch_size, len(dataset)))
    workers = workers_that_fit(devices.loader_workers(device, cfg.num_workers), dataset, stage.collate, rows)
    with torch.no_grad(), rng.preserved():
        model.eval()
        for batch in evaluation_batches(dataset, stage.collate, cfg.batch_size, workers, stopped):
            if stopped():
                return None
            with devices.autocast(device, cfg.precision):
                batch = devices.move(batch, device)
                scores, gathering = stage.score(model, batch), stage.gather(model, batch)
            for name, ratio in scores.items():
                sums.add(name, ratio)
            for name, tensor in gathering.items():
                gathered[name].append(tensor.cpu())
            size.update(stage.size(batch))
            progress.mark()
        means = sums.means()
        phase = stage.phases()[-1].name
        if len(stage.counts(batch, phase)) > 1:  # the terms weigh what they weigh at the end of the run
            weights = stage.weights(Moment(phase, cfg.max_steps or 1, cfg.max_steps or 1))
            means["loss"] = sum(weights.get(term, 1.0) * means[term] for term in stage.counts(batch, phase))
        judged = stage.judge({name: torch.cat(parts) for name, parts in gathered.items()}) if gathered else {}
    metrics = {f"eval/{name}": value for name, value in {**means, **judged}.items()}
    return Evaluation(metrics | stage.derive(metrics), dict(size))
