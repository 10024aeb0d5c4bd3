"""Batches of like length: within their limits, each row once an epoch, as many steps in each, the same for ever."""

import random

import pytest

from stoker.data.loader import LengthOrder

LIMITS = [(400, 16, 1, 30.0), (400, 16, 3, 0.0), (37, 4, 2, 8.0), (5, 2, 1, 1.0), (1, 8, 2, 100.0)]


def made(size: int, batch: int, accum: int, limit: float, seed: int = 1) -> LengthOrder:
    draw = random.Random(size)
    lengths = tuple(draw.choice((1.0, 2.5, round(draw.uniform(0.3, 12), 2))) for _ in range(size))
    return LengthOrder(size, batch, accum, seed, lengths=lengths, batch_length=limit)


def epoch(order: LengthOrder, number: int) -> list[list[list[int]]]:
    first = number * order.steps_per_epoch
    return [order.rows(step) for step in range(first, first + order.steps_per_epoch)]


@pytest.mark.parametrize("size, batch, accum, limit", LIMITS)
def test_each_row_once_an_epoch_within_the_limits(size: int, batch: int, accum: int, limit: float) -> None:
    order = made(size, batch, accum, limit)
    for number in range(3):
        steps = epoch(order, number)
        assert sorted(row for step in steps for part in step for row in part) == list(range(size))
        assert all(1 <= len(step) <= accum for step in steps) and all(len(step) == accum for step in steps[:-1])
        for part in (part for step in steps for part in step):
            longest = max(order.lengths[row] for row in part)
            assert len(part) <= batch and (len(part) == 1 or not limit or longest * len(part) <= limit + 1e-9)


def test_little_of_a_batch_is_padding() -> None:
    order = made(400, 16, 1, 30.0)
    batches = [part for step in epoch(order, 0) for part in step]
    padded = sum(max(order.lengths[row] for row in part) * len(part) for part in batches)
    at_random = [list(range(400))[i:i + 8] for i in range(0, 400, 8)]
    careless = sum(max(order.lengths[row] for row in part) * len(part) for part in at_random)
    assert sum(order.lengths) > 0.85 * padded and sum(order.lengths) < 0.6 * careless


def test_other_batches_each_epoch_and_seed_and_the_same_for_ever() -> None:
    def batches(number: int, seed: int) -> set[frozenset[int]]:
        return {frozenset(part) for step in epoch(made(400, 16, 2, 30.0, seed), number) for part in step}

    first, second, other = batches(0, 1), batches(1, 1), batches(0, 2)
    assert len(first & second) < 0.2 * len(first) and len(first & other) < 0.2 * len(first)
    assert batches(1, 1) == second, "from (seed, epoch) alone"
    known = LengthOrder(6, 2, 1, 42, lengths=(1.0,) * 6)
    assert known.rows(4) == [[4, 0]], "what older runs have trained on must not change"


def test_long_and_short_batches_come_mixed() -> None:
    order = made(400, 16, 1, 30.0)
    longest = [max(order.lengths[row] for row in step[0]) for step in epoch(order, 0)]
    rises = sum(a < b for a, b in zip(longest, longest[1:]))
    assert 0.3 < rises / len(longest) < 0.7


def test_a_data_set_is_asked_for_the_epoch_too() -> None:
    order = made(37, 4, 2, 8.0)
    for step in (0, order.steps_per_epoch, 3 * order.steps_per_epoch + 1):
        number = step // order.steps_per_epoch
        assert order.items(step) == [[row + 37 * number for row in part] for part in order.rows(step)]
    last = 2 * order.steps_per_epoch
    assert list(order.micro_batches(1, last)) == [part for step in range(1, last) for part in order.items(step)]


def test_smaller_parts_and_gaps_leave_the_steps_as_they_are() -> None:
    order = made(400, 16, 2, 30.0)
    half = order.halved(True)
    assert isinstance(half, LengthOrder) and half.micro == 8 and half.steps_per_epoch == order.steps_per_epoch
    assert half.halved(True).micro == 4
    assert max(len(part) for step in range(30) for part in half.rows(step)) == 8
    gone = order.rows(3)[0][0]
    holed = LengthOrder(400, 16, 2, 1, {gone: 2}, lengths=order.lengths, batch_length=30.0)
    for step in range(60):
        rows = sum(order.rows(step), [])
        assert sum(half.rows(step), []) == rows
        assert sum(holed.rows(step), []) == [row for row in rows if step < 2 or row != gone]
    assert LengthOrder(40, 64, 1, 0, lengths=(2.0,) * 40, batch_length=30.0).halved(True).micro == 8, "half of 15"
    with pytest.raises(MemoryError, match="smaller ones are another loss"):
        order.halved(False)


def test_only_one_batch_has_a_rest() -> None:
    """What does not fill a batch goes with the next shorter rows."""
    lengths = tuple(length for length in (1.0, 0.7, 0.45, 0.3) for _ in range(5))
    assert LengthOrder(20, 4, 1, 0, lengths=lengths).steps_per_epoch == 5


def test_examples_stand_for_all_rows() -> None:
    """As long as rows are in the mean, the longest first, and no batch that the run would not make."""
    order = made(400, 16, 1, 30.0)
    found = order.examples(8)
    longest = [max(order.lengths[row] for row in rows) for rows in found]
    assert longest == sorted(longest, reverse=True) and len(found) == 4
    for rows, most in zip(found, longest):
        assert len(set(rows)) == len(rows) == min(8, int(30.0 // most)) or len(rows) == 1
        assert min(order.lengths[row] for row in rows) > 0.5 * most
    means = [sum(order.lengths[row] for row in rows) / len(rows) for rows in found]
    assert sum(means) / 4 == pytest.approx(sum(order.lengths) / 400, rel=0.15)
    assert made(5, 2, 1, 1.0).examples(64) and made(1, 8, 2, 100.0).examples(2) == [[0]] * 4
