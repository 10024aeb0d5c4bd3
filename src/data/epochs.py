"""Rows that each epoch may see otherwise: what is changed in one is a function of (seed, epoch, row)."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from torch.utils.data import Dataset

from stoker.config import UserError

T = TypeVar("T")


class Rows(Dataset[T]):
    """Item i is row i % len in epoch i // len. Asked for rows alone, it gives those of epoch 0."""

    seed: int

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, row: int, epoch: int) -> T:
        raise NotImplementedError

    def __iter__(self) -> Iterator[T]:
        """The rows of epoch 0; without it a loop would never end."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: int) -> T:
        if index < 0:
            raise IndexError(f"row {index}")
        epoch, row = divmod(index, len(self))
        return self.row(row, epoch)

    def draw(self, row: int, epoch: int) -> np.random.Generator:
        """The random numbers of a row in an epoch."""
        return np.random.default_rng((self.seed, epoch, row))


def unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path} {error}; it was all right when the data were checked")


def changed(path: str) -> UserError:
    return UserError(f"{path} has changed since the data were checked: put the old file back, or start a new run")
