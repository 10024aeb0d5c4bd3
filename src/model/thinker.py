"""The thinker: a decoder of text in the style of Qwen3 (Yang et al. 2025, arXiv:2505.09388).

Pre-norm blocks of RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021,
arXiv:2104.09864), attention in which several heads share keys and values (Ainslie et al. 2023, arXiv:2305.13245), with
normalized queries and keys, and SwiGLU (Shazeer 2020, arXiv:2002.05202) or a mixture of experts. Matrices have no bias.

Axes: B batch, T time, S time including the positions in a cache, D hidden size, H heads, K heads of keys and values,
C size of a head, V vocabulary, N documents of a batch, L tokens of a document.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.config import UserError
from stoker.model.attention import attention
from stoker.model.cross_entropy import linear_cross_entropy
from stoker.model.dropout import Dropout
from stoker.model.experts import Experts, MixtureOfExperts
from stoker.model.kv_cache import KVCache, LayerCache, uncompiled

INIT_STD = 0.02


class Thinker(nn.Module):
    """Language model over `vocab_size` tokens, up to `max_seq_len` of them at a time.

    `head_dim` is `d_model // num_heads` unless given. With `tied` the head is the token embedding. With `experts` each
    block has a mixture of experts in place of a feed-forward network of size `d_ff`. Dropout acts on the embeddings and
    on what each half of a block adds; not on the attention weights, since torch's flash attention for CPUs has none.
    With `zero_init` attention and feed-forward layers add 0 at first: the network begins as its embedding and its head.
    Raises UserError where the sizes do not fit together.
    """

    def __init__(self, vocab_size: int, *, d_model: int, num_heads: int, num_kv_heads: int, num_layers: int, d_ff: int,
                 max_seq_len: int, head_dim: int | None = None, rope_theta: float = 10000.0, norm_eps: float = 1e-6,
                 tied: bool = False, dropout: float = 0.0, experts: Experts | None = None, zero_init: bool = False):
        super().__init__()
        self.max_seq_len, self.d_ff, self.rope_theta, self.experts = max_seq_len, d_ff, rope_theta, experts
        self.head_dim = head_dim or d_model // num_heads
        if num_heads % num_kv_heads or self.head_dim % 2:
            raise UserError(f"{num_heads} heads of size {self.head_dim} with {num_kv_heads} heads of keys and values: "
                            "the former must be a multiple of the latter, and their size even")
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(Attention(d_model, num_heads, num_kv_heads, self.head_dim, norm_eps, dropout),
                  MixtureOfExperts(d_model, experts, dropout) if experts else MLP(d_model, d_ff, dropout),
                  d_model, norm_eps) for _ in range(num_layers))
        self.final_norm = RMSNorm(d_model, norm_eps)
        self.head: nn.Parameter | None
        self.register_parameter("head", None if tied else nn.Parameter(torch.empty(vocab_size, d_model)))
        for name, weight in self.named_parameters():
            if weight.dim() > 1:  # each block adds to the residual twice
                adds = name.endswith(("attention.out.weight", "mlp.down.weight", "mlp.down"))
                reduced = 0.0 if zero_init else INIT_STD / math.sqrt(2 * num_layers)
                nn.init.normal_(weight, std=reduced if adds else INIT_STD)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """(B, T) of int64 -> (B, T, D), the states from which the head predicts.

        With a cache the tokens come after those it holds, and are added to it. With `documents` (B, T), the number of
        each token's document, whose tokens are adjacent, a token attends to those of its own document only. Positions
        are counted through the whole row: attention depends on their differences alone.
        """
        assert cache is None or documents is None, "a cache holds one document in each row"
        turns = self._turns(cache.length if cache else 0, tokens.shape[1], tokens.device)
        borders = Borders(documents) if documents is not None else None
        x = self.dropout(self.token_embedding(tokens))
        for i, block in enumerate(self.blocks):
            x = uncompiled(block, x, turns, cache.layers[i]) if cache else block(x, turns, borders=borders)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def _turns(self, start: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles of T positions from `start`, (T, 1, C) each: see `rotated`."""
        speeds = 1.0 / self.rope_theta ** (torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim)
        angles = torch.arange(start, start + T, device=device).float()[:, None, None] * speeds
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        weight: Tensor = self.token_embedding.weight if self.head is None else self.head
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.head_weight)

    def balance(self) -> Tensor:
        """The load-balance loss of the last forward pass: a sum over its tokens, and the mean over the layers. Only
        with experts, and only once after each pass: it releases the tensors that it is computed from."""
        mixtures: list[Any] = [block.mlp for block in self.blocks]
        total = torch.stack([mixture.balance for mixture in mixtures]).mean()
        for mixture in mixtures:
            mixture.balance = None
        return total

    def loads(self) -> Tensor:
        """(layers, experts): the share of the tokens of the last step that each expert was given. Each row adds up to
        `experts.per_token`."""
        mixtures: list[Any] = [block.mlp for block in self.blocks]
        return torch.stack([mixture.load for mixture in mixtures])

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(len(self.blocks), capacity)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, *,
                by_row: bool = False, documents: Tensor | None = None) -> Any:
        """(B, T) of int64 -> logits (B, T, V); with targets (B, T), the sum of their cross-entropy instead, and with
        `by_row` that sum and the sums of the rows (B,), which have no gradient. `documents`: see `hidden`.

        The sum is a path of its own because it never holds the logits whole.
        """
        hidden = self.hidden(tokens, cache, documents)
        if targets is None:
            return self.logits(hidden)
        total, each = linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())
        return (total, each.view(targets.shape).sum(1)) if by_row else total


class Block(nn.Module):
    def __init__(self, attention: "Attention", mlp: nn.Module, d_model: int, norm_eps: float):
        super().__init__()
        self.norm1 = RMSNorm(d_model, norm_eps)
        self.attention = attention
        self.norm2 = RMSNorm(d_model, norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: LayerCache | None = None,
                borders: "Borders | None" = None) -> Tensor:
        x = x + self.attention(self.norm1(x), turns, cache, borders)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal self-attention: the last T of S positions attend to those that are not after them."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int, norm_eps: float, dropout: float):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q = nn.Linear(d_model, num_heads * head_dim, bias=False)
        self.k = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)
        self.out = nn.Linear(num_heads * head_dim, d_model, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: LayerCache | None,
                borders: "Borders | None") -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))  # (B, T, H, C)
        q, k = (rotated(norm(heads), *turns).to(v.dtype) for norm, heads in ((self.q_norm, q), (self.k_norm, k)))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, C) and twice (B, K, T, C)
        if cache:
            k, v = cache.append(k, v)  # each (B, K, S, C)
        y = attend(q, k, v) if borders is None else attend_within(q, k, v, borders)  # (B, H, T, C)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))  # type: ignore[no-any-return]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the type of its weight, which under autocast is fp32 while x may be bf16: torch's own warns that the
    types differ, and is then slow."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)


# -- attention ------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of numbers (i, i + C/2) of (..., C) by an angle. `cos` has the cosine of the angle for both
    numbers of a pair, `sin` the sine, negative for the first: three operations; `transformer.rotated` needs seven."""
    other: Tensor = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(other, sin)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries (B, H, T, C) of the last T of S positions, keys and values (B, K, S, C) -> (B, H, T, C)."""
    T, S = q.shape[2], k.shape[2]
    if T == 1:  # the heads that share a key become the positions of one head: no key is copied for each
        grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        y = F.scaled_dot_product_attention(grouped, k, v)
        return y.unflatten(2, (-1, 1)).flatten(1, 2)  # type: ignore[no-any-return]
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if T < S else None
    return attention(q, k, v, mask, causal=T == S)


class Borders:
    """Where documents begin and end in a batch of packed texts.

    An object of its own because torch.compile compares the numbers in a list, and would compile again for each batch.
    """

    def __init__(self, documents: Tensor):
        """`documents` (B, T): the number of each token's document."""
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        ends = begins.flatten().roll(-1).nonzero()[:, 0] + 1  # (N,); waits for the GPU once for each batch
        self.lengths: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_within(q: Tensor, k: Tensor, v: Tensor, borders: Borders) -> Tensor:
    """`attend` within each document, one after another: (B, H, T, C), (B, K, T, C) twice -> (B, H, T, C).

    This computes less than attention over the whole row, and needs no mask of T x T. The backward pass of `split` joins
    all gradients at once; that of slices would fill a whole tensor with zeros for each document.
    """
    B, _, T, _ = q.shape
    parts = zip(*(x.transpose(1, 2).flatten(0, 1).split(borders.lengths) for x in (q, k, v)))  # (L, H, C) each
    made = [attend(*(part.transpose(0, 1)[None] for part in document))[0].transpose(0, 1) for document in parts]
    return torch.cat(made).unflatten(0, (B, T)).transpose(1, 2)  # type: ignore[no-any-return]
