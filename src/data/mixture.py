"""Orders made of other orders: several data sets mixed by weight, one order after another, steps that grow.

The position is the step here too: where each source is after any number of micro-batches is computed, not remembered.

    data = Joined({"speech": clips, "text": texts})
    speech = LengthOrder(len(clips), 16, 1, seed, lengths=seconds, batch_length=120)
    text = Order(len(texts), 32, 1, seed)
    Mixture(len(data), 32, 4, seed, sources=(Source(speech, 0.7, data.starts["speech"]),
                                             Source(text, 0.3, data.starts["text"])))
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from stoker.config import ENDLESS, UserError
from stoker.data.loader import Order

PERIOD = 10_000  # after so many micro-batches at most, the turns of a mixture's sources repeat
EXAMPLES = 8  # micro-batches that stand for all of a mixture

Schedule = tuple[tuple[int, int], ...]  # (from which step on, how many): the first from step 0, steps rising


class Source(NamedTuple):
    """A source of a mixture: its rows begin at row `start` of the data set."""

    order: Order
    weight: float = 1.0
    start: int = 0


class Turn(NamedTuple):
    """From `step` on, this order holds: its rows begin at row `start` of the data set."""

    step: int
    order: Order
    start: int = 0


@dataclass(frozen=True)
class Mixture(Order):
    """Several sources by weight, each shuffled and passed through again and again by itself.

    Unless `mixed`, each micro-batch is one of a source, as the source's own order makes them (rows of like length, the
    last of an epoch smaller), and weights are shares of the micro-batches. If `mixed`, each micro-batch has `batch`
    rows, those of each source in proportion to its weight; its sources must be plain orders. After any number of
    micro-batches (of rows, if mixed) each source has had its share, give or take less than one.

    Source number i is shuffled by (seed + i * 2**64, epoch): neither the seed of its own order counts, nor how many
    micro-batches that one makes a step of.

    An epoch of the mixture is as long as one pass through all its sources would be, whatever the weights: a source with
    more than its size's share is passed through more than once meanwhile (`passes`).

    size     rows of the whole data set, such as `len` of a Joined
    growth   how many micro-batches (rows, if mixed) each step has, instead of `accum` (`batch` x `accum` rows). An
             epoch is then as many steps as the first pass has, so later epochs have more rows.
    """

    by_epoch: bool = True
    sources: tuple[Source, ...] = ()
    mixed: bool = False
    growth: Schedule = ()

    def __post_init__(self) -> None:
        _check_places(self.size, self.sources)
        if self.mixed and any(type(source.order) is not Order for source in self.sources):
            raise TypeError("a source with batches of its own cannot be mixed within micro-batches")

    @property
    def steps_per_epoch(self) -> int:
        return self._sums.steps(sum(self._pass_lengths))

    def passes(self, steps: int) -> tuple[float, ...]:
        """How often each source is passed through in the first `steps` steps."""
        taken = self._turns.before(self._sums.before(steps))
        return tuple(float(count) / length for count, length in zip(taken, self._pass_lengths))

    def samples(self, steps: int) -> float:
        return sum(times * source.order.size for times, source in zip(self.passes(steps), self.sources))

    def planned(self, step: int) -> list[np.ndarray]:
        first, end = self._sums.before(step), self._sums.before(step + 1)
        if self.mixed:
            return self.cut(self._rows(first, end))
        return [part for number in range(first, end) for part in self._micro_batch(number)]

    def examples(self, count: int) -> list[list[int]]:
        """Of the sources in turn, in proportion to their weights."""
        if self.mixed:
            return [(self._rows(0, count) % self.size).tolist()]
        found, chosen = [], self._turns.spread(EXAMPLES)
        for number, source in enumerate(chosen):
            examples = self._orders[source].examples(count)
            rows = examples[chosen[:number].count(source) % len(examples)][:self._orders[source].largest]
            found.append([self.sources[source].start + row for row in rows])
        return found

    @property
    def largest(self) -> int:
        return self.batch if self.mixed else max(order.largest for order in self._orders)

    def _micro_batch(self, number: int) -> list[np.ndarray]:
        """One micro-batch, in several parts where it was to be made smaller."""
        source = self._turns.at(number)
        step = int(self._turns.before(number)[source])
        return [self._place(part, source) for part in self._orders[source].planned(step)]

    def _rows(self, first: int, end: int) -> np.ndarray:
        """Rows number `first` to `end` - 1 of all sources together."""
        turns, found = self._turns.between(first, end), np.empty(end - first, dtype=np.int64)
        for source, (begin, stop) in enumerate(zip(self._turns.before(first), self._turns.before(end))):
            found[turns == source] = self._place(_stretch(self._orders[source], int(begin), int(stop)), source)
        return found

    def _place(self, items: np.ndarray, source: int) -> np.ndarray:
        return _placed(items, self.sources[source].order, self.sources[source].start, self.size)

    @cached_property
    def _orders(self) -> tuple[Order, ...]:
        """The sources' orders, a micro-batch to a step."""
        return tuple(replace(source.order, accum=1, seed=self.seed + (number << 64), micro=self.micro)
                     for number, source in enumerate(self.sources))

    @cached_property
    def _pass_lengths(self) -> tuple[int, ...]:
        """Micro-batches (rows, if mixed) of each source in one of its epochs."""
        return tuple(order.size if self.mixed else order.steps_per_epoch for order in self._orders)

    @cached_property
    def _turns(self) -> "_Turns":
        return _turns(whole_shares([source.weight for source in self.sources]))

    @cached_property
    def _sums(self) -> "_Sums":
        return _Sums(self.growth or ((0, self.batch * self.accum if self.mixed else self.accum),))


@dataclass(frozen=True)
class InTurn(Order):
    """One order after another: for a stage whose phases have data of their own.

    Each begins with its first epoch when its turn begins. An epoch of the run is one of the last order, so that
    --max_steps says best how long it is.

    size   rows of the whole data set, such as `len` of a Joined
    """

    batch: int = 1
    accum: int = 1
    seed: int = 0
    by_epoch: bool = True
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        _check_places(self.size, self.turns)
        _check_schedule([turn.step for turn in self.turns])

    @property
    def steps_per_epoch(self) -> int:
        return self.turns[-1].order.steps_per_epoch

    def samples(self, steps: int) -> float:
        ends = [*(turn.step for turn in self.turns[1:]), steps]
        return sum(turn.order.samples(max(0, min(end, steps) - turn.step)) for turn, end in zip(self.turns, ends))

    def planned(self, step: int) -> list[np.ndarray]:
        number = bisect_right([turn.step for turn in self.turns], step) - 1
        turn = self.turns[number]
        parts = self._orders[number].planned(step - turn.step)
        return [_placed(part, turn.order, turn.start, self.size) for part in parts]

    def examples(self, count: int) -> list[list[int]]:
        """Of all orders."""
        return [[turn.start + row for row in rows[:turn.order.largest]]
                for turn in self.turns for rows in turn.order.examples(count)]

    def steps_of(self, row: int) -> list[range]:
        ends = [*(turn.step for turn in self.turns[1:]), ENDLESS]
        return [range(turn.step, end) for turn, end in zip(self.turns, ends)
                if turn.start <= row < turn.start + turn.order.size]

    @property
    def largest(self) -> int:
        return max(turn.order.largest for turn in self.turns)

    @cached_property
    def _orders(self) -> tuple[Order, ...]:
        return tuple(replace(turn.order, micro=self.micro) for turn in self.turns)


def ramp(first: int, last: int, steps: int, multiple: int = 1) -> Schedule:
    """A schedule that rises evenly from `first` at step 0 to `last` at step `steps`, in multiples of `multiple`."""
    levels = [first + (last - first) * step // max(1, steps) // multiple * multiple for step in range(steps)] + [last]
    return tuple((step, level) for step, level in enumerate(levels) if step == 0 or level != levels[step - 1])


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in proportion to the weights, as these are written in decimal. Where their sum would
    exceed PERIOD, they are rounded, so that it is PERIOD. Raises UserError where a weight is of no use."""
    if wrong := [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]:
        raise UserError(f"a weight of {wrong[0]} in a mixture: weights are positive numbers; to leave a source out, do "
                        "not name it")
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    unit = math.lcm(*((weight / total).denominator for weight in exact))
    if unit <= PERIOD:
        return tuple(int(weight / total * unit) for weight in exact)
    shares = [int(weight / total * PERIOD) for weight in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i] / total * PERIOD)
    for number in by_rest[:PERIOD - sum(shares)]:
        shares[number] += 1
    if 0 in shares:
        raise UserError(f"a weight of {weights[shares.index(0)]} among {float(total):g} in all is less than 1 in "
                        f"{PERIOD:,}: raise it, or leave that source out")
    return tuple(shares)


class _Turns:
    """Which source has each micro-batch of a mixture: a table that repeats after as many as the shares add up to.

    From Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): of the sources that are due, the
    one that would first be too late. With m sources no count differs from its share by more than 1 - 1 / (2 m - 2).
    """

    def __init__(self, shares: tuple[int, ...]):
        self.shares = np.array(shares, dtype=np.int64)
        self.period, scale = sum(shares), max(1, 2 * len(shares) - 2)
        behind, chosen = [0] * len(shares), []  # in units of 1 / (period * scale)
        for _ in range(self.period):
            behind = [late + share * scale for late, share in zip(behind, shares)]
            due = [number for number, late in enumerate(behind) if late >= self.period]
            latest = self.period * (scale - 1)
            chosen.append(min(due, key=lambda number: (latest - behind[number]) / shares[number]))
            behind[chosen[-1]] -= self.period * scale
        self.table = np.array(chosen)
        taken = np.cumsum(self.table[:, None] == np.arange(len(shares)), axis=0)
        self.taken = np.vstack([np.zeros_like(self.shares), taken])  # (period + 1, m): before each

    def at(self, number: int) -> int:
        return int(self.table[number % self.period])

    def between(self, first: int, end: int) -> np.ndarray:
        return self.table[np.arange(first, end) % self.period]

    def before(self, number: int) -> np.ndarray:
        """How many of the first `number` each source has had."""
        rounds, rest = divmod(number, self.period)
        found: np.ndarray = rounds * self.shares + self.taken[rest]
        return found

    def spread(self, count: int) -> list[int]:
        """The sources of at most so many micro-batches, evenly spread."""
        count = min(count, self.period)
        return [self.at(number * self.period // count) for number in range(count)]


_turns = lru_cache(maxsize=8)(_Turns)  # leaving a row out makes another order, with the same turns


class _Sums:
    """How many micro-batches (or rows) all steps before one have, and the reverse."""

    def __init__(self, schedule: Schedule):
        self.firsts: list[int] = [first for first, _ in schedule]
        self.levels: list[int] = [level for _, level in schedule]
        _check_schedule(self.firsts)
        if min(self.levels) < 1:
            raise ValueError(f"a step of {min(self.levels)}: each has one micro-batch at least")
        lengths = (after - first for first, after in zip(self.firsts, self.firsts[1:]))
        self.sums = list(accumulate((level * length for level, length in zip(self.levels, lengths)), initial=0))

    def before(self, step: int) -> int:
        number = bisect_right(self.firsts, step) - 1
        return self.sums[number] + (step - self.firsts[number]) * self.levels[number]

    def steps(self, count: int) -> int:
        """How many steps it takes to have so many."""
        number = bisect_right(self.sums, count) - 1
        return self.firsts[number] + math.ceil((count - self.sums[number]) / self.levels[number])


def _stretch(order: Order, first: int, end: int) -> np.ndarray:
    """The items at these positions of an order's rows, one epoch after the other."""
    parts = [order.in_epoch(order.shuffled(epoch)[max(0, first - epoch * order.size):end - epoch * order.size], epoch)
             for epoch in range(first // order.size, math.ceil(end / order.size))]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _placed(items: np.ndarray, order: Order, start: int, size: int) -> np.ndarray:
    """An order's own items as those of a data set of `size` rows in which its rows begin at `start`."""
    placed: np.ndarray = start + items % order.size + items // order.size * size
    return placed


def _check_places(size: int, parts: Sequence[Source | Turn]) -> None:
    if not parts:
        raise ValueError("an order of no orders")
    for part in parts:
        if part.start < 0 or not 0 < part.order.size <= size - part.start:
            raise ValueError(f"{part.order.size} rows from row {part.start} on are not in a data set of {size}")


def _check_schedule(steps: Sequence[int]) -> None:
    if steps[0] != 0 or any(after <= step for step, after in zip(steps, steps[1:])):
        raise ValueError(f"a schedule begins at step 0 and its steps rise, not {list(steps)}")
