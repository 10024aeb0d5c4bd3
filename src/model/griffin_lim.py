"""Log-mel spectrograms -> waveforms without a trained model (Griffin & Lim 1984, with momentum: Perraudin et al. 2013).

Axes: B batch, T mel frames, M mel bands, R frequencies, N samples.
"""

import torch
from torch import Tensor

from stoker.model.mel import HOP_LENGTH, LOUDEST, N_FFT, RANGE, LogMel

ITERATIONS, MOMENTUM = 60, 0.99
TINY = 1e-8


class GriffinLim:
    """Finds phases for the magnitudes of a spectrogram by going back and forth between it and the sound."""

    def __init__(self, front_end: LogMel):
        self.filters = front_end.filters[::2]  # (R, M)
        self.inverse = torch.linalg.pinv(self.filters)  # (M, R)

    def __call__(self, mel: Tensor, iterations: int = ITERATIONS) -> Tensor:
        """(B, T, M), normalised -> (B, N), N = 160 T, the loudest band of each at LOUDEST. The first phases are random,
        the same ones each time."""
        powers = 10 ** ((mel.float() - 1) * RANGE / 2 + LOUDEST)
        size = (powers @ self.inverse.to(mel.device)).clamp(min=0).sqrt().transpose(1, 2)  # (B, R, T)
        window = torch.hann_window(N_FFT, device=mel.device)
        length = mel.shape[1] * HOP_LENGTH
        fixed = torch.Generator().manual_seed(0)
        angles = torch.polar(torch.ones(size.shape), 6.283 * torch.rand(size.shape, generator=fixed)).to(mel.device)
        before = torch.zeros_like(angles)
        for _ in range(iterations):
            sound = torch.istft(size * angles, N_FFT, HOP_LENGTH, window=window, length=length)
            now = torch.stft(sound, N_FFT, HOP_LENGTH, window=window, return_complex=True,
                             pad_mode="constant")[..., :mel.shape[1]]
            angles = now - before * (MOMENTUM / (1 + MOMENTUM))
            angles, before = angles / (angles.abs() + TINY), now
        return torch.istft(size * angles, N_FFT, HOP_LENGTH, window=window, length=length)
