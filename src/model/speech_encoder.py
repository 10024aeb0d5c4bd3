"""Speech encoder: log-mel -> strided convolutions -> pre-norm transformer with convolutions.

And the recognizer: the encoder with its front end and a CTC head.

Axes: B batch, N samples of sound, T frames (100 a second at first), M mel bands, D width, H heads, V labels.
What is beyond a row's length is 0 throughout, and never changes what is within it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.dropout import Dropout
from stoker.model.mel import FRAME_RATE, HOP_LENGTH, SAMPLE_RATE, LogMel
from stoker.model.transformer import MLP, Attention, Block, halved, init_blocks, init_linear, line_angles, valid_places

KERNEL, NEAR = 3, 15  # of the front end; of a block
FEATURE_RATE = 12.5  # a second: what an omni model reads, whatever the rate of the CTC head


class SpeechEncoder(nn.Module):
    """Normalised log-mel spectrograms -> states at 100 / `downsample_time` a second (`downsample_time`: 2, 4 or 8)."""

    def __init__(self, *, num_mels: int, d_model: int, num_heads: int, num_layers: int, d_ff: int, downsample_time: int,
                 dropout: float = 0.0, block: str = "convolution"):
        super().__init__()
        self.downsample_time, self.num_heads = downsample_time, num_heads
        widths = [num_mels, *[d_model] * int(math.log2(downsample_time))]
        self.convolutions = nn.ModuleList(nn.Conv1d(before, after, KERNEL, stride=2, padding=KERNEL // 2)
                                          for before, after in zip(widths, widths[1:]))
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(BLOCKS[block](d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        init_blocks(self.blocks)

    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M), how many frames of each count (B,) -> (B, T', D), how many of T' count (B,)."""
        x, lengths = mel.transpose(1, 2), frames  # (B, M, T)
        for convolution in self.convolutions:
            lengths = halved(lengths)
            x = F.gelu(convolution(x))
            x = x * valid_places(lengths, x.shape[2])[:, None]
        valid = valid_places(lengths, x.shape[2])
        x = self.dropout(x.transpose(1, 2))
        angles = line_angles(x.shape[1], x.shape[2] // self.num_heads, x.device)
        for block in self.blocks:
            x = block(x, valid, angles)
        return self.final_norm(x) * valid[..., None], lengths

    def features(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The same at 12.5 a second: the mean of the 1, 2 or 4 states in each 80 ms. (B, T'', D) and lengths (B,)."""
        x, lengths = self(mel, frames)
        group = 8 // self.downsample_time
        x = F.pad(x, (0, 0, 0, -x.shape[1] % group)).unflatten(1, (-1, group))
        counted = valid_places(lengths, x.shape[1] * group).unflatten(1, (-1, group)).sum(2, keepdim=True)
        return x.sum(2) / counted.clamp(min=1), -(-lengths // group)


class ConvolutionBlock(nn.Module):
    """Depthwise convolution, self-attention, MLP; each pre-norm and residual."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.norm0 = nn.LayerNorm(d_model)
        self.convolution = Convolution(d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff, dropout)

    def forward(self, x: Tensor, valid: Tensor, angles: Tensor) -> Tensor:
        x = x + self.convolution(self.norm0(x), valid)
        x = x + self.attention(self.norm1(x), valid, angles)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """Each channel's own convolution over the places around, of those that count (as in Gulati et al. 2020,
    arXiv:2005.08100: to hear what is near, attention alone takes twice as long to learn)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.depthwise = nn.Conv1d(d_model, d_model, NEAR, padding=NEAR // 2, groups=d_model)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = (x * valid[..., None]).transpose(1, 2)  # (B, D, T)
        return F.silu(self.depthwise(x)).transpose(1, 2)


class ConformerBlock(nn.Module):
    """Half-step MLP, self-attention, gated convolution, half-step MLP (Gulati et al. 2020, arXiv:2005.08100), with
    LayerNorm in the place of batch norm, so that no recording depends on what else is in its batch. The hidden size of
    each MLP is `d_ff` / 2."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.norm0 = nn.LayerNorm(d_model)
        self.first_mlp = MLP(d_model, d_ff // 2, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.convolution = GatedConvolution(d_model, dropout)
        self.norm3 = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff // 2, dropout)

    def forward(self, x: Tensor, valid: Tensor, angles: Tensor) -> Tensor:
        x = x + self.first_mlp(self.norm0(x)) / 2
        x = x + self.attention(self.norm1(x), valid, angles)
        x = x + self.convolution(self.norm2(x), valid)
        return x + self.mlp(self.norm3(x)) / 2  # type: ignore[no-any-return]


class GatedConvolution(nn.Module):
    """A layer with gates, each channel's own convolution over the places around, a layer."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.into = nn.Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, NEAR, padding=NEAR // 2, groups=d_model)
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = F.glu(self.into(x)) * valid[..., None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.out(F.silu(self.norm(x))))  # type: ignore[no-any-return]


BLOCKS = {"transformer": Block, "convolution": ConvolutionBlock, "conformer": ConformerBlock}


class Recognizer(nn.Module):
    """Speech -> logits of V labels, `head_frames` to each state of the encoder; with the front end in it, so that sound
    goes in."""

    def __init__(self, vocab_size: int, encoder: SpeechEncoder, num_mels: int, head_frames: int = 1):
        super().__init__()
        self.mel = LogMel(num_mels)
        self.encoder, self.head_frames = encoder, head_frames
        self.head = nn.Linear(encoder.final_norm.normalized_shape[0], head_frames * vocab_size)
        init_linear(self.head)

    @property
    def rate(self) -> float:
        """Frames a second of the head."""
        return FRAME_RATE / self.encoder.downsample_time * self.head_frames

    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M), lengths (B,) -> logits (B, T', V), lengths (B,)."""
        x, lengths = self.encoder(mel, frames)
        logits = self.head(x).unflatten(2, (self.head_frames, -1)).flatten(1, 2)
        return logits, lengths * self.head_frames

    @torch.no_grad()
    def log_probs(self, waveform: Tensor, *, window_seconds: float, overlap_seconds: float) -> Tensor:
        """(N,) -> (T', V), of a recording of any length, in windows that overlap: each gives the frames from the middle
        of one overlap to the middle of the next, so that no frame is taken from a window's edge. The model
        is in eval mode."""
        hop, each = HOP_LENGTH * self.encoder.downsample_time, self.head_frames  # samples and frames to a state
        window = max(2, round(window_seconds * SAMPLE_RATE / hop))
        margin = min(round(overlap_seconds * SAMPLE_RATE / hop / 2), (window - 1) // 2)
        total, parts, start = -(-(len(waveform) // HOP_LENGTH) // self.encoder.downsample_time), list[Tensor](), 0
        while total:
            heard = waveform[start * hop:(start + window) * hop][None]
            logits, _ = self(*self.mel(heard, torch.tensor([heard.shape[1]], device=heard.device)))
            first, is_last = margin if start else 0, start + window >= total
            last = None if is_last else each * (window - margin)
            parts.append(logits[0, each * first:last].float().log_softmax(-1))
            if is_last:
                break
            start += window - 2 * margin
        return torch.cat(parts) if parts else waveform.new_zeros(0, self.head.out_features // each)
