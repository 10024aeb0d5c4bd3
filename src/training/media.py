"""What a run shows beside numbers: texts, histograms, pictures, sounds. Views decide how they look."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Text:
    content: str


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie between `edges[i]` and `edges[i + 1]`."""

    counts: "np.ndarray"  # (N,)
    edges: "np.ndarray"  # (N + 1,), rising


@dataclass(frozen=True)
class Picture:
    pixels: "np.ndarray"  # (height, width, 3), uint8


@dataclass(frozen=True)
class Sound:
    samples: "np.ndarray"  # (time,), float32 between -1 and 1
    rate: int  # samples a second


Media = Union[Text, Histogram, Picture, Sound]


def heat_map(values: "np.ndarray") -> Picture:
    """(height, width), the first row at the bottom -> a picture, dark where values are low."""
    import matplotlib
    import numpy as np

    low, high = values.min(), values.max()
    colours = matplotlib.colormaps["magma"]((values[::-1] - low) / max(high - low, 1e-9))[..., :3]
    return Picture((colours * 255).round().astype(np.uint8))
