"""Which rows make up each step, and the loaders that fetch them.

The order of the rows comes from (seed, epoch) alone and the position in it is the step: going on anywhere costs
nothing, and what workers read ahead does not count as trained.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from stoker.config import ENDLESS
from stoker.data.joined import Joined
from stoker.data.workers import LOOK, Awaited, Shared, start_worker, workers_that_fit

SIMILAR = 0.8  # times as long as the longest: what is shorter is batched with others
EXAMPLES = 1 / 8, 3 / 8, 5 / 8, 7 / 8  # shares of the rows, each in the middle of a quarter


@dataclass(frozen=True)
class Order:
    """A fresh permutation of `size` rows each epoch, in micro-batches of `batch`, `accum` to a step.

    An epoch's last step takes what is left: nothing is thrown away, no step reaches into the next epoch. Rows that are
    left out leave gaps, so that all others keep their step. Neither these nor smaller micro-batches (`micro`) change
    which rows make up a step.

    A data set that gives the same row otherwise in each epoch (`by_epoch`) is asked for row + epoch * size.
    """

    size: int
    batch: int
    accum: int
    seed: int
    left_out: Mapping[int, int] = field(default_factory=dict)  # row -> the step, from 0, from which on
    micro: int = 0  # rows in a micro-batch, where these are fewer than `batch`
    by_epoch: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.size / (self.batch * self.accum))

    def samples(self, steps: int) -> float:
        """How many rows the first `steps` steps have."""
        return steps / self.steps_per_epoch * self.size

    def rows(self, step: int) -> list[list[int]]:
        """The rows of one step, a list for each micro-batch; no list where all are left out."""
        return [[item % self.size for item in part] for part in self.items(step)]

    def items(self, step: int) -> list[list[int]]:
        """What a data set is asked for to give the rows of a step."""
        parts = (part.tolist() for part in self.planned(step))
        return [kept for part in parts if (kept := [item for item in part if not self.leaves_out(item, step)])]

    def leaves_out(self, item: int, step: int) -> bool:
        """Whether `step` does not train on an item, since its row is left out."""
        return step >= self.left_out.get(item % self.size, step + 1)

    def planned(self, step: int) -> list[np.ndarray]:
        """The items of a step's micro-batches, with those of rows that are left out."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        count = self.batch * self.accum
        return self.cut(self.in_epoch(self.shuffled(epoch)[offset * count:][:count], epoch))

    def halved(self, divisible: bool) -> "Order":
        """The same in micro-batches of half the size. Raises MemoryError where they cannot be made smaller."""
        before = self.micro or self.largest
        if before == 1 or not divisible:
            why = "they cannot be smaller" if divisible else "smaller ones are another loss: choose --batch_size so"
            raise MemoryError(f"micro-batches of {before} samples do not fit, and {why}; --gradient_checkpointing, "
                              "--precision bf16, shorter samples or a smaller preset take less")
        return replace(self, micro=(before + 1) // 2)

    def examples(self, count: int) -> list[list[int]]:
        """Micro-batches of at most so many rows, by which it can be told how long all take: each stands for as many. A
        row comes more than once where there are few."""
        return [[row % self.size for row in range(count)]]

    def steps_of(self, row: int) -> list[range]:
        """The steps in which a row may be trained on."""
        return [range(ENDLESS)]

    def micro_batches(self, first: int, end: int) -> Iterator[list[int]]:
        """The items of the micro-batches of steps `first` to `end` - 1, one after the other."""
        for step in range(first, end):
            yield from self.items(step)

    def open(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], first: int, end: int, workers: int,
             pin_memory: bool, stopped: Callable[[], object]) -> Iterator[Any]:
        """What `training_batches` returns."""
        workers = workers_that_fit(workers, dataset, collate, next(self.micro_batches(first, end), []))
        return batches(dataset, collate, workers, pin_memory, stopped, batch_sampler=_Batches(self, first, end))

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a snapshot of `step` needs to continue beside that number: nothing, but for a stream."""
        return {}

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue at `step` from what `state_dict` returned."""

    # -- what orders are made of ------------------------------------------------------------------------------------

    @property
    def largest(self) -> int:
        """Rows in the largest micro-batch, where memory suffices."""
        return min(self.batch, self.size)

    def cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Micro-batches of these rows."""
        size = min(self.micro or self.largest, self.largest)
        return [rows[i:i + size] for i in range(0, len(rows), size)]

    def in_epoch(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """What the data set is asked for to give these rows in an epoch."""
        return rows + epoch * self.size if self.by_epoch else rows

    @cached_property
    def shuffled(self) -> Callable[[int], Any]:
        """Epoch -> its shuffle. The last two that were asked for are cached, as reading ahead may be in the next."""
        return lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Any:
        return np.random.default_rng((self.seed, epoch)).permutation(self.size)


@dataclass(frozen=True)
class LengthOrder(Order):
    """Batches of rows of like length, so that little of them is padding: at most `batch` rows, and at most
    `batch_length` when each is padded to the longest; a row that is longer is a batch by itself.

    Rows that are nearly as long make a bucket. Each epoch shuffles the rows of each bucket, cuts them into batches, and
    shuffles the batches: other batches each time, and always as many.
    """

    by_epoch: bool = True
    lengths: tuple[float, ...] = ()  # by row: seconds of sound, columns of pixels
    batch_length: float = 0.0  # 0: no limit

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(sum(math.ceil(len(rows) / count) for rows, count in self._buckets) / self.accum)

    def examples(self, count: int) -> list[list[int]]:
        """Of buckets over all lengths, the longest first."""
        ends = np.cumsum([len(rows) for rows, _ in self._buckets])
        chosen = [self._buckets[int(np.searchsorted(ends, share * self.size, "right"))] for share in EXAMPLES]
        return [rows[np.linspace(0, len(rows) - 1, min(count, most, len(rows))).round().astype(int)].tolist()
                for rows, most in chosen]

    def planned(self, step: int) -> list[np.ndarray]:
        epoch, offset = divmod(step, self.steps_per_epoch)
        chosen = self.shuffled(epoch)[offset * self.accum:][:self.accum]
        return [part for batch in chosen for part in self.cut(self.in_epoch(batch, epoch))]

    @property
    def largest(self) -> int:
        return max(min(len(rows), count) for rows, count in self._buckets)

    @cached_property
    def _buckets(self) -> list[tuple[np.ndarray, int]]:
        """(rows, how many of them make a batch), the longest first. Each but the last is cut without a rest."""
        assert len(self.lengths) == self.size, (len(self.lengths), self.size)
        lengths = np.array(self.lengths)
        rows = np.argsort(-lengths, kind="stable")
        falling, found, start = -lengths[rows], [], 0
        while start < self.size:
            longest = -falling[start]
            fitting = self.batch_length // longest if self.batch_length and longest else self.batch
            count = max(1, min(self.batch, int(fitting)))
            alike = int(np.searchsorted(falling, -SIMILAR * longest, side="right")) - start
            end = start + max(count, alike - alike % count)
            found.append((rows[start:end], count))
            start = end
        return found

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch."""
        draw = np.random.default_rng((self.seed, epoch))
        batches = [shuffled[i:i + count] for rows, count in self._buckets for shuffled in [draw.permutation(rows)]
                   for i in range(0, len(rows), count)]
        return [batches[i] for i in draw.permutation(len(batches))]


class _Batches(Sampler[list[int]]):
    """Gives a DataLoader the micro-batches of a stretch of steps."""

    def __init__(self, order: Order, first: int, end: int):
        self.order, self.first, self.end = order, first, end

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.micro_batches(self.first, self.end)


def training_batches(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], order: Order, first: int, end: int,
                     workers: int, pin_memory: bool = False, stopped: Callable[[], object] = lambda: False
                     ) -> Iterator[Any]:
    """The micro-batches of steps `first` to `end` - 1, in one stream over all epochs.

    Raises Abandoned within about a second where `stopped` says so while a batch of the workers is awaited.
    """
    return order.open(dataset, collate, first, end, workers, pin_memory, stopped)


def evaluation_batches(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], batch: int, workers: int,
                       stopped: Callable[[], object] = lambda: False) -> Iterator[Any]:
    """Every row once, in its own order; no batch has rows of two sources. Raises Abandoned as `training_batches` does.
    """
    chosen = [part[first:first + batch] for part in stretches(dataset) for first in range(0, len(part), batch)]
    return batches(dataset, collate, workers, False, stopped, batch_sampler=chosen)


def stretches(dataset: Any) -> list[range]:
    """The rows of a data set in their order, cut where those of another source begin: also in a selection of the rows
    of a Joined, and in several of them in a row."""
    edges = sorted({0, *_starts(dataset), len(dataset)})
    return list(map(range, edges, edges[1:]))


def _starts(dataset: Any) -> list[int]:
    if isinstance(dataset, Joined):
        return list(dataset.starts.values())
    if isinstance(dataset, Subset):  # of rows in their order
        return [bisect_left(dataset.indices, start) for start in _starts(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [first + start for first, part in zip([0, *dataset.cumulative_sizes], dataset.datasets)
                for start in _starts(part)]
    return []


def batches(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], workers: int, pin_memory: bool,
            stopped: Callable[[], object], **options: Any) -> Iterator[Any]:
    """The batches of a DataLoader with these further options; its workers start now."""
    found = iter(_loader(dataset, collate, workers, pin_memory, **options))
    return Awaited(found, stopped) if workers else found


def _loader(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], workers: int, pin_memory: bool,
            **options: Any) -> DataLoader[Any]:
    """A DataLoader that leaves the global random state alone.

    Without a generator of its own, making an iterator draws from the global one, and a resumed run, which makes
    one more, would part from its course.
    """
    return DataLoader(dataset, collate_fn=Shared(collate) if workers else collate, num_workers=workers,
                      pin_memory=pin_memory, generator=torch.Generator(), worker_init_fn=start_worker,
                      timeout=LOOK if workers else 0, **options)
