"""Batches, and metrics as ratios of sums."""

from typing import Any, NamedTuple

Batch = dict[str, Any]


class Ratio(NamedTuple):
    """A metric as a ratio of sums, so that means over uneven batches are exact.

    `total` is a sum over samples (tokens, words, ...), not their mean; `count` is how many there are.
    Either may be a scalar tensor, which stays on its device until the log step.
    """

    total: Any
    count: Any
