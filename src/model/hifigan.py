"""HiFi-GAN (Kong et al. 2020, arXiv:2010.05646): a generator of waveforms, and the discriminators that train it.

Axes: B batch, T mel frames, M mel bands, C channels, N samples, F features of a discriminator's layer.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

SLOPE = 0.1  # of the leaky ReLU below 0
KERNELS, DILATIONS = (3, 7, 11), (1, 3, 5)  # of the residual blocks
PERIODS, SCALES = (2, 3, 5, 7, 11), 3

Judgement = tuple[Tensor, list[Tensor]]  # of one discriminator: scores (B, ...), features of each layer (B, F, ...)


class Generator(nn.Module):
    """Log-mel spectrograms -> waveforms: transposed convolutions, each followed by residual blocks. The product of
    `rates` is the number of samples in a mel frame."""

    def __init__(self, num_mels: int, channels: int, rates: Sequence[int]):
        super().__init__()
        widths = [channels >> place for place in range(len(rates) + 1)]
        self.into = weight_norm(nn.Conv1d(num_mels, channels, 7, padding=3))
        self.upsampling = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(before, after, 2 * rate, rate, padding=(rate + 1) // 2,
                                           output_padding=rate % 2))
            for (before, after), rate in zip(pairwise(widths), rates))
        self.blocks = nn.ModuleList(nn.ModuleList(ResidualBlock(width, kernel) for kernel in KERNELS)
                                    for width in widths[1:])
        self.out = weight_norm(nn.Conv1d(widths[-1], 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        """(B, T, M) -> (B, N) in [-1, 1]."""
        x = self.into(mel.transpose(1, 2))
        for upsampling, blocks in zip(self.upsampling, self.blocks):
            x = upsampling(F.leaky_relu(x, SLOPE))
            x = torch.stack([block(x) for block in blocks.children()]).mean(0)
        return self.out(F.leaky_relu(x)).tanh()[:, 0]  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each added to what came in."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.dilated = nn.ModuleList(weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation,
                                                           padding=dilation * (kernel // 2)))
                                     for dilation in DILATIONS)
        self.plain = nn.ModuleList(weight_norm(nn.Conv1d(channels, channels, kernel, padding=kernel // 2))
                                   for _ in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.dilated, self.plain):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class Discriminators(nn.Module):
    """Multi-period and multi-scale discriminators. `width`: channels of the first layer; 32 and 128 in the paper."""

    def __init__(self, width: int = 32, periods: Sequence[int] = PERIODS, scales: int = SCALES):
        super().__init__()
        self.by_period = nn.ModuleList(PeriodDiscriminator(period, width) for period in periods)
        self.by_scale = nn.ModuleList(ScaleDiscriminator(4 * width) for _ in range(scales))

    def forward(self, sound: Tensor) -> list[Judgement]:
        """(B, N) -> the judgement of each discriminator."""
        found = [discriminator(sound) for discriminator in self.by_period]
        for discriminator in self.by_scale:
            found.append(discriminator(sound))
            sound = F.avg_pool1d(sound[:, None], 4, 2, padding=2)[:, 0]
        return found


class PeriodDiscriminator(nn.Module):
    """Looks at each `period`th sample, in two dimensions: (N / period, period)."""

    def __init__(self, period: int, width: int):
        super().__init__()
        self.period = period
        widths = [1, width, 4 * width, 16 * width, 32 * width, 32 * width]
        self.layers = nn.ModuleList(weight_norm(nn.Conv2d(before, after, (5, 1), (3 if place < 4 else 1, 1), (2, 0)))
                                    for place, (before, after) in enumerate(pairwise(widths)))
        self.out = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, sound: Tensor) -> Judgement:
        sound = F.pad(sound[:, None], (0, -sound.shape[1] % self.period), mode="reflect")
        x, features = sound.unflatten(2, (-1, self.period)), list[Tensor]()
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            features.append(x)
        return self.out(x).flatten(1), features


class ScaleDiscriminator(nn.Module):
    """Looks at the sound in one dimension, by grouped convolutions with large kernels."""

    def __init__(self, width: int):
        super().__init__()
        widths = [1, width, width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        kernels, strides, groups = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1), (1, 4, 16, 16, 16, 16, 1)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(before, after, kernel, stride, kernel // 2, groups=group))
            for (before, after), kernel, stride, group in zip(pairwise(widths), kernels, strides, groups))
        self.out = weight_norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, sound: Tensor) -> Judgement:
        x, features = sound[:, None], list[Tensor]()
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            features.append(x)
        return self.out(x).flatten(1), features
