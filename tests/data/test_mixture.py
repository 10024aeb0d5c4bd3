"""Mixed data sets against simulations that walk from the first step on; shares, growth, one order after another."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from stoker.config import UserError
from stoker.data.joined import Joined, Sourced
from stoker.data.loader import LengthOrder, Order, evaluation_batches, training_batches
from stoker.data.mixture import InTurn, Mixture, Source, Turn, ramp, whole_shares


class Numbers(torch.utils.data.Dataset[int]):
    """Sample i is i, also beyond its end: so it is seen what the data set was asked for."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int) -> int:
        return item


def starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:number]) for number in range(len(sizes))]


def drawn(draw: random.Random, mixed: bool, **options: Any) -> Mixture:
    """Any mixture of one to five sources."""
    sizes = [draw.choice((1, 2, draw.randint(3, 60))) for _ in range(draw.randint(1, 5))]
    weights = [draw.choice((1, 2, 0.3, round(draw.uniform(0.05, 3), 2))) for _ in sizes]
    sources = [Source(Order(size, draw.randint(1, 9), 7, 0, by_epoch=draw.random() < 0.5), weight, start)
               for size, weight, start in zip(sizes, weights, starts(sizes))]
    return Mixture(sum(sizes), draw.randint(1, 9), draw.randint(1, 3), draw.randint(0, 99), sources=tuple(sources),
                   mixed=mixed, **options)


def walk(mixture: Mixture, number: int) -> Iterator[list[int]]:
    """What is asked for of one source, micro-batch by micro-batch (row by row, if mixed), epoch after epoch."""
    order, _, start = mixture.sources[number]
    size, epoch = 1 if mixture.mixed else order.batch, 0
    while True:
        rows = np.random.default_rng((mixture.seed + number * 2**64, epoch)).permutation(order.size)
        for first in range(0, order.size, size):
            yield [start + int(row) + (mixture.size * epoch if order.by_epoch else 0)
                   for row in rows[first:first + size]]
        epoch += 1


def source_of(mixture: Mixture, item: int) -> int:
    return max(number for number, source in enumerate(mixture.sources) if source.start <= item % mixture.size)


@pytest.mark.parametrize("mixed", [False, True])
def test_any_step_is_what_a_walk_from_the_first_comes_to(mixed: bool) -> None:
    draw = random.Random(1)
    for _ in range(60):
        mixture = drawn(draw, mixed)
        walks = [walk(mixture, number) for number in range(len(mixture.sources))]
        steps = [mixture.items(step) for step in range(40)]
        for parts in steps:
            assert len(parts) == mixture.accum and (not mixed or {len(part) for part in parts} == {mixture.batch})
            for part in parts:
                if mixed:
                    assert part == [next(walks[source_of(mixture, item)])[0] for item in part]
                else:
                    assert part == next(walks[source_of(mixture, part[0])])
        step = draw.randrange(40)
        again = Mixture(**vars_of(mixture))
        assert again.items(step) == steps[step], "without what came before"
        assert again.rows(step) == [[item % mixture.size for item in part] for part in steps[step]]


def vars_of(mixture: Mixture) -> dict[str, Any]:
    """The fields alone, none of what is cached."""
    return {name: getattr(mixture, name) for name in mixture.__dataclass_fields__}


@pytest.mark.parametrize("mixed", [False, True])
def test_shares_are_exact_to_less_than_one(mixed: bool) -> None:
    """From the first on and in any stretch of steps; within a source no row is used twice more than another."""
    draw = random.Random(2)
    hostile = [Source(Order(9, 1, 1, 0), weight, 0) for weight in (90, *[1] * 9, 0.5)]
    for mixture in [drawn(draw, mixed) for _ in range(30)] + [Mixture(9, 1, 1, 0, sources=tuple(hostile), mixed=mixed)]:
        weights = np.array([source.weight for source in mixture.sources])
        turns = mixture._turns.between(0, 600)
        counts = np.cumsum(turns[:, None] == np.arange(len(weights)), axis=0)
        due = np.arange(1, 601)[:, None] * weights / weights.sum()
        most = 1 - 1 / max(2 * len(weights) - 2, 1)
        assert np.abs(counts - due).max() <= most + 1e-9
        used = Counter(row for step in range(100) for part in mixture.rows(step) for row in part)
        for order, _, start in mixture.sources:
            if len(hostile) != len(weights):  # there the sources have the same rows
                times = [used[start + row] for row in range(order.size)]
                assert max(times) - min(times) <= 1


def test_a_smaller_source_is_passed_more_often_each_time_shuffled_otherwise() -> None:
    sources = Source(Order(100, 1, 1, 3)), Source(Order(10, 1, 1, 3), 1, 100)
    mixture = Mixture(110, 10, 1, 3, mixed=True, sources=sources)
    assert mixture.steps_per_epoch == 11 and mixture.passes(20) == (1.0, 10.0)
    small = [row for step in range(20) for row in mixture.rows(step)[0] if row >= 100]
    passes = [tuple(small[i:i + 10]) for i in range(0, 100, 10)]
    assert all(sorted(rows) == list(range(100, 110)) for rows in passes) and len(set(passes)) == 10
    alike = Mixture(20, 10, 1, 3, mixed=True, sources=(Source(Order(10, 1, 1, 3)), sources[1]._replace(start=10)))
    rows = sum(alike.rows(0) + alike.rows(1), [])
    assert [row for row in rows if row < 10] != [row - 10 for row in rows if row >= 10], "shuffles of their own"


def test_an_epoch_has_as_many_rows_as_all_sources() -> None:
    draw = random.Random(5)
    for _ in range(30):
        mixture = drawn(draw, True)
        steps = mixture.steps_per_epoch
        assert (steps - 1) * mixture.batch * mixture.accum < mixture.size <= steps * mixture.batch * mixture.accum
        assert mixture.samples(7) == pytest.approx(7 * mixture.batch * mixture.accum)
        plain = drawn(draw, False)
        parts = sum(-(-source.order.size // source.order.batch) for source in plain.sources)
        assert plain.steps_per_epoch == -(-parts // plain.accum)
        assert plain.samples(3) == pytest.approx(sum(times * source.order.size
                                                     for times, source in zip(plain.passes(3), plain.sources)))


def test_a_source_keeps_its_batches_of_like_length() -> None:
    lengths = tuple(1.0 + row % 7 for row in range(50))
    speech = LengthOrder(50, 8, 3, 0, lengths=lengths, batch_length=20)
    mixture = Mixture(90, 1, 2, 11, sources=(Source(Order(40, 4, 1, 0), 1, 0), Source(speech, 2, 40)))
    alone = LengthOrder(50, 8, 1, 11 + 2**64, lengths=lengths, batch_length=20)
    parts = [part for part in mixture.micro_batches(0, 60) if part[0] % 90 >= 40]
    assert len(parts) == 80 > 2 * alone.steps_per_epoch
    assert parts == [[40 + item % 50 + item // 50 * 90 for item in alone.items(step)[0]] for step in range(80)]
    with pytest.raises(TypeError, match="cannot be mixed within micro-batches"):
        Mixture(90, 1, 2, 11, sources=mixture.sources, mixed=True)


@pytest.mark.parametrize("weights, shares", [
    ((0.7, 0.2, 0.1), (7, 2, 1)), ((1, 1, 1), (1, 1, 1)), ((50, 100), (1, 2)), ((3,), (1,)),
    ((0.125, 0.1), (5, 4)), ((1e6, 3e4, 1234.5), (9697, 291, 12)), ((1 / 3, 2 / 3), (1, 2)),
    ((2**0.5, 1), (5858, 4142))])
def test_weights_become_whole_shares(weights: tuple[float, ...], shares: tuple[int, ...]) -> None:
    assert whole_shares(weights) == shares


@pytest.mark.parametrize("weights, message", [
    ((1, 0), "weight of 0 in a mixture: weights are positive"), ((1, float("nan")), "weight of nan"),
    ((-0.5, 1), "weight of -0.5"), ((float("inf"), 1), "weight of inf"),
    ((1e9, 1), r"weight of 1 among 1e\+09 in all is less than 1 in 10,000: raise it")])
def test_weights_of_no_use_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        whole_shares(weights)


# -- what every order can do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
def test_smaller_micro_batches_and_gaps_leave_the_steps_as_they_are(mixed: bool) -> None:
    draw = random.Random(6)
    for _ in range(30):
        mixture = drawn(draw, mixed, growth=((0, 1), (3, 4)))
        smaller = mixture
        while smaller.largest > 1 and smaller.micro != 1:
            smaller = smaller.halved(True)
        if smaller.largest > 1:
            assert isinstance(smaller, Mixture) and {len(part) for part in smaller.micro_batches(0, 9)} == {1}
        gone = mixture.rows(2)[0][0]
        holed = Mixture(**vars_of(smaller) | {"left_out": {gone: 2}})
        for step in range(9):
            rows = sum(mixture.rows(step), [])
            assert sum(smaller.rows(step), []) == rows
            assert sum(holed.rows(step), []) == [row for row in rows if step < 2 or row != gone]


def test_halves_are_of_the_largest_batch() -> None:
    mixture = Mixture(30, 1, 1, 0, sources=(Source(Order(20, 8, 1, 0), 1, 0), Source(Order(10, 3, 1, 0), 1, 20)))
    half = mixture.halved(True)
    assert half.micro == 4
    assert {len(part) for part in half.micro_batches(0, 4)} == {4, 3}, "the smaller ones stay"


@pytest.mark.parametrize("mixed", [False, True])
def test_steps_grow_as_the_schedule_says(mixed: bool) -> None:
    growth = ((0, 2), (3, 5), (10, 9))
    for mixture in [drawn(random.Random(seed), mixed, growth=growth) for seed in range(20)]:
        steady = Mixture(**vars_of(mixture) | {"growth": (), "accum": 1, "batch": 1})
        units = steady.micro_batches(0, 10**6)
        taken = 0
        for step in range(25):
            count = 2 if step < 3 else 5 if step < 10 else 9
            expected, taken = [next(units) for _ in range(count)], taken + count
            parts = mixture.items(step)
            assert sum(parts, []) == sum(expected, []) and (mixed or parts == expected)
            assert not mixed or [len(part) for part in parts[:-1]] == [mixture.batch] * (len(parts) - 1)
            assert sum(mixture.passes(step + 1)) > sum(mixture.passes(step))
        enough = sum(mixture._pass_lengths)
        sizes = [2] * 3 + [5] * 7 + [9] * 200
        assert sum(sizes[:mixture.steps_per_epoch - 1]) < enough <= sum(sizes[:mixture.steps_per_epoch])


def test_a_ramp_rises_evenly() -> None:
    def level(schedule: Any, step: int) -> int:
        return [count for first, count in schedule if first <= step][-1]

    schedule = ramp(8, 64, 1000, multiple=8)
    assert schedule[0] == (0, 8) and schedule[-1] == (1000, 64) and len(schedule) == 8
    for step in range(1200):
        exact = 8 + 56 * min(step, 1000) / 1000
        assert 0 <= exact - level(schedule, step) < 8 and level(schedule, step) % 8 == 0
    assert ramp(3, 3, 10) == ((0, 3),) and ramp(1, 5, 0) == ((0, 5),) and ramp(1, 3, 2) == ((0, 1), (1, 2), (2, 3))


def test_one_order_after_another() -> None:
    """With rows, batch size and epochs of its own, the first again from its beginning."""
    codec = LengthOrder(12, 4, 1, 5, lengths=tuple(1.0 + row % 3 for row in range(12)))
    talker = Order(30, 7, 2, 6, by_epoch=True)
    order = InTurn(42, turns=(Turn(0, codec), Turn(8, talker, 12), Turn(20, codec)))
    assert order.steps_per_epoch == codec.steps_per_epoch and codec.steps_per_epoch < 8
    for step in range(30):
        own, start, size = (talker.items(step - 8), 12, 30) if 8 <= step < 20 else (codec.items(step % 20), 0, 12)
        assert order.items(step) == [[start + item % size + item // size * 42 for item in part] for part in own]
    assert order.samples(10) == pytest.approx(codec.samples(8) + talker.samples(2))
    assert order.samples(25) == pytest.approx(codec.samples(8) + talker.samples(12) + codec.samples(5))
    half = order.halved(True)
    assert {len(part) for step in range(12, 14) for part in half.rows(step)} <= {4, 2, 1, 3} and half.micro == 4
    assert half.rows(0) == order.rows(0), "those were not larger"
    narrow = InTurn(42, turns=(Turn(0, Order(12, 2, 3, 5)), Turn(8, Order(30, 16, 1, 6), 12))).halved(True)
    assert narrow.micro == 8 and {len(part) for part in narrow.rows(0)} == {2}, "no larger than its own order has them"
    both = {row for rows in order.examples(99) for row in rows}
    assert min(both) < 12 <= max(both) < 42 and max(map(len, order.examples(99))) <= 7


def test_examples_are_of_all_sources_by_their_weights() -> None:
    sources = (Source(Order(20, 4, 1, 0), 3, 0), Source(LengthOrder(10, 3, 1, 0, lengths=(2.0,) * 10), 1, 20))
    found = Mixture(30, 1, 1, 0, sources=sources).examples(64)
    assert [len(rows) for rows in found if rows[0] < 20] == [4] * 3
    assert [len(rows) for rows in found if rows[0] >= 20] == [3] and len(found) == 4
    [rows] = Mixture(30, 8, 1, 0, sources=(sources[0], Source(Order(2, 1, 1, 0), 3, 20)), mixed=True).examples(8)
    assert len([row for row in rows if row < 20]) == 4 and set(rows[1::2]) | set(rows[::2]) <= set(range(22))


@pytest.mark.parametrize("order, message", [
    (lambda: Mixture(9, 1, 1, 0), "no orders"),
    (lambda: Mixture(9, 1, 1, 0, sources=(Source(Order(5, 1, 1, 0), 1, 5),)), "5 rows from row 5 on are not in"),
    (lambda: Mixture(9, 1, 1, 0, sources=(Source(Order(0, 1, 1, 0)),)), "0 rows"),
    (lambda: InTurn(9, turns=(Turn(1, Order(5, 1, 1, 0)),)), "begins at step 0"),
    (lambda: InTurn(9, turns=(Turn(0, Order(5, 1, 1, 0)), Turn(0, Order(4, 1, 1, 0)))), "steps rise"),
    (lambda: Mixture(9, 1, 1, 0, sources=(Source(Order(5, 1, 1, 0)),), growth=((0, 0),)).rows(0), "a step of 0"),
])
def test_orders_that_cannot_be_are_refused(order: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order()


# -- the data set behind it -----------------------------------------------------------------------------------------


def test_joined_samples_say_where_they_are_from() -> None:
    data = Joined({"none": Numbers(0), "speech": Numbers(5), "text": Numbers(3), "nothing": Numbers(0)})
    assert len(data) == 8 and data.starts == {"none": 0, "speech": 0, "text": 5, "nothing": 8}
    for epoch in range(3):
        for row in range(8):
            expected = ("speech", row + 5 * epoch) if row < 5 else ("text", row - 5 + 3 * epoch)
            assert data[row + 8 * epoch] == Sourced(*expected)


def test_an_evaluation_has_each_row_once_and_no_batch_of_two_sources() -> None:
    batches = list(evaluation_batches(Joined({"a": Numbers(5), "b": Numbers(4)}), list, 2, 0))
    assert sum(batches, []) == [("a", i) for i in range(5)] + [("b", i) for i in range(4)]
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2]


def test_some_rows_of_all_splits_have_no_batch_of_two_sources() -> None:
    splits = ConcatDataset([Joined({"a": Numbers(5), "b": Numbers(4)}), Joined({"a": Numbers(3), "b": Numbers(6)})])
    some = list(range(0, 18, 2))
    batches = list(evaluation_batches(Subset(splits, some), list, 3, 0))
    assert sum(batches, []) == [splits[row] for row in some]
    assert [[sample.source for sample in batch] for batch in batches] == [
        ["a"] * 3, ["b"] * 2, ["a"], ["b"] * 3], "rows 0, 2, 4; 6, 8; 10; 12, 14, 16"


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_are_the_same_whoever_reads_them(mixed: bool) -> None:
    data = Joined({"a": Numbers(11), "b": Numbers(4)})
    sources = (Source(Order(11, 3, 1, 0, by_epoch=True), 2), Source(Order(4, 2, 1, 0), 1, data.starts["b"]))
    mixture = Mixture(len(data), 4, 2, 9, sources=sources, mixed=mixed)
    found = [list(training_batches(data, list, mixture, 5, 12, workers)) for workers in (0, 1, 2)]
    assert found[0] == found[1] == found[2]
    assert found[0] == [[data[item] for item in part] for part in mixture.micro_batches(5, 12)]
    assert max(sample for batch in found[0] for source, sample in batch if source == "a") >= 11, "asked for by epoch"
    assert max(sample for batch in found[0] for source, sample in batch if source == "b") < 4
