"""How far what was found is from what it should be, as a ratio of sums over a whole set."""

from collections.abc import Iterable
from typing import Any

import wheels
from training.stage import Ratio


def error_rate(references: Iterable[Any], found: Iterable[Any]) -> Ratio:
    """Insertions, deletions and substitutions of words or characters, and how many there should be."""
    distance = wheels.torchaudio().functional.edit_distance
    pairs = list(zip(references, found, strict=True))
    return Ratio(sum(distance(reference, heard) for reference, heard in pairs), sum(len(pair[0]) for pair in pairs))
