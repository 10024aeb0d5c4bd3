"""Streams: read in one process, continued exactly where training was, not where reading ahead was."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from stoker.config import ENDLESS, UserError
from stoker.data.loader import training_batches
from stoker.data.stream import ROW_BITS, Shards, StreamOrder
from stoker.data.workers import close

SIZES = (5, 0, 1, 13, 0, 4)


def read(shard: int, row: int) -> Iterator[tuple[int, int]]:
    yield from ((shard, i) for i in range(row, SIZES[shard]))


def made(seed: int = 3) -> Shards:
    return Shards(len(SIZES), read, seed)


def walk(seed: int = 3) -> Iterator[tuple[int, int]]:
    for epoch in range(10**6):
        for shard in np.random.default_rng((seed, epoch)).permutation(len(SIZES)):
            yield from ((int(shard), i) for i in range(SIZES[shard]))


def number(sample: tuple[int, int]) -> int:
    return sample[0] * 2**32 + sample[1]


def test_shards_are_read_in_another_order_each_time_and_continued_anywhere() -> None:
    expected = list(islice(walk(), 100))
    assert [sample for _, sample in islice(made(), 100)] == expected
    assert [name for name, _ in islice(made(), 100)] == [number(sample) for sample in expected]
    for count in range(80):
        stream = made()
        list(islice(stream, count))
        again = made()
        again.load_state_dict(stream.state_dict())
        assert [sample for _, sample in islice(again, 20)] == expected[count:count + 20]
    assert len({tuple(expected[i:i + 23]) for i in range(0, 92, 23)}) > 1, "another order of the shards"
    stream = made()
    assert all(stream[number(sample)] == sample for sample in expected) and stream.state_dict() == made().state_dict()


def test_shards_without_samples_are_refused() -> None:
    with pytest.raises(UserError, match="no samples in the 3 shards"):
        next(iter(Shards(3, lambda shard, row: iter(()), 0)))


def order(**options: Any) -> StreamOrder:
    return StreamOrder(batch=3, accum=2, stream=made(), **options)


def batches(order: StreamOrder, first: int, end: int, workers: int = 0) -> Iterator[Any]:
    return training_batches(order.stream, list, order, first, end, workers)


def samples(first: int, end: int) -> list[list[tuple[int, int]]]:
    found = list(islice(walk(), 6 * end))
    return [found[i:i + 3] for i in range(6 * first, 6 * end, 3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_is_that_of_the_step(workers: int) -> None:
    """Though a worker has read further, and though the rows of the next step were asked for."""
    for last in (0, 2, 7):
        first = order()
        assert first.steps_per_epoch == ENDLESS and first.samples(5) == 30
        stream = batches(first, 0, 20, workers)
        for step in range(last):
            expected = [[number(sample) for sample in part] for part in samples(step, step + 1)]
            assert first.rows(step) == first.items(step) == expected
            assert [next(stream) for _ in range(2)] == samples(step, step + 1)
        first.rows(last)
        state = first.state_dict(last)
        again = order()
        again.load_state_dict(last, state)
        assert list(batches(again, last, 12, workers)) == samples(last, 12)
        close(stream)


def test_opened_again_it_begins_at_the_step_in_hand() -> None:
    """In smaller micro-batches, or with rows left out; all other rows keep their step."""
    whole = order()
    stream = batches(whole, 0, 20)
    assert [next(stream) for _ in range(4)] == samples(0, 2)
    gone = whole.rows(2)[0][1]
    later = replace(whole.halved(True), left_out={gone: 2})
    assert later.micro == 2
    stream = batches(later, 2, 4)
    rows = [whole_row for part in samples(2, 3) for whole_row in part]
    assert later.rows(2) == [[number(rows[0])], [number(row) for row in rows[2:4]], [number(row) for row in rows[4:]]]
    assert [sample for batch in stream for sample in batch] == [
        sample for part in samples(2, 4) for sample in part if number(sample) != gone]
    everything = {number(sample): 2 for sample in rows}
    third = replace(whole, left_out=everything)
    stream = batches(third, 2, 4)
    assert third.rows(2) == [] and next(stream) == samples(3, 4)[0], "a step without rows has no batches"


def test_few_steps_are_remembered() -> None:
    long = order()
    list(batches(long, 0, 1500))
    assert long.rows(1499) and long.rows(700) and not long.rows(100)
    assert len(long.reading.positions) <= 4 and long.rows(5000) == []


class Ends(Shards):
    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return islice(super().__iter__(), 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_ends_is_reported(workers: int) -> None:
    ending = StreamOrder(batch=3, accum=2, stream=Ends(len(SIZES), read, 3))
    with pytest.raises(UserError, match="^the stream of training data has ended in step 4, but 9 steps are to be"):
        list(batches(ending, 0, 9, workers))


def test_examples_leave_the_position_alone() -> None:
    stream = order()
    list(islice(stream.stream, 4))
    before = stream.stream.state_dict()
    assert stream.examples(3) == [[number(sample) for sample in islice(walk(), 4, 7)]]
    assert stream.stream.state_dict() == before


def test_a_number_has_room_for_any_shard_and_row() -> None:
    draw = random.Random(4)
    for _ in range(20):
        shard, row = draw.randrange(2**30), draw.randrange(2**32)
        stream = Shards(2**31, lambda shard, row: iter([(shard, row)]), 0)
        assert stream[(shard << ROW_BITS) + row] == (shard, row) and (shard << ROW_BITS) + row < 2**63
