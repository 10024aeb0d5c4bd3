"""What a run shows beside numbers: texts, histograms, pictures, sounds. Views decide how they look."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

COLUMNS = 4  # of a gallery
HERTZ = 250, 500, 1000, 2000, 4000  # where a spectrogram has marks
BELOW: dict[str, Any] = dict(y=0, pad=-3, va="top", fontsize=8, parse_math=False)  # of a title


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


def spectrogram(values: "np.ndarray", rate: float, frequencies: "np.ndarray") -> Picture:
    """Values (time, bands), `rate` frames a second, the bands' rising frequencies in Hz (bands,) -> a picture with
    seconds and Hz at its axes, dark where values are low."""
    import numpy as np
    from matplotlib.figure import Figure

    frames, bands = values.shape
    figure = Figure(figsize=(2 + 2 * min(max(frames / rate, 1), 8), 3), layout="constrained")
    ax = figure.subplots()
    ax.imshow(values.T, origin="lower", aspect="auto", cmap="magma", extent=(0, frames / rate, 0, bands))
    marks = [each for each in HERTZ if frequencies[0] <= each <= frequencies[-1]]
    ax.set_yticks(np.interp(marks, frequencies, np.arange(bands)) + 0.5, [f"{each:,}" for each in marks])
    ax.set(xlabel="seconds", ylabel="Hz")
    return _drawn(figure)


def gallery(pictures: "np.ndarray", captions: Sequence[str], over: "np.ndarray | None" = None) -> Picture:
    """(N, height, width, 3) uint8, each with its caption below; with `over` (N, h, w) laid over it, if given: bright
    where it is high."""
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 3.6 * rows), layout="constrained")
    for i, ax in enumerate(figure.subplots(rows, COLUMNS, squeeze=False).flatten()):
        ax.axis("off")
        if i < len(pictures):
            height, width = pictures[i].shape[:2]
            ax.imshow(pictures[i], extent=(0, width, height, 0))
            if over is not None:
                ax.imshow(over[i], extent=(0, width, height, 0), cmap="magma", alpha=0.6)
            ax.set_title(captions[i], **BELOW)
    return _drawn(figure)


def strips(pictures: "Sequence[np.ndarray]", captions: Sequence[str]) -> Picture:
    """(h, w) uint8 each, grey and wider than high: one below the other, each with its caption below."""
    from matplotlib.figure import Figure

    widest = max(picture.shape[1] / picture.shape[0] for picture in pictures)
    figure = Figure(figsize=(8, len(pictures) * (0.6 + 8 / max(widest, 16))), layout="constrained")
    for ax, picture, caption in zip(figure.subplots(len(pictures), squeeze=False)[:, 0], pictures, captions):
        ax.axis("off")
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        ax.set(xlim=(0, widest * picture.shape[0]), anchor="W")
        ax.set_title(caption, **BELOW, loc="left", family="monospace")
    return _drawn(figure)


def confusion(pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> Picture:
    """How many of each class, by rows, were taken for each, by columns: of (what it is, what it was taken for)."""
    import numpy as np
    from matplotlib.figure import Figure

    counts = np.zeros((len(names), len(names)), int)
    for pair in pairs:
        counts[pair] += 1
    side = 2 + 0.35 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    ax = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    ax.imshow(shares, cmap="magma", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ink = "black" if shares[row, column] > 0.6 else "white"
            ax.text(column, row, count, ha="center", va="center", color=ink, fontsize=7)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlabel("taken for")
    return _drawn(figure)


def _drawn(figure: "Figure") -> Picture:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Picture(np.asarray(canvas.buffer_rgba())[..., :3].copy())
