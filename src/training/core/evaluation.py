"""The evaluation loop, which scores a model on the rows of a data set, and the schedule of a stage's evaluations."""

import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from stoker import progress
from stoker.config import ENDLESS, UserError
from stoker.data.loader import evaluation_batches, stretches
from stoker.data.workers import Abandoned, close, workers_that_fit
from stoker.training.core import bootstrap, contract, evaluations, rng
from stoker.training.core import device as devices
from stoker.training.core.blocks import first_line
from stoker.training.core.error_rates import ErrorRates, Pair
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Moment, Ratio, Sampled, Samples
from stoker.training.core.options import Options
from stoker.training.core.stage import Stage
from stoker.training.core.totals import Totals

log = logging.getLogger(__name__)

ALL = "all"  # instead of a split: the rows of all splits


class Rows(NamedTuple):
    """The rows of one evaluation."""

    dataset: Any  # the rows to evaluate: all, or some of them
    total: int  # the number of all rows
    splits: Mapping[str, int]  # their number by split
    numbers: Sequence[int]  # of each row of `dataset`, counted over the rows of all `splits`, one after another
    groups: Sequence[str] | None  # of each row of `dataset`
    own: bool  # the evaluation has rows of its own, not those of the stage's data set


class Scores(NamedTuple):
    """The result of an evaluation: `metrics` by NAME/metric, and how much was scored: {"samples": 40, "tok": 10240}."""

    name: str
    metrics: dict[str, float]
    size: dict[str, int]
    rates: Mapping[str, Ratio] = {}  # totals and counts by row, of the metrics that have them
    follow: Callable[[Mapping[str, float]], dict[str, float]] = lambda means: {}  # metrics computed from others
    rows: Rows | None = None
    problem: str = ""  # why there are no metrics
    uncounted: Sequence[str] = ()  # metrics that were left out, since their counts were 0 on all rows
    pairs: Mapping[str, Sequence[Pair]] = {}  # with --confusions: the texts that each error rate compares, by row

    @property
    def groups(self) -> Sequence[str] | None:
        """The groups of the rows, where there are at least two, and not each row is one by itself."""
        known = self.rows.groups if self.rows else None
        return known if known and 1 < len(set(known)) < len(known) else None

    def intervals(self, seed: int) -> dict[str, tuple[float, float]]:
        """95 % confidence intervals by resampling rows, or whole groups of rows where there are any: of the metrics
        that are known sample by sample, and of metrics that are computed from only those."""
        sums = {name: tuple(value.cpu().double().numpy() for value in ratio) for name, ratio in self.rates.items()}
        if self.groups:
            sums = {name: tuple(bootstrap.by_group(value, self.groups) for value in pair)
                    for name, pair in sums.items()}
        return bootstrap.intervals(sums, self.follow, seed=seed)


class Evaluations:
    """The evaluations of a stage, when each is due, and their rows, which are read when they are first needed."""

    def __init__(self, stage: Stage, cfg: Options, steps_per_epoch: int = 1):
        """Raises UserError where a stage's declaration is not allowed, see `evaluations.declared`."""
        self.stage, self.cfg = stage, cfg
        self.declared = evaluations.declared(stage)
        self.intervals = {each.name: each.steps(cfg, steps_per_epoch) for each in self.declared}
        self._rows: dict[tuple[str, str], Rows | None] = {}

    def interval(self, metric: str) -> int:
        """Steps between two evaluations in which a metric is computed."""
        return self.intervals[evaluations.of(metric)]

    def is_due(self, step: int) -> bool:
        """Whether an interval ends at a step (from 1)."""
        return any(step % interval == 0 for interval in self.intervals.values())

    def times(self, step: int, steps: int) -> int:
        """The number of evaluations in the first `step` steps of a run of `steps` steps."""
        sets = [chosen for size in range(1, len(self.intervals) + 1)
                for chosen in itertools.combinations(set(self.intervals.values()), size)]
        ends: int = sum((-1) ** (len(chosen) + 1) * (step // math.lcm(*chosen)) for chosen in sets)
        return ends + (step == steps and not self.is_due(step))

    def due(self, step: int, steps: int) -> list[Evaluation]:
        """The evaluations to do at a step: those whose interval ends there. All of them after the last step, and where
        no interval ends, since then a callback has asked for one. This follows from the step alone, so that a resumed
        run does an interrupted evaluation from its beginning."""
        ends = [each for each in self.declared if step % self.intervals[each.name] == 0]
        return ends if ends and step < steps else list(self.declared)

    def rows(self, evaluation: Evaluation, split: str) -> Rows | None:
        """The rows of an evaluation in a split, or in "all" of them; None where it has none there by its declaration.
        Raises UserError where they are empty."""
        if (evaluation.name, split) not in self._rows:
            self._rows[evaluation.name, split] = self._read(evaluation, split)
        return self._rows[evaluation.name, split]

    def _read(self, evaluation: Evaluation, split: str) -> Rows | None:
        asked = {part: evaluation.rows(part) for part in (self.stage.splits() if split == ALL else (split,))}
        parts: dict[str, Any] = {part: rows for part, rows in asked.items() if rows is not None}
        if not parts:
            return None
        if endless := [part for part, rows in parts.items() if not isinstance(rows, Sized)]:
            raise UserError(f"--split {split}: the {endless[0]} data are a stream, which has no end: evaluate the "
                            "validation or the test split")
        sizes = {part: len(rows) for part, rows in parts.items()}
        total, limit = sum(sizes.values()), evaluation.limit(self.cfg)
        if not total:
            raise UserError(f"there are no {split} samples for evaluation {evaluation.name}: give more data")
        dataset: Any = ConcatDataset(parts.values()) if len(parts) > 1 else next(iter(parts.values()))
        found = [evaluation.groups(part) for part in parts]
        groups = None if None in found else [group for part in found for group in part or ()]
        numbers: Sequence[int] = range(total)
        if limit and limit < total:
            numbers = [number * total // limit for number in range(limit)]
            dataset, groups = Subset(dataset, numbers), groups and [groups[row] for row in numbers]
        return Rows(dataset, total, sizes, numbers, groups, evaluation.rows != self.stage.dataset)

    def describe(self) -> list[str]:
        """A line for each evaluation, where there are several or one does not use all rows."""
        lines = []
        for each in self.declared:
            rows = self.rows(each, "validation")
            of = f"{len(rows.dataset):,} of {rows.total:,} rows" if rows else "no validation rows"
            batch = f", in batches of {each.batch_size:,}" if each.batch_size else ""
            interval = self.intervals[each.name]
            when = f"every {interval:,} steps" if interval < ENDLESS else "after the last step"
            lines.append(f"Evaluation {each.name}: {when}, {of}{batch}")
        return lines if len(lines) > 1 or self.declared[0].limit(self.cfg) else []

    def run(self, split: str, model: Any, cfg: Options, device: torch.device, stopped: Callable[[], object],
            chosen: Sequence[Evaluation] | None = None) -> list[Scores] | None:
        """Do all evaluations, or the `chosen` ones, that have rows in the split. Returns their scores; None if
        `stopped()` was true in between. The scores of one that ran out of memory have a `problem`."""
        done = []
        for each in self.declared if chosen is None else chosen:
            if (rows := self.rows(each, split)) is None:
                continue
            try:
                scores = evaluate(self.stage, model, rows.dataset, cfg, device, stopped, each)
            except MemoryError as error:
                scores = Scores(each.name, {}, {}, problem=str(error))
            if scores is None:
                return None
            self._check_best(scores, split)
            done.append(scores._replace(rows=rows))
        return done

    def _check_best(self, scores: Scores, split: str) -> None:
        """Raises UserError where the best metric was not computed. On other splits than validation its counts may
        all be 0."""
        best = self.stage.best[0]
        if evaluations.of(best) != scores.name or scores.problem or best in scores.metrics:
            return
        if not scores.uncounted:
            raise UserError(f"stage {self.stage.name} names {best} as its best metric, but evaluation {scores.name} "
                            f"computes {', '.join(scores.metrics) or 'nothing'}")
        if split == "validation":
            raise UserError(f"the best metric, {best}, cannot be computed: {_nothing_counted(scores.uncounted)} of the "
                            "validation set; return the number that each total is over, or validate on rows that have "
                            "such")


def merged(done: Sequence[Scores]) -> dict[str, float]:
    """The metrics of several evaluations."""
    return {name: value for scores in done for name, value in scores.metrics.items()}


def evaluate(stage: Stage, model: Any, dataset: Any, cfg: Options, device: torch.device,
             stopped: Callable[[], object], evaluation: Evaluation | None = None) -> Scores | None:
    """Score a model on all rows by an evaluation (default: the stage's first). Returns None if `stopped()` was true in
    between. Leaves the global random state as it was.

    Retries in smaller batches where memory does not suffice; raises MemoryError where that is not possible.
    """
    evaluation = evaluation or stage.evaluations()[0]
    size = evaluation.batch_size or cfg.batch_size
    try:
        return _evaluate(stage, model, dataset, replace(cfg, batch_size=size), device, stopped, evaluation)
    except Abandoned:
        return None
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        why = first_line(error)
    if not evaluation.divisible or size == 1:
        raise MemoryError(f"an evaluation in batches of {size} does not fit into memory ({why})")
    size = (size + 1) // 2
    log.warning("evaluation: out of memory; it is done in batches of %s", size)
    return evaluate(stage, model, dataset, cfg, device, stopped, replace(evaluation, batch_size=size))


def score_batch(evaluation: Evaluation, model: Any, batch: Batch, device: torch.device,
                precision: str) -> tuple[Batch, dict[str, Ratio], dict[str, Tensor]]:
    """Returns the batch on the device, its scores and its gathered tensors. The caller has put the model into
    evaluation mode and switched gradients off."""
    with devices.autocast(device, precision):
        batch = devices.move(contract.checked_batch(f"evaluation {evaluation.name}", batch), device)
        scores, gathered = evaluation.score(model, batch), evaluation.gather(model, batch)
    contract.check_scores(evaluation.name, "score", scores)
    contract.check_gathered(evaluation.name, gathered)
    return batch, scores, gathered


def _evaluate(stage: Stage, model: Any, dataset: Any, cfg: Options, device: torch.device,
              stopped: Callable[[], object], evaluation: Evaluation) -> Scores | None:
    scored, whole, size, terms = _Figures(cfg.confusions), _Figures(), Counter[str](), dict[str, None]()
    gathered, collate, phase = defaultdict[str, list[Tensor]](list), evaluation.collate, stage.phases()[-1].name
    rows = stretches(dataset)[0][:cfg.batch_size]
    workers = workers_that_fit(devices.loader_workers(device, cfg.num_workers), dataset, collate, rows)
    with torch.no_grad(), rng.preserved():
        rng.seed(cfg.seed)
        model.eval()
        batches = evaluation_batches(dataset, collate, cfg.batch_size, workers, stopped)
        try:
            for batch in batches:
                if stopped():
                    return None
                batch, scores, gathering = score_batch(evaluation, model, batch, device, cfg.precision)
                scored.add(scores)
                for name, tensor in gathering.items():
                    gathered[name].append(tensor.cpu())
                terms |= dict.fromkeys(stage.counts(batch, phase) if collate == stage.collate else ())
                if evaluation.size:
                    size.update(contract.checked_size(f"evaluation {evaluation.name}", evaluation.size(batch)))
                progress.mark()
        finally:
            close(batches)
        if gathered:
            found = evaluation.judge({name: torch.cat(parts) for name, parts in gathered.items()})
            contract.check_scores(evaluation.name, "judge", found, plain=True)
            whole.add({name: value if isinstance(value, Ratio) else Ratio(value, 1) for name, value in found.items()})
    uncounted = [*scored.sums.uncounted(), *whole.sums.uncounted()]
    if uncounted:
        log.warning("evaluation %s: %s, so it is left out", evaluation.name, _nothing_counted(uncounted))
    follow = _following(stage, cfg, evaluation, list(terms), uncounted)
    metrics = scored.means(evaluation.name) | whole.means(evaluation.name)
    rates = scored.by_sample(evaluation.name, len(dataset)) | whole.by_sample(evaluation.name, len(dataset))
    return Scores(evaluation.name, metrics | follow(metrics), dict(size) or {"samples": len(dataset)}, rates, follow,
                  uncounted=uncounted, pairs={f"{evaluation.name}/{name}": pairs
                                              for name, pairs in scored.pairs.items()})


def _nothing_counted(figures: Sequence[str]) -> str:
    return f"the count of {', '.join(figures)} is 0 in all rows"


class _Figures:
    """Sums of the figures of an evaluation, and the values by sample of the figures that have them; if asked for, also
    the texts that error rates compare."""

    def __init__(self, keeps_pairs: bool = False):
        self.keeps_pairs, self.pairs = keeps_pairs, defaultdict[str, list[Pair]](list)
        self.sums, self.samples = Totals(), defaultdict[str, list[Samples]](list)

    def add(self, figures: Mapping[str, Ratio]) -> None:
        for name, ratio in figures.items():
            self.sums.add(name, ratio)
            if isinstance(ratio, Sampled):
                self.samples[name].append(ratio.samples)
            elif isinstance(ratio.total, Tensor) and ratio.total.dim():
                self.samples[name].append((ratio.total, ratio.count))
            if self.keeps_pairs and isinstance(ratio, ErrorRates):
                self.pairs[name] += ratio.pairs

    def means(self, evaluation: str) -> dict[str, float]:
        """Without the figures of which nothing was counted."""
        uncounted = self.sums.uncounted()
        return {f"{evaluation}/{name}": value for name, value in self.sums.means().items() if name not in uncounted}

    def by_sample(self, evaluation: str, rows: int) -> dict[str, Ratio]:
        """Raises UserError where there is not one entry for each row."""
        found = {f"{evaluation}/{name}": Ratio(*map(torch.cat, zip(*parts))) for name, parts in self.samples.items()}
        for name, ratio in found.items():
            if (sizes := [len(ratio.total), len(ratio.count)]) != [rows, rows]:
                raise UserError(f"{name} has totals of {sizes[0]} samples and counts of {sizes[1]}, but {rows} rows "
                                "were evaluated: there must be one of each for every row")
        return found


def _following(stage: Stage, cfg: Options, evaluation: Evaluation, terms: Sequence[str],
               uncounted: Sequence[str]) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """A function that computes more metrics from the means of an evaluation: those of `Stage.derive`, and the loss
    where it has several terms, with their weights at the end of the run. A "loss" that the stage itself scores is kept.

    `terms`: those of the loss; a term that is `uncounted` adds nothing.
    """
    phase, steps, prefix = stage.phases()[-1].name, cfg.max_steps or 1, f"{evaluation.name}/"
    weights = stage.weights(Moment(phase, steps, steps)) if terms else {}
    several = len(terms) > 1 or any(weights.get(term, 1.0) != 1.0 for term in terms)
    counted = {prefix + term: term for term in terms if term not in uncounted}

    def follow(means: Mapping[str, float]) -> dict[str, float]:
        weighed = {}
        own = f"{prefix}loss" in means.keys() - counted.keys()
        if several and counted and counted.keys() <= means.keys() and not own:
            weighed = {f"{prefix}loss": sum(weights.get(term, 1.0) * means[name] for name, term in counted.items())}
        return weighed | stage.derive({**means, **weighed})

    return follow
