"""How far what was found is from what it should be, as ratios of sums."""

from collections.abc import Iterable, Sequence
from typing import Any

from stoker.training.core.figures import Ratio

Pair = tuple[Sequence[str], Sequence[str]]  # reference and hypothesis: a string of characters, or a list of words


class ErrorRates(Ratio):
    """The errors and the length of the reference of each sample, two tensors (B,); `pairs` are the compared texts."""

    pairs: Sequence[Pair]


def error_rate(references: Iterable[Any], found: Iterable[Any]) -> Ratio:
    """Insertions, deletions and substitutions of words (lists) or characters (strings), and how many there should be.

    Each pair is a Levenshtein distance with all costs 1: the sum is exact, in microseconds a sentence.
    """
    wrong, lengths = error_rates(references, found)
    return Ratio(int(wrong.sum()), int(lengths.sum()))


def error_rates(references: Iterable[Any], found: Iterable[Any]) -> ErrorRates:
    """The same for each pair: two tensors (B,) of whole numbers."""
    import torch
    from rapidfuzz.distance import Levenshtein

    pairs = list(zip(references, found, strict=True))
    rates = ErrorRates(
        torch.tensor([Levenshtein.distance(reference, heard) for reference, heard in pairs], dtype=torch.long),
        torch.tensor([len(reference) for reference, _ in pairs], dtype=torch.long))
    rates.pairs = pairs
    return rates
