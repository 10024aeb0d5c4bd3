"""GPT-2 (Radford et al. 2019): a decoder of pre-norm transformer blocks over learned positions, head tied.

Axes: B batch, T time, S time including what a cache holds, D width, H heads, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.attention import attention
from stoker.model.cross_entropy import linear_cross_entropy
from stoker.model.dropout import Dropout
from stoker.model.kv_cache import KVCache, LayerCache, uncompiled

INIT_STD = 0.02


class GPT(nn.Module):
    """Language model over `vocab_size` tokens, up to `max_seq_len` of them at a time."""

    def __init__(self, vocab_size: int, *, d_model: int, num_heads: int, num_layers: int, d_ff: int, max_seq_len: int,
                 dropout: float = 0.0):
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_seq_len, d_model)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        self.apply(_init)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):  # each block adds to the residual twice
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * num_layers))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) of int64 -> (B, T, D), the states from which the head predicts.

        With a cache the tokens come after those it holds, and are added to it.
        """
        start = cache.length if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for i, block in enumerate(self.blocks):
            x = uncompiled(block, x, cache.layers[i]) if cache else block(x)
        return self.final_norm(x)  # type: ignore[no-any-return]

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        weight: Tensor = self.token_embedding.weight
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.head_weight)

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(len(self.blocks), capacity)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, *,
                by_row: bool = False) -> Any:
        """(B, T) of int64 -> logits (B, T, V); with targets (B, T), the sum of their cross-entropy instead, and with
        `by_row` that sum and the sums of the rows (B,), which have no gradient.

        The sum is a path of its own because it never holds the logits whole.
        """
        hidden = self.hidden(tokens, cache)
        if targets is None:
            return self.logits(hidden)
        total, each = linear_cross_entropy(hidden.flatten(0, 1), self.token_embedding.weight, targets.flatten())
        return (total, each.view(targets.shape).sum(1)) if by_row else total


class Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff, dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal self-attention: the last T of S positions look at what is not after them."""

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if cache:
            k, v = cache.append(k, v)  # each (B, H, S, D/H)
        S = k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if 1 < T < S else None
        y = attention(q, k, self.dropout.vectors(v), mask, causal=T == S)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two layers with GPT-2's tanh form of GELU between them."""

    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))  # type: ignore[no-any-return]


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
