"""How far apart two sounds are: multi-resolution spectral distance, and the losses of a GAN of waveforms.

Axes: B batch, N samples, R frequencies, T frames.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from stoker.model.hifigan import Judgement

RESOLUTIONS = (512, 50, 240), (1024, 120, 600), (2048, 240, 1200)  # size of the transform, hop, window, in samples
SMALLEST = 1e-7  # of a power, so that silence has a logarithm


def stft_distance(made: Tensor, real: Tensor) -> Tensor:
    """(B, N) each -> (B,): spectral convergence plus mean absolute difference of log magnitudes, the mean of three
    resolutions (Yamamoto et al. 2020, arXiv:1910.11480, equations 3 to 6)."""
    total = torch.zeros(len(made), device=made.device)
    for resolution in RESOLUTIONS:
        one, other = magnitudes(made, *resolution), magnitudes(real, *resolution)
        convergence = (other - one).square().sum((1, 2)).sqrt() / other.square().sum((1, 2)).sqrt()
        total = total + convergence + (one.log() - other.log()).abs().mean((1, 2))
    return total / len(RESOLUTIONS)


def magnitudes(sound: Tensor, size: int, hop: int, window: int) -> Tensor:
    """(B, N) -> (B, R, T)."""
    spectrum = torch.stft(sound, size, hop, window, _window(window).to(sound), return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=SMALLEST).sqrt()


@lru_cache(maxsize=8)
def _window(size: int) -> Tensor:
    return torch.hann_window(size)


# -- of a GAN: least squares (Mao et al. 2017, arXiv:1611.04076), sums over the discriminators ----------------------


def discriminator_loss(real: Sequence[Judgement], made: Sequence[Judgement]) -> Tensor:
    """(B,): real sounds should score 1, made ones 0."""
    losses = [(1 - one).square().mean(1) + other.square().mean(1) for (one, _), (other, _) in zip(real, made)]
    return torch.stack(losses).sum(0)


def generator_loss(made: Sequence[Judgement]) -> Tensor:
    """(B,): made sounds should score 1."""
    return torch.stack([(1 - scores).square().mean(1) for scores, _ in made]).sum(0)


def feature_loss(real: Sequence[Judgement], made: Sequence[Judgement]) -> Tensor:
    """(B,): mean absolute difference of the features of each layer (Larsen et al. 2016, arXiv:1512.09300)."""
    losses = [(one.detach() - other).abs().flatten(1).mean(1)
              for (_, ones), (_, others) in zip(real, made) for one, other in zip(ones, others)]
    return torch.stack(losses).sum(0)
