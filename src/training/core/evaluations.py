"""The evaluations that a stage declares: on which rows, by which metrics, how often."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker.config import UserError
from stoker.training.core.figures import Batch, Ratio

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from stoker.training.core.options import Options
    from stoker.training.core.stage import Stage

# Figures named train/..., gradients/... and so on are of the training and of monitors, never of an evaluation.
RESERVED = ("train", "gradients", "updates", "weights", "health", "speed", "system")


def _nothing(*given: Any) -> dict[str, Any]:
    return {}


def _no_groups(split: str) -> None:
    return None


@dataclass(frozen=True)
class Evaluation:
    """Rows and the metrics that are computed on them, which are logged as NAME/metric.

    name        lower case letters, digits and _
    rows        split -> its rows, or None where this evaluation has none: "validation" during training, "test" at the
                end of a run that has such a split. Called when the rows are needed, perhaps more than once
    collate     samples -> batch
    score       model, batch -> metrics as ratios of sums. It may generate text. A `Ratio` of two 1-D tensors with an
                entry for each sample, and a `Sampled`, also have a confidence interval in reports. Random numbers
                drawn in it follow from --seed
    gather      model, batch -> what `judge` needs of each batch, tensors with a row for each sample
    judge       everything gathered, in the order of the rows, on the CPU -> metrics that are no ratios of sums. A
                `Sampled` with an entry for each row has a confidence interval: how much the metric would vary with
                other queries among the same candidates
    size        batch -> how much it holds: {"samples": 32, "tok": 8192}; by default rows are counted
    groups      split -> the group of each row, such as its speaker: groups are resampled whole for the confidence
                interval. None, or "" for a row, where rows are independent
    every       1: as often as --eval_interval; 3: every third time
    interval    steps between these evaluations, whatever --eval_interval is; 0: as `every` says
    max_rows    evaluate at most this many rows, evenly spread over the set; 0: all
    batch_size  samples in a batch; 0: as many as in a micro-batch of training
    divisible   the metrics do not depend on the batch size, so smaller batches may be used where memory is short
    """

    name: str
    rows: "Callable[[str], Dataset[Any] | None]"
    collate: Callable[[list[Any]], Batch]
    score: Callable[[Any, Batch], dict[str, Ratio]]
    gather: "Callable[[Any, Batch], dict[str, Tensor]]" = _nothing
    judge: "Callable[[Mapping[str, Tensor]], Mapping[str, float | Ratio]]" = _nothing
    size: Callable[[Batch], dict[str, int]] | None = None
    groups: Callable[[str], Sequence[str] | None] = _no_groups
    every: int = 1
    interval: int = 0
    max_rows: int = 0
    batch_size: int = 0
    divisible: bool = True

    def steps(self, cfg: "Options", steps_per_epoch: int) -> int:
        """The number of steps between two of these evaluations."""
        return self.interval or self.every * (cfg.eval_interval or steps_per_epoch)

    def limit(self, cfg: "Options") -> int:
        """The largest number of rows to evaluate; 0: all."""
        return min((most for most in (self.max_rows, cfg.eval_max_rows) if most), default=0)


def declared(stage: "Stage") -> tuple[Evaluation, ...]:
    """The evaluations of a stage. Raises UserError where a name is not allowed, or none computes the best metric."""
    found = tuple(stage.evaluations())
    names, reserved = [each.name for each in found], {*RESERVED, *(phase.name for phase in stage.phases())}
    for name, each in zip(names, found):
        if each.every < 1 or each.interval < 0:
            raise UserError(f"evaluation {name} of stage {stage.name}: every is {each.every} and interval "
                            f"{each.interval}; every must be at least 1, interval at least 0")
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in reserved or names.count(name) > 1:
            raise UserError(f"evaluation {name!r} of stage {stage.name}: a name has lower case letters, digits and _, "
                            f"occurs once, and is none of {', '.join(sorted(reserved))}")
    if stage.best[1] not in ("min", "max"):
        raise UserError(f"stage {stage.name} names {stage.best} as its best metric: the second is \"min\" or \"max\"")
    if of(stage.best[0]) not in names:
        raise UserError(f"stage {stage.name} names {stage.best[0]} as its best metric, but evaluates "
                        f"{', '.join(names) or 'nothing'}")
    return found


def of(metric: str) -> str:
    """The evaluation that a metric belongs to: "eval" for "eval/loss"."""
    return metric.partition("/")[0]


def is_score(name: str) -> bool:
    """Whether a figure in the log was computed by an evaluation."""
    return "/" in name and of(name) not in RESERVED and not name.endswith("/grad_norm")
