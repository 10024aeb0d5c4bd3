"""Pictures that views show."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from stoker.training.core import media
from stoker.training.core.media import Picture


def test_a_spectrogram_has_its_bands_from_below_and_its_frames_from_the_left() -> None:
    values = np.zeros((200, 40), np.float32)
    values[150:, 5] = 1.0  # a low tone in the last quarter
    pixels = media.spectrogram(values, 100, np.linspace(80, 7500, 40)).pixels.astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 240) & (pixels[..., 2] < 220) & (pixels[..., 1] > 200))
    height, width, _ = pixels.shape
    assert len(rows) and rows.min() > 0.6 * height and columns.min() > 0.6 * width
    assert (pixels.reshape(-1, 3).min(1) > 250).mean() > 0.1, "margins with axes"


def test_marks_are_where_their_frequencies_are() -> None:
    """Between bands, and only those that there are: of 300 to 2,100 Hz 500, 1,000 and 2,000."""
    drawn = {}

    def draw(figure: Figure) -> Picture:
        ax = figure.axes[0]
        drawn.update(zip([text.get_text() for text in ax.get_yticklabels()], ax.get_yticks()))
        return Picture(np.zeros((1, 1, 3), np.uint8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "_drawn", draw)
        media.spectrogram(np.zeros((10, 7), np.float32), 100, np.linspace(300, 2100, 7))
    assert drawn == pytest.approx({"500": 0.5 + 200 / 300, "1,000": 0.5 + 700 / 300, "2,000": 0.5 + 1700 / 300})
