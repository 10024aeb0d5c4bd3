"""How far what was found is from what it should be, as ratios of sums."""

from collections.abc import Iterable
from typing import Any

from stoker.training.core.figures import Ratio


def error_rate(references: Iterable[Any], found: Iterable[Any]) -> Ratio:
    """Insertions, deletions and substitutions of words (lists) or characters (strings), and how many there should be.

    Each pair is a Levenshtein distance with all costs 1: the sum is exact, in microseconds a sentence.
    """
    wrong, lengths = error_rates(references, found)
    return Ratio(int(wrong.sum()), int(lengths.sum()))


def error_rates(references: Iterable[Any], found: Iterable[Any]) -> Ratio:
    """The same for each pair: two tensors (B,) of whole numbers."""
    import torch
    from rapidfuzz.distance import Levenshtein

    pairs = list(zip(references, found, strict=True))
    return Ratio(torch.tensor([Levenshtein.distance(reference, heard) for reference, heard in pairs], dtype=torch.long),
                 torch.tensor([len(reference) for reference, _ in pairs], dtype=torch.long))
