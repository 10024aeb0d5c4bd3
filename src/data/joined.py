"""Several data sets as one, whose samples say which of them they are from."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from torch.utils.data import Dataset


class Sourced(NamedTuple):
    """A sample, and the name of the data set that it is from."""

    source: str
    sample: Any


class Joined(Dataset[Sourced]):
    """The rows of several data sets, one data set after the other: those of "text" begin at `starts["text"]`.

    Item row + epoch * len(self) is the row as its own data set has it in that epoch: its row + epoch * its length.
    """

    def __init__(self, parts: Mapping[str, Dataset[Any]]):
        self.parts: dict[str, Any] = dict(parts)
        self._names, lengths = list(parts), [len(part) for part in self.parts.values()]
        *self._starts, self._length = accumulate(lengths, initial=0)
        self.starts = dict(zip(self._names, self._starts))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> Sourced:
        epoch, row = divmod(item, self._length)
        number = bisect_right(self._starts, row) - 1
        part = self.parts[self._names[number]]
        return Sourced(self._names[number], part[row - self._starts[number] + epoch * len(part)])
