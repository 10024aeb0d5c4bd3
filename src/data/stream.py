"""Training data without a length: samples are read one after the other, and a snapshot holds the position.

What is read ahead does not count: each step comes with the position after it, and that of the last step trained is
saved. One process reads: a loader worker, or the trainer itself.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from stoker.config import ENDLESS, UserError
from stoker.data.loader import Order, batches
from stoker.data.workers import Shared, close, workers_that_fit

REMEMBERED = 1000  # steps whose rows can be named afterwards
ROW_BITS = 32  # a sample's number is its shard * 2**ROW_BITS + its row in it


class Stream(Protocol):
    """What a stage's `dataset("train")` may be instead of a data set with a length."""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(number, sample) from the position on, without end. Numbers are below 2**63; a sample keeps its number."""

    def __getitem__(self, number: int) -> Any:
        """A sample once more, to find out why a step failed; the position stays as it is."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample that was yielded, in numbers, strings, lists and dictionaries."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from that position with the next `iter`."""


class Shards:
    """A stream of files, or of other parts: passed through again and again, each time in another order of the shards.

    read(shard, row)   yields the samples of a shard (from 0) from that row on

    Within a shard the order is that of the file: shuffle when you write them. Raises UserError where all are empty.
    """

    def __init__(self, count: int, read: Callable[[int, int], Iterator[Any]], seed: int):
        self.count, self.read, self.seed = count, read, seed
        self.epoch, self.place, self.row = 0, 0, 0  # of the next sample; `place` is the shard's in this epoch's order

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while True:
            shards = np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()
            whole, found = self.place == self.row == 0, False
            for self.place in range(self.place, self.count):
                shard = shards[self.place]
                for sample in self.read(shard, self.row):
                    found, self.row = True, self.row + 1
                    yield (shard << ROW_BITS) + self.row - 1, sample
                self.row = 0
            if whole and not found:
                raise UserError(f"there are no samples in the {self.count} shards of the training data")
            self.epoch, self.place = self.epoch + 1, 0

    def __getitem__(self, number: int) -> Any:
        return next(self.read(number >> ROW_BITS, number % 2**ROW_BITS))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, "row": self.row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.place, self.row = state["epoch"], state["place"], state["row"]


class _Read(NamedTuple):
    """A step as it was read."""

    step: int
    rows: list[list[int]]
    micro_batches: list[Any]
    position: dict[str, Any]  # after it


@dataclass
class _Reading:
    """What was read so far. All copies of an order share it."""

    positions: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> the position before it
    rows: dict[int, list[list[int]]] = field(default_factory=dict)  # step -> its rows
    ahead: deque[_Read] = field(default_factory=deque)  # looked at, not trained yet
    steps: Iterator[_Read] = iter(())


@dataclass(frozen=True)
class StreamOrder(Order):
    """Each step has the next `batch` x `accum` samples of a stream.

    There are no epochs: --max_steps must be given. Rows are called by the stream's numbers; those of steps long ago, or
    before this sitting, are not known any more.
    """

    size: int = ENDLESS
    batch: int = 1
    accum: int = 1
    seed: int = 0
    stream: Any = None  # a Stream
    reading: _Reading = field(default_factory=_Reading)

    def __post_init__(self) -> None:
        self.reading.positions = self.reading.positions or {0: self.stream.state_dict()}

    @property
    def steps_per_epoch(self) -> int:
        return ENDLESS

    def samples(self, steps: int) -> float:
        return steps * self.batch * self.accum

    def items(self, step: int) -> list[list[int]]:
        """Reads as far as that step."""
        reading = self.reading
        while step not in reading.rows and (read := next(reading.steps, None)):
            reading.ahead.append(read)
            reading.rows[read.step], reading.positions[read.step + 1] = read.rows, read.position
            for known, steps in ((reading.rows, REMEMBERED), (reading.positions, 3)):
                known.pop(read.step - steps, None)
        return reading.rows.get(step, [])

    def examples(self, count: int) -> list[list[int]]:
        """The first that there are."""
        before = self.stream.state_dict()
        numbers = [number for number, _ in islice(self.stream, count)]
        self.stream.load_state_dict(before)
        return [numbers]

    def open(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], first: int, end: int, workers: int,
             pin_memory: bool, stopped: Callable[[], object]) -> Iterator[Any]:
        workers = workers_that_fit(min(workers, 1), dataset, collate, self.examples(self.batch * self.accum)[0])
        steps = _Steps(self, Shared(collate) if workers else collate, first, end, self.reading.positions[first])
        self.reading.ahead.clear()
        for step in [step for step in self.reading.rows if step >= first]:
            del self.reading.rows[step]
        self.reading.steps = batches(steps, _itself, workers, pin_memory, stopped, batch_size=None)
        return _MicroBatches(self.reading.steps, self._micro_batches(first, end))

    def _micro_batches(self, first: int, end: int) -> Iterator[Any]:
        for step in range(first, end):
            self.items(step)
            yield from self.reading.ahead.popleft().micro_batches

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"position": self.reading.positions[step]}

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        self.reading.positions = {step: state["position"]}


@dataclass
class _MicroBatches(Iterator[Any]):
    steps: Iterator[_Read]
    found: Iterator[Any]

    def __next__(self) -> Any:
        try:
            return next(self.found)
        except StopIteration:
            self.close()
            raise

    def close(self) -> None:
        close(self.steps)


class _Steps(IterableDataset[_Read]):
    """Reads the samples of the steps `first` to `end` - 1, from a position on."""

    def __init__(self, order: StreamOrder, collate: Callable[[list[Any]], Any], first: int, end: int,
                 position: dict[str, Any]):
        self.order, self.collate, self.first, self.end, self.position = order, collate, first, end, position

    def __iter__(self) -> Iterator[_Read]:
        order, stream = self.order, self.order.stream
        stream.load_state_dict(self.position)
        samples = iter(stream)
        for step in range(self.first, self.end):
            found = list(islice(samples, order.batch * order.accum))
            if len(found) < order.batch * order.accum:
                raise UserError(f"the stream of training data has ended in step {step + 1}, but {self.end:,} steps are "
                                "to be trained: give a lower --max_steps, or let the stream begin again")
            size = min(order.micro or order.batch, order.batch)
            parts = [found[i:i + size] for i in range(0, len(found), size)]
            kept = [part for whole in parts if (part := [
                (number, sample) for number, sample in whole if step < order.left_out.get(number, step + 1)])]
            yield _Read(step, [[number for number, _ in part] for part in kept],
                        [self.collate([sample for _, sample in part]) for part in kept], stream.state_dict())


def _itself(read: Any) -> Any:
    return read
