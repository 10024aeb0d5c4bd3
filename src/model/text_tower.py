"""Text towers: captions -> one vector each, to be compared with those of pictures.

Axes: U captions, T tokens, D width, E width of what is compared.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stoker.model.dropout import Dropout
from stoker.model.transformer import AttentionPool, Block, init_blocks, init_linear, line_angles


class TextTower(nn.Module):
    """A small transformer of its own; a pool reads its tokens."""

    def __init__(self, vocab_size: int, *, d_model: int, num_heads: int, num_layers: int, d_ff: int, embed_dim: int,
                 dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        self.pool = AttentionPool(d_model, num_heads)
        self.head = nn.Linear(d_model, embed_dim)
        init_blocks(self.blocks)
        self.pool.apply(init_linear)
        init_linear(self.head)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(U, T) of int64, how many of each count (U,), at least 1 -> (U, E)."""
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        x = self.dropout(self.token_embedding(tokens))
        angles = line_angles(x.shape[1], x.shape[2] // self.num_heads, x.device)
        for block in self.blocks:
            x = block(x, valid, angles)
        return self.head(self.pool(self.final_norm(x), valid))  # type: ignore[no-any-return]


class FrozenTextTower(nn.Module):
    """The hidden states of a frozen language model, their mean, and a layer that learns (as in LiT: Zhai et al. 2021,
    arXiv:2111.07991, with the roles turned). Whoever builds it freezes the language model."""

    def __init__(self, language_model: Any, embed_dim: int):
        """`language_model.hidden` makes (U, T, D) of (U, T) tokens, each state from what is not after it."""
        super().__init__()
        self.language_model = language_model
        d_model = language_model.final_norm.normalized_shape[0]
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, embed_dim)
        init_linear(self.head)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(U, T) of int64, how many of each count (U,), at least 1 -> (U, E)."""
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        with torch.no_grad():
            x = self.language_model.hidden(tokens)
        mean = (x * valid[..., None]).sum(1) / lengths[:, None]
        return self.head(self.norm(mean))  # type: ignore[no-any-return]
