"""The one mel front end: log-mel spectrograms as Whisper's (Radford et al. 2022, arXiv:2212.04356), level taken out.

Axes: B batch, N samples of sound, T frames (100 a second), M mel bands.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker import wheels
from stoker.model.transformer import valid_places

SAMPLE_RATE, N_FFT, HOP_LENGTH = 16000, 400, 160  # a window of 25 ms each 10 ms
FRAME_RATE = SAMPLE_RATE // HOP_LENGTH
FLOOR = 1e-10  # of the power, so that silence has a logarithm
# Slaney's mel scale, as Whisper's: linear up to a frequency, logarithmic above it (Slaney 1998, Auditory Toolbox)
BEND_HZ, BEND_MELS, LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27
RANGE = 8.0  # powers of ten below the loudest that count
LOUDEST = 1.0  # power of ten of the loudest band of what a vocoder makes: speech then stays below full scale


class LogMel(nn.Module):
    """Waveforms at 16 kHz -> log-mel spectrograms. Has no weights and nothing to save."""

    filters: Tensor  # (N_FFT + 2, M), each row twice: for the real and for the imaginary part of a frequency
    window: Tensor  # (N_FFT,)

    def __init__(self, num_mels: int = 80):
        super().__init__()
        filters = wheels.torchaudio().functional.melscale_fbanks(
            N_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, num_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", filters.repeat_interleave(2, 0), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def frequencies(self) -> Tensor:
        """The centre of each band, in Hz (M,)."""
        highest = BEND_MELS + math.log(SAMPLE_RATE / 2 / BEND_HZ) / LOG_STEP
        mels = torch.linspace(0, highest, self.filters.shape[1] + 2)[1:-1]
        return torch.where(mels < BEND_MELS, mels * BEND_HZ / BEND_MELS,
                           BEND_HZ * ((mels - BEND_MELS) * LOG_STEP).exp())

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N), how many samples of each count (B,) -> (B, T, M), how many frames of each count (B,).

        log10 of the power in each band, relative to the utterance's loudest, 8 powers of ten mapped to -1 to 1:
        Whisper's normalisation, but that a louder recording is the same to it. Frames that do not count are 0. In fp32
        whatever the precision of the rest.
        """
        mel, frames, _ = self.with_level(waveforms, lengths)
        return mel, frames

    def with_level(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` returns, and the level that it takes out: the factors (B,) by which the waveforms are to be
        multiplied so that each one's loudest band has the power 10**LOUDEST."""
        with torch.autocast(waveforms.device.type, enabled=False):
            powers = self.log_powers(waveforms.float(), lengths)
        frames = num_frames(lengths)
        valid = valid_places(frames, powers.shape[1])[..., None]
        loudest = powers.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)
        level = (powers - loudest).clamp(min=-RANGE) / (RANGE / 2) + 1
        return level.masked_fill(~valid, 0), frames, 10 ** ((LOUDEST - loudest[:, 0, 0]) / 2)

    def log_powers(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """(B, N) -> (B, T, M), log10 of the power in each mel band, as it is; what is beyond `lengths` is silence."""
        waveforms = waveforms.masked_fill(~valid_places(lengths, waveforms.shape[1]), 0)
        sound = F.pad(waveforms, (N_FFT // 2, N_FFT // 2))  # before and after the sound there is silence
        windows = sound.unfold(1, N_FFT, HOP_LENGTH)
        windows = windows[:, :waveforms.shape[1] // HOP_LENGTH]  # as Whisper's: without what follows the last whole hop
        spectrum = torch.view_as_real(torch.fft.rfft(windows * self.window)).flatten(2)
        return (spectrum.square() @ self.filters).clamp(min=FLOOR).log10()


def num_frames(samples: Tensor) -> Tensor:
    return samples // HOP_LENGTH
