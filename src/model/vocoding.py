"""What a vocoder is trained by: front end, generator, discriminators.

Axes: B batch, N samples, T mel frames, M mel bands.
"""

import torch
from torch import Tensor, nn

from stoker.model.mel import FRAME_RATE, HOP_LENGTH, LOUDEST, RANGE, LogMel


class Vocoding(nn.Module):
    """A generator of waveforms, with the spectrograms that it is trained on and, for a GAN, discriminators."""

    def __init__(self, num_mels: int, generator: nn.Module, discriminators: nn.Module | None = None):
        super().__init__()
        self.mel, self.generator = LogMel(num_mels), generator
        if discriminators is not None:
            self.discriminators = discriminators

    def pairs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Spectrograms (B, T, M), waveforms at the level of what is made of them (B, 160 T), and how many frames count
        (B,)."""
        mel, frames, level = self.mel.with_level(batch["waveforms"], batch["samples"])
        return mel, (batch["waveforms"] * level[:, None])[:, :mel.shape[1] * HOP_LENGTH], frames

    def segments(self, batch: dict[str, Tensor], seconds: float) -> tuple[Tensor, Tensor]:
        """Of each recording a segment: its spectrogram (B, T, M) and waveform (B, N). What is shorter is followed by
        silence."""
        mel, sound, frames = self.pairs(batch)
        length = min(round(seconds * FRAME_RATE), mel.shape[1])
        starts = (batch["places"] * (frames - length + 1).clamp(min=1)).long()  # (B,)
        at = starts[:, None] + torch.arange(length, device=mel.device)  # (B, T)
        hops = sound.unflatten(1, (-1, HOP_LENGTH))
        return (mel.gather(1, at[..., None].expand(-1, -1, mel.shape[2])),
                hops.gather(1, at[..., None].expand(-1, -1, HOP_LENGTH)).flatten(1))

    def mel_distance(self, made: Tensor, real: Tensor) -> Tensor:
        """(B, N) each -> (B,): mean absolute difference of the log-mel spectrograms, in powers of ten; what is more
        than RANGE below the loudest is silence, as to the front end."""
        lengths = torch.full((len(made),), made.shape[1], device=made.device)
        with torch.autocast(made.device.type, enabled=False):
            one, other = (self.mel.log_powers(each.float(), lengths).clamp(min=LOUDEST - RANGE)
                          for each in (made, real))
        return (one - other).abs().mean((1, 2))
