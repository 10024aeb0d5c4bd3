"""What the encoders are made of: pre-norm transformer blocks in which every place looks at every other; and how a
decoder looks at what was encoded.

Axes: B batch, T places (of time, of text, of a picture), S places that are looked at, D width, H heads, C numbers of a
head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.attention import attention
from stoker.model.dropout import Dropout

SLOWEST = 10000.0  # how much slower the last pair of numbers turns than the first, along a text or a sound


class Block(nn.Module):
    """What is anywhere, then what is here: attention, two layers, each added to what came in."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff, dropout)

    def forward(self, x: Tensor, valid: Tensor | None, angles: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), valid, angles)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention over the places that count: all, or those of `valid` (B, T). With `angles` (T, C/2) positions are
    rotary."""

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor | None, angles: Tensor | None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, C)
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        mask = None if valid is None else valid[:, None, None, :]
        y = attention(q, k, self.dropout.vectors(v), mask)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """What places of one kind read from those of another: all, or those of `valid` (B, S)."""

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)
        self.kv = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of what is looked at, once for all that will look: (B, S, D) -> (B, H, S, C) each."""
        keys, values = self.kv(states).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        q = self.query(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, C)
        mask = None if valid is None else valid[:, None, None, :]
        y = attention(q, keys, self.dropout.vectors(values), mask)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """What a learned query reads from all places (Lee et al. 2019, arXiv:1810.00825)."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(d_model))
        self.kv = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, D)."""
        keys, values = self.kv(x).chunk(2, -1)
        weights = self._weights(keys, valid)
        y = weights[:, :, None] @ values.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, 1, C)
        return self.out(y.flatten(1))  # type: ignore[no-any-return]

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """How much each head reads from each place: (B, T, D) -> (B, H, T), their sum over T is 1."""
        return self._weights(self.kv(x).chunk(2, -1)[0], valid)

    def _weights(self, keys: Tensor, valid: Tensor | None) -> Tensor:
        query = self.query.view(self.num_heads, -1)
        scores = torch.einsum("hc,bthc->bht", query, keys.unflatten(2, query.shape)) * query.shape[1]**-0.5
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], -torch.inf)
        return scores.float().softmax(-1).to(keys.dtype)  # type: ignore[no-any-return]


# -- places ---------------------------------------------------------------------------------------------------------


def valid_places(lengths: Tensor, longest: int) -> Tensor:
    """Lengths (B,) -> (B, longest), whether a place is within its row's length."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def halved(lengths: Tensor) -> Tensor:
    """Places left after a convolution of stride 2."""
    return (lengths + 1) // 2


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """(B, H, T, C), C even: each pair of numbers turned by its place's angle, of `angles` (T, C/2) (Su et al. 2021,
    arXiv:2104.09864)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def line_angles(T: int, C: int, device: torch.device, slowest: float = SLOWEST) -> Tensor:
    """(T, C/2): growing with the place."""
    speeds = slowest ** (-torch.arange(0, C, 2, device=device) / C)
    angles: Tensor = torch.arange(T, device=device)[:, None] * speeds
    return angles


def sines(places: Tensor, D: int) -> Tensor:
    """Places (...) -> (..., D), to be added to what is there: waves of all lengths (Vaswani et al. 2017,
    arXiv:1706.03762). A place may lie between two."""
    angles = places[..., None] * SLOWEST ** (-torch.arange(0, D, 2, device=places.device) / D)
    return torch.cat([angles.sin(), angles.cos()], -1)


# -- first weights --------------------------------------------------------------------------------------------------


def init_linear(module: nn.Module) -> None:
    """What comes out is about as large as what goes in (LeCun et al. 1998): with GPT-2's 0.02 at all widths, a narrow
    model takes half as long again to learn."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)


def init_blocks(blocks: nn.ModuleList) -> None:
    """The layers of blocks, smaller where they end: each block adds to the residual twice, or three times."""
    blocks.apply(init_linear)
    for name, weight in blocks.named_parameters():
        if name.endswith(("attention.out.weight", "convolution.out.weight", "mlp.down.weight")):
            nn.init.normal_(weight, std=(2 * len(blocks) * weight.shape[1])**-0.5)
