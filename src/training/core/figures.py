"""What stages and the loop pass each other: batches, losses, and metrics as ratios of sums."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, Any]
Samples = tuple["Tensor", "Tensor"]  # totals and counts, (B,) each


class Ratio(NamedTuple):
    """A metric as a ratio of sums, so that means over uneven batches are exact.

    `total` is a sum over samples (tokens, words, ...), not their mean; `count` is how many there are.
    Either may be a scalar tensor, which stays on its device until the log step. In an evaluation both may be 1-D
    tensors with an entry for each sample: their sums count, and the metric has a confidence interval.
    """

    total: Any
    count: Any


class Sampled(Ratio):
    """A ratio of an evaluation that is known sample by sample as well, so it has a confidence interval.

    `samples` are totals and counts, two 1-D tensors with an entry for each sample. The metric itself is `total` over
    `count`: it keeps its bits, whatever the order in which the samples would be added.
    """

    samples: "Samples"

    def __new__(cls, total: Any, count: Any, samples: "Samples") -> "Sampled":
        ratio = super().__new__(cls, total, count)
        ratio.samples = samples
        return ratio


class Goal(NamedTuple):
    """A value that the best evaluation should reach: of the stage's `best` metric, or of one that `Stage.derive`
    computes from that. `Stage.best` says whether to be below it or above it."""

    metric: str
    value: float
    data: str = ""  # the data that the goal is meant for; empty: any data


class Moment(NamedTuple):
    """Where training is when a loss is computed."""

    phase: str = "main"
    step: int = 0  # steps done before this one
    steps: int = 1  # of the whole run
    passed: Any = None  # what the phase before computed from the same micro-batch, without its graph


class Loss(NamedTuple):
    """The loss of a micro-batch.

    `terms` are sums, each over what `Stage.counts` counts under the same name; the loop divides them by the counts of
    the whole step and weighs them. `figures` are for the log. `passed` is given to the next phase of the same step, in
    `Moment.passed`, after its tensors were detached. `samples` are terms sample by sample, as in `Sampled`: with them
    the validation loss has a confidence interval.
    """

    terms: "Mapping[str, Tensor]"
    figures: Mapping[str, Ratio] = {}
    passed: Any = None
    samples: "Mapping[str, Samples]" = {}
