"""What a decoder keeps of the positions it has read, so that none is computed twice.

Axes: B batch, H heads, T new positions, S positions read so far, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn


class LayerCache:
    """Keys and values of one layer. The room for `capacity` positions is taken once, at the first append."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._keys = self._values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of T more positions, (B, H, T, D) each; all that are kept, (B, H, S, D) each."""
        if not self.length:
            B, H, _, D = keys.shape
            self._keys, self._values = (new.new_empty(B, H, self.capacity, D) for new in (keys, values))
        start, self.length = self.length, self.length + keys.shape[2]
        assert self.length <= self.capacity, "the cache is full"
        self._keys[:, :, start:self.length] = keys
        self._values[:, :, start:self.length] = values
        return self._keys[:, :, :self.length], self._values[:, :, :self.length]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (B',) of the batch, in this order; one may come more than once."""
        if self.length:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def branch(self, rows: Tensor, length: int, capacity: int) -> "LayerCache":
        """See `KVCache.branch`."""
        made = LayerCache(capacity)
        if length:
            made.append(self._keys[rows, :, :length], self._values[rows, :, :length])
        return made


class KVCache:
    """A `LayerCache` for each layer."""

    def __init__(self, num_layers: int, capacity: int):
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """How many positions have been read."""
        return self.layers[-1].length

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (B',) of the batch, in this order; one may come more than once."""
        for layer in self.layers:
            layer.select(rows)

    def branch(self, rows: Tensor, length: int, capacity: int) -> "KVCache":
        """A cache with room for `capacity` positions that holds the first `length` of these rows (B',); one may come
        more than once. This one stays as it is."""
        made = KVCache(0, capacity)
        made.layers = [layer.branch(rows, length, capacity) for layer in self.layers]
        return made


def uncompiled(block: nn.Module, *args: Any) -> Tensor:
    """What `block(*args)` returns, its hooks called too, but not computed by what torch.compile made of the block: that
    would be compiled again for each length of the cache."""
    output: Tensor = block._call_impl(*args)  # all of nn.Module.__call__ but the choice of the compiled one
    return output
