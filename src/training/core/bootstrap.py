"""Confidence intervals of figures by the percentile bootstrap: how much they would vary with other rows.

Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

DRAWS, LEVEL = 1000, 0.95
NUMBERS_AT_ONCE = 2**21  # entries of a (draws, rows) table of counts: 16 MiB


def intervals(rows: Mapping[str, tuple[np.ndarray, np.ndarray]],
              follow: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda rates: {}, *,
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95 % confidence intervals of rates, sum(totals) / sum(counts), from the total and the count of each row:
    name -> (N,), (N,). Also of the figures that `follow` computes from the rates, as perplexity from a loss.

    N of the N rows are drawn with replacement, 1,000 times; all rates use the same draws. A draw whose counts are all 0
    is left out. A rate has no interval where fewer than two rows have a count, or where a total is not finite.
    """
    draws = _draws({name: pair for name, pair in rows.items()
                    if np.count_nonzero(pair[1]) >= 2 and np.isfinite(pair).all()}, seed)
    followed = [follow(draw) for draw in draws]
    found = {name: np.array([draw[name] for draw in each]) for each in (draws, followed) for name in each[0]}
    bounds = {name: _percentiles(values[~np.isnan(values)]) for name, values in found.items()}
    return {name: between for name, between in bounds.items() if between}


def _draws(rows: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: int) -> list[dict[str, float]]:
    """The rates of each draw, NaN where all counts are 0."""
    if not rows:
        return [{}]
    table = np.stack([np.asarray(column, np.float64) for pair in rows.values() for column in pair], 1)  # (N, 2 rates)
    draw, size = np.random.default_rng(seed), len(table)
    at_once, parts = max(1, NUMBERS_AT_ONCE // size), []
    for start in range(0, DRAWS, at_once):
        times = np.stack([np.bincount(draw.integers(size, size=size), minlength=size)  # how often each row is drawn
                          for _ in range(start, min(start + at_once, DRAWS))])
        parts.append(times.astype(np.float64) @ table)
    sums = np.concatenate(parts)  # (draws, 2 rates)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = np.where(sums[:, 1::2] != 0, sums[:, ::2] / sums[:, 1::2], np.nan)
    return [dict(zip(rows, each)) for each in rates.tolist()]


def _percentiles(values: np.ndarray) -> tuple[float, float] | None:
    """The bounds of the interval; None where there are no values, or one is infinite."""
    if not len(values) or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def by_group(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The sums over the rows of each group: (N,) -> (G,). A row with group "" is a group by itself."""
    names = [group or f"\0{row}" for row, group in enumerate(groups)]
    different, place = np.unique(names, return_inverse=True)
    return np.bincount(place, weights=np.asarray(values, np.float64), minlength=len(different))
