"""Codec of speech: log-mel -> convolutions -> residual vector quantizer -> causal convolutions -> log-mel.

Several mel frames are folded into one vector, so all layers work at the rate of the codes. The decoder is causal, so
speech can be decoded while its codes are still being made.

Axes: B batch, T mel frames (100 a second), F frames of codes, M mel bands, D hidden size, Q books.
What is beyond a recording's length is 0 throughout, so its codes do not depend on the other recordings of the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.convnext import Blocks, State
from stoker.model.mel import FRAME_RATE
from stoker.model.residual_quantizer import ResidualQuantizer
from stoker.model.transformer import valid_places


class Coded(NamedTuple):
    """A decoded spectrogram (B, T, M), its codes (B, F, Q), how many frames of codes each recording has (B,), and the
    quantizer's `distance`."""

    mel: Tensor
    codes: Tensor
    lengths: Tensor
    distance: Tensor


class Encoder(nn.Module):
    """Log-mel spectrograms -> latent vectors, one for each `fold` frames."""

    def __init__(self, num_mels: int, fold: int, d_model: int, num_layers: int, latent: int):
        super().__init__()
        self.fold = fold
        self.into = nn.Linear(fold * num_mels, d_model)
        self.blocks = Blocks(d_model, num_layers)
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, latent)

    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M), how many frames of each count (B,) -> (B, F, L), how many of F count (B,)."""
        lengths = (frames + self.fold - 1) // self.fold
        mel = mel * valid_places(frames, mel.shape[1])[..., None]
        x = self.into(F.pad(mel, (0, 0, 0, -mel.shape[1] % self.fold)).unflatten(1, (-1, self.fold)).flatten(2))
        valid = valid_places(lengths, x.shape[1])
        latent: Tensor = self.out(self.norm(self.blocks(x, valid)))
        return latent * valid[..., None], lengths


class Decoder(nn.Module):
    """Latent vectors -> log-mel spectrograms, causal: a frame depends on no later vector."""

    def __init__(self, num_mels: int, fold: int, d_model: int, num_layers: int, latent: int):
        super().__init__()
        self.num_mels = num_mels
        self.into = nn.Linear(latent, d_model)
        self.blocks = Blocks(d_model, num_layers, causal=True)
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, fold * num_mels)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, F, L) -> (B, fold F, M)."""
        return self._mel(self.blocks(self.into(vectors)))

    def stream(self, vectors: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The next vectors (B, F, L) of a stream -> their frames (B, fold F, M), and the state to pass with those that
        follow; None at the start."""
        x, state = self.blocks.stream(self.into(vectors), state)
        return self._mel(x), state

    def _mel(self, x: Tensor) -> Tensor:
        mel: Tensor = self.out(self.norm(x)).unflatten(2, (-1, self.num_mels))
        return mel.flatten(1, 2)


class Codec(nn.Module):
    """Spectrograms to codes and back. `frame_rate`: frames of codes a second, a divisor of 100 (or 12.5)."""

    def __init__(self, *, num_mels: int, frame_rate: float, d_model: int, num_layers: int, latent: int, num_books: int,
                 book_size: int, decay: float = 0.97):
        super().__init__()
        self.fold = round(FRAME_RATE / frame_rate)
        self.encoder = Encoder(num_mels, self.fold, d_model, num_layers, latent)
        self.quantizer = ResidualQuantizer(num_books, book_size, latent, decay)
        self.decoder = Decoder(num_mels, self.fold, d_model, num_layers, latent)

    def forward(self, mel: Tensor, frames: Tensor, used: Tensor | None = None) -> Coded:
        """(B, T, M), how many frames of each count (B,), how many books each recording uses (B,), by default all."""
        latent, lengths = self.encoder(mel, frames)
        vectors, codes, distance = self.quantizer(latent, valid_places(lengths, latent.shape[1]), used)
        decoded = self.decoder(vectors)[:, :mel.shape[1]]
        return Coded(decoded * valid_places(frames, mel.shape[1])[..., None], codes, lengths, distance)

    @torch.no_grad()
    def codes(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M), lengths (B,) -> (B, F, Q), lengths (B,). The books learn nothing from it."""
        latent, lengths = self.encoder(mel, frames)
        return self.quantizer.codes(latent), lengths

    def decode(self, codes: Tensor) -> Tensor:
        """Codes of the first Q' books (B, F, Q') -> (B, fold F, M)."""
        return self.decoder(self.quantizer.vectors(codes))  # type: ignore[no-any-return]

    def decode_next(self, codes: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The next codes of a stream (B, F, Q') -> their frames (B, fold F, M), and the state to pass with those that
        follow; None at the start."""
        return self.decoder.stream(self.quantizer.vectors(codes), state)
