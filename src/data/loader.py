"""Which rows make up each step, and the loaders that fetch them.

The order of the rows comes from (seed, epoch) alone and the position in it is the step: going on anywhere costs
nothing, and what workers read ahead does not count as trained.
"""

import ctypes
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Order:
    """A fresh permutation of `size` rows each epoch, dealt out in micro-batches of `batch`, `accum` to a step.

    An epoch's last step takes what is left: nothing is thrown away, no step reaches into the next epoch. Rows that are
    left out leave gaps, so that all others keep their step. Neither these nor smaller micro-batches (`micro`) change
    which rows make up a step.
    """

    size: int
    batch: int
    accum: int
    seed: int
    left_out: Mapping[int, int] = field(default_factory=dict)  # row -> the step, from 0, from which on
    micro: int = 0  # rows in a micro-batch, where these are fewer than `batch`

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.size / (self.batch * self.accum))

    def rows(self, step: int) -> list[list[int]]:
        """The rows of one step, a list for each micro-batch; no list where all are left out."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        rows = _permutation(self.size, self.seed, epoch)[offset * self.batch * self.accum:][:self.batch * self.accum]
        size = self.micro or self.batch
        dealt = (rows[i:i + size].tolist() for i in range(0, len(rows), size))
        return [kept for part in dealt if (kept := [row for row in part if step < self.left_out.get(row, step + 1)])]

    def halved(self, divisible: bool) -> "Order":
        """The same in micro-batches of half the size. Raises MemoryError where they cannot be made smaller."""
        before = self.micro or min(self.batch, self.size)
        if before == 1 or not divisible:
            why = "they cannot be smaller" if divisible else "smaller ones are another loss: choose --batch_size so"
            raise MemoryError(f"micro-batches of {before} samples do not fit, and {why}; --gradient_checkpointing, "
                              "--precision bf16, shorter samples or a smaller preset take less")
        return replace(self, micro=(before + 1) // 2)

    def micro_batches(self, first: int, end: int) -> Iterator[list[int]]:
        """The micro-batches of steps `first` to `end` - 1, one after the other."""
        for step in range(first, end):
            yield from self.rows(step)


@lru_cache(maxsize=2)  # the epoch that is trained, and the next, where reading ahead has got to
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


class _Batches(Sampler[list[int]]):
    """Gives a DataLoader the micro-batches of a stretch of steps."""

    def __init__(self, order: Order, first: int, end: int):
        self.order, self.first, self.end = order, first, end

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.micro_batches(self.first, self.end)


def training_batches(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], order: Order, first: int, end: int,
                     workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """The micro-batches of steps `first` to `end` - 1, in one stream over all epochs."""
    loader = _loader(dataset, collate, workers, pin_memory, batch_sampler=_Batches(order, first, end))
    return _clear(iter(loader))  # the workers start now


def evaluation_batches(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], batch: int,
                       workers: int) -> Iterator[Any]:
    """Every row once, in its own order."""
    return _clear(iter(_loader(dataset, collate, workers, False, batch_size=batch)))


def _loader(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], workers: int, pin_memory: bool,
            **options: Any) -> DataLoader[Any]:
    """A DataLoader that leaves the global random state alone.

    Without a generator of its own, making an iterator draws from the global one, and a resumed run, which makes
    one more, would part from its course.
    """
    return DataLoader(dataset, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
                      generator=torch.Generator(), worker_init_fn=_start_worker, **options)


def _clear(batches: Iterator[Any]) -> Iterator[Any]:
    """What a worker's end leaves half read is told as that. torch does so only where nothing was on its way; what a
    data set raises itself begins with "Caught"."""
    try:
        yield from batches
    except (EOFError, ConnectionError) as error:
        if str(error).startswith("Caught "):
            raise
        raise RuntimeError("DataLoader worker is gone, what it sent cannot be read: it was killed, or crashed; for "
                           "want of memory, maybe: --num_workers 0 takes less") from error


def _start_worker(number: int) -> None:
    """Die with the trainer, however it dies; leave its signals to it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    trainer = multiprocessing.parent_process()
    if trainer is None or os.getppid() != trainer.pid:  # it died before that
        os._exit(1)
