"""Figures added up as ratios of sums; tensors stay on their device until the means are asked for."""

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stoker.training.core.figures import Ratio


class Totals:
    """name -> part -> [sum of totals, sum of counts]. Most figures have one part, ""; the loss has one for each of its
    terms where it has several."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, list[Any]]] = {}

    def add(self, name: str, ratio: Ratio, part: str = "") -> None:
        """Tensors with an entry for each sample are summed first."""
        parts = self._sums.setdefault(name, {})
        total, count = parts.get(part, (0, 0))
        parts[part] = [total + _sum(ratio.total), count + _sum(ratio.count)]

    def means(self) -> dict[str, float]:
        """The ratios as floats; a figure of several parts is the sum of their ratios. NaN where nothing was counted.
        All tensors of a device come to the host together: one wait."""
        values = _on_host([value for parts in self._sums.values() for pair in parts.values() for value in pair])
        pairs = zip(values[::2], values[1::2])
        found = {name: [total / count for total, count in islice(pairs, len(parts)) if count]
                 for name, parts in self._sums.items()}
        return {name: sum(means) if means else math.nan for name, means in found.items()}

    def uncounted(self) -> list[str]:
        """The names of the figures of which nothing was counted."""
        return [name for name, parts in self._sums.items() if not any(float(count) for _, count in parts.values())]

    def state_dict(self) -> dict[str, dict[str, list[Any]]]:
        return {name: {part: list(pair) for part, pair in parts.items()} for name, parts in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Older snapshots have figures without parts."""
        self._sums = {name: {part: [value.to(device) if isinstance(value, Tensor) else value for value in pair]
                             for part, pair in (parts if isinstance(parts, dict) else {"": parts}).items()}
                      for name, parts in state.items()}


def finite_or_nothing(ratio: Ratio) -> Ratio:
    """The ratio, or 0 of 0 where its total is not finite; found out on the device."""
    if not isinstance(ratio.total, Tensor):
        return ratio if math.isfinite(ratio.total) else Ratio(0.0, 0)
    finite = ratio.total.detach().isfinite()
    return Ratio(torch.where(finite, ratio.total.detach(), 0.0), finite * _detached(ratio.count))


def _on_host(values: list[Any]) -> list[float]:
    found = [math.nan if isinstance(value, Tensor) else float(value) for value in values]
    places: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append(place)
    for device, own in places.items():
        kind = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        for place, number in zip(own, torch.stack([values[place].to(kind) for place in own]).tolist()):
            found[place] = number
    return found


def _sum(value: Any) -> Any:
    value = _detached(value)
    if isinstance(value, Tensor):
        return value.sum() if value.dim() else value
    return value.item() if hasattr(value, "item") else value  # of numpy, which no snapshot can hold


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
