"""Pictures that views show."""

import numpy as np

from stoker.training.core.media import spectrogram


def test_a_spectrogram_has_its_bands_from_below_and_its_frames_from_the_left() -> None:
    values = np.zeros((200, 40), np.float32)
    values[150:, 5] = 1.0  # a low tone in the last quarter
    pixels = spectrogram(values, 100, np.linspace(80, 7500, 40)).pixels.astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 240) & (pixels[..., 2] < 220) & (pixels[..., 1] > 200))
    height, width, _ = pixels.shape
    assert len(rows) and rows.min() > 0.6 * height and columns.min() > 0.6 * width
    assert (pixels.reshape(-1, 3).min(1) > 250).mean() > 0.1, "margins with axes"
