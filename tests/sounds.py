"""Recordings made up for tests."""

from pathlib import Path

import numpy as np
import soundfile


def make_sound(path: Path, seconds: float = 1.0, *, rate: int = 16000, peak: float = 0.3, seed: int = 0) -> Path:
    """Noise that rises and falls like syllables; the same for the same seed."""
    count = round(seconds * rate)
    noise = np.random.default_rng(seed).standard_normal(count)
    syllables = np.abs(np.sin(2 * np.pi * 2 * np.arange(count) / rate))
    samples = noise * syllables
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (samples * peak / np.abs(samples).max()).astype(np.float32), rate)
    return path
