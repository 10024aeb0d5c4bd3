"""How far what was found is from what it should be, as a ratio of sums over a whole set."""

from collections.abc import Iterable
from typing import Any

from stoker.training.core.figures import Ratio


def error_rate(references: Iterable[Any], found: Iterable[Any]) -> Ratio:
    """Insertions, deletions and substitutions of words (lists) or characters (strings), and how many there should be.

    Each pair is a Levenshtein distance with all costs 1: the sum is exact, in microseconds a sentence.
    """
    from rapidfuzz.distance import Levenshtein

    pairs = list(zip(references, found, strict=True))
    wrong = sum(Levenshtein.distance(reference, heard) for reference, heard in pairs)
    return Ratio(wrong, sum(len(reference) for reference, _ in pairs))
