"""Vocoders: log-mel spectrograms -> waveforms.

`SpectralVocoder` predicts the spectrum of each frame, magnitudes and phases, and adds up their inverse Fourier
transforms (Vocos: Siuzdak 2023, arXiv:2306.00814). All its blocks are causal, so it looks ahead half a window: 20 ms.

Axes: B batch, T mel frames (100 a second), M mel bands, D hidden size, N samples (160 a frame), W samples of a window,
O hops of a window.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.convnext import Blocks, State
from stoker.model.mel import HOP_LENGTH
from stoker.model.transformer import init_linear

OVERLAP = 4  # hops of a window
WINDOW = OVERLAP * HOP_LENGTH
LATE = OVERLAP // 2  # hops between a frame and the sound that it completes: the middle of its window is its place
LOUDEST = 5.0  # largest logarithm of a magnitude


class Stream(NamedTuple):
    """What a stream needs of the frames before: the state of the blocks, and the sound of windows that still lack
    later ones (B, O - 1, 160)."""

    blocks: State
    tail: Tensor


class SpectralVocoder(nn.Module):
    """Magnitudes and phases by causal convolutions, then the inverse short-time Fourier transform."""

    window: Tensor  # (W,)

    def __init__(self, num_mels: int, d_model: int, num_layers: int):
        super().__init__()
        self.into = nn.Linear(num_mels, d_model)
        self.blocks = Blocks(d_model, num_layers, causal=True)
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, WINDOW + 2)
        init_linear(self.into)
        init_linear(self.out)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, T, M) -> (B, N), N = 160 T."""
        hops, tail = self._added(self.blocks(self.into(mel)), None)
        return torch.cat([hops, tail[:, :LATE]], 1)[:, LATE:].flatten(1)

    def stream(self, mel: Tensor, state: Stream | None) -> tuple[Tensor, Stream]:
        """The next frames of a stream (B, T, M) -> the samples that they complete (B, N'), and the state to pass with
        those that follow; None at the start, where at least LATE frames are needed."""
        x, blocks = self.blocks.stream(self.into(mel), state.blocks if state else None)
        hops, tail = self._added(x, state.tail if state else None)
        return (hops if state else hops[:, LATE:]).flatten(1), Stream(blocks, tail)

    @staticmethod
    def end(state: Stream) -> Tensor:
        """The samples after those that `stream` returned for the last frame (B, 320)."""
        return state.tail[:, :LATE].flatten(1)

    def _added(self, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of the windows of T frames, and of `tail` from the frames before: the T hops that no later frame
        changes (B, T, 160), and the next O - 1 hops so far (B, O - 1, 160)."""
        with torch.autocast(x.device.type, enabled=False):
            size, angle = self.out(self.norm(x).to(self.out.weight)).float().chunk(2, -1)
            spectrum = torch.polar(size.clamp(max=LOUDEST).exp(), angle)
            windows = (torch.fft.irfft(spectrum, WINDOW) * self.window).unflatten(2, (OVERLAP, HOP_LENGTH))
        total = sum((F.pad(windows[:, :, hop], (0, 0, hop, OVERLAP - 1 - hop)) for hop in range(1, OVERLAP)),
                    start=F.pad(windows[:, :, 0], (0, 0, 0, OVERLAP - 1)))
        if tail is not None:
            total = total + F.pad(tail, (0, 0, 0, windows.shape[1]))
        return total[:, :windows.shape[1]], total[:, windows.shape[1]:]
