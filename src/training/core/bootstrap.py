"""How far a rate would scatter had other rows been drawn: the percentile bootstrap.

Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from collections.abc import Sequence

import numpy as np

DRAWS, LEVEL = 1000, 0.95


def interval(totals: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % confidence interval of sum(totals) / sum(counts), from the total and the count of each row (N,).

    Rows are drawn with replacement, as many as there are, 1,000 times. A draw in which nothing is counted is left out.
    None where fewer than two rows count, or a total is not finite.
    """
    totals, counts = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    if np.count_nonzero(counts) < 2 or not np.isfinite(totals).all():
        return None
    draw, rates = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        rows = draw.integers(len(totals), size=len(totals))
        if count := counts[rows].sum():
            rates.append(totals[rows].sum() / count)
    low, high = np.quantile(rates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def by_group(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The sums over the rows of each group: (N,) -> (G,). A row of group "" is one by itself."""
    names = [group or f"\0{row}" for row, group in enumerate(groups)]
    different, place = np.unique(names, return_inverse=True)
    return np.bincount(place, weights=np.asarray(values, np.float64), minlength=len(different))
