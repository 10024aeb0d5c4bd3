"""Reader: an encoder of lines, a decoder that writes down their text while it looks at them (Vaswani et al. 2017,
arXiv:1706.03762), and a CTC head on the encoder, by which it learns sooner what stands where, and which has a say in
what is written (Watanabe et al. 2017, doi:10.1109/JSTSP.2017.2763455).

Axes: B batch, T labels of text, S states of a line, D width, V labels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stoker.model.cross_entropy import linear_cross_entropy
from stoker.model.ctc import PrefixScores
from stoker.model.dropout import Dropout
from stoker.model.gpt import Attention as CausalAttention
from stoker.model.kv_cache import KVCache, LayerCache, uncompiled
from stoker.model.line_encoder import LineEncoder
from stoker.model.transformer import MLP, CrossAttention, init_blocks, init_linear, sines, valid_places

Pair = tuple[Tensor, Tensor]
SAY = 0.5  # of the CTC head


class Memory:
    """What is kept of lines: for each layer of the decoder keys and values (B, H, S, C) of their states, and which of
    these count (B, S); with a `capacity`, the same of the text read so far; and what CTC has to say of it."""

    def __init__(self, states: list[Pair], valid: Tensor, capacity: int = 0):
        self.states, self.valid = states, valid
        self.text = KVCache(len(states), capacity) if capacity else None
        self.aligned: PrefixScores | None = None
        self._lines = torch.arange(len(valid), device=valid.device)  # which one each row is

    def layers(self) -> list[tuple[Pair, LayerCache | None]]:
        return list(zip(self.states, self.text.layers if self.text else [None] * len(self.states)))

    @property
    def length(self) -> int:
        """How much of the text has been read."""
        return self.text.length if self.text else 0

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (B',) of the batch, in this order; one may come more than once. With CTC those of a
        line stay together, and in its place."""
        lines = self._lines[rows]
        if not torch.equal(lines, self._lines):
            self.states = [(keys[rows], values[rows]) for keys, values in self.states]
            self.valid, self._lines = self.valid[rows], lines
        if self.text:
            self.text.select(rows)
        if self.aligned:
            self.aligned.select(rows)


class TextDecoder(nn.Module):
    """Next labels of a text about a line, of any length; head tied."""

    def __init__(self, vocab_size: int, *, d_model: int, num_heads: int, num_layers: int, d_ff: int,
                 dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(DecoderBlock(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        init_blocks(self.blocks)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)

    def memory(self, states: Tensor, lengths: Tensor, capacity: int = 0) -> Memory:
        """(B, S, D) and how many of S count (B,). To read a text bit by bit it needs a capacity, of as many labels."""
        pairs = [block.cross_attention.keys_and_values(states) for block in self.blocks
                 if isinstance(block, DecoderBlock)]
        return Memory(pairs, valid_places(lengths, states.shape[1]), capacity)

    def forward(self, tokens: Tensor, memory: Memory) -> Tensor:
        """(B, T) of int64 -> (B, T, D), the states from which the head predicts; the tokens come after those that the
        memory holds, and are added to it."""
        start, (T, D) = memory.length, (tokens.shape[1], self.embedding.embedding_dim)
        x = self.embedding(tokens) * math.sqrt(D)
        x = self.dropout(x + sines(torch.arange(start, start + T, device=tokens.device), D).to(x.dtype))
        for block, (states, text) in zip(self.blocks, memory.layers()):
            seen = (x, *states, memory.valid)
            x = uncompiled(block, *seen, text) if text else block(*seen)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return nn.functional.linear(hidden, self.embedding.weight)

    def cross_entropies(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """States (N, D) and what comes next (N,) -> the sum of the cross-entropies, and each of them (N,), without a
        gradient; never holds the logits whole."""
        return linear_cross_entropy(hidden, self.embedding.weight, targets)

    def log_probs(self, tokens: Tensor, memory: Memory) -> Tensor:
        """Of what comes after tokens (B,) -> (B, V)."""
        return self.logits(self(tokens[:, None], memory)[:, 0]).float().log_softmax(-1)


class DecoderBlock(nn.Module):
    """What was written, what is seen, what is here: two attentions and two layers, each added to what came in."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = CausalAttention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.cross_attention = CrossAttention(d_model, num_heads, dropout)
        self.norm3 = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff, dropout)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, valid: Tensor, text: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), text)
        x = x + self.cross_attention(self.norm2(x), keys, values, valid)
        return x + self.mlp(self.norm3(x))  # type: ignore[no-any-return]


class Seen(NamedTuple):
    """Lines as an encoder sees them."""

    states: Tensor  # (B, S, D)
    lengths: Tensor  # (B,), how many of S count
    logits: Tensor  # (B, S, V) of CTC


class Reader(nn.Module):
    """The `blank` of CTC is the label that ends a text, too. Unless `joint`, the CTC head is never trained nor used."""

    def __init__(self, encoder: LineEncoder, decoder: TextDecoder, blank: int, *, joint: bool = True):
        super().__init__()
        self.encoder, self.decoder, self.blank, self.joint = encoder, decoder, blank, joint
        V, D = decoder.embedding.weight.shape
        self.head = nn.Linear(D, V).requires_grad_(joint)
        init_linear(self.head)

    def forward(self, pixels: Tensor, widths: Tensor) -> Seen:
        """uint8 (B, 1, H, W), how many columns of each count (B,)."""
        states, lengths = self.encoder(pixels, widths)
        return Seen(states, lengths, self.head(states))

    def memory(self, seen: Seen, capacity: int = 0) -> Memory:
        """What the decoder looks at: the states, and at each how many labels have begun up to it, so that it need not
        learn to count columns to find the next one: in the first minutes of training it errs half as often."""
        if not self.joint:
            return self.decoder.memory(seen.states, seen.lengths, capacity)
        places = sines(begun(seen.logits.detach(), self.blank), seen.states.shape[2])
        memory = self.decoder.memory(seen.states + places.to(seen.states.dtype), seen.lengths, capacity)
        if capacity:
            memory.aligned = PrefixScores(seen.logits, seen.lengths, blank=self.blank)
        return memory

    def log_probs(self, tokens: Tensor, memory: Memory) -> Tensor:
        """Of what comes after tokens (B,) -> (B, V): in proportion to the geometric mean of how likely decoder and CTC
        head have it. The decoder alone loses its place where much looks alike, and repeats itself up to the end of the
        line; the head alone knows no words."""
        found = self.decoder.log_probs(tokens, memory)
        if memory.aligned is None:
            return found
        found = ((1 - SAY) * found + SAY * memory.aligned.following(tokens)).log_softmax(-1)
        return found.nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # what CTC has as impossible has no next


def begun(logits: Tensor, blank: int) -> Tensor:
    """How many labels begin in the first states, up to each (B, S), in the mean over all alignments of (B, S, V): where
    it is not the label of the state before."""
    found = logits.float().softmax(-1)
    found = torch.cat([found[..., :blank], found[..., blank + 1:]], -1)
    fresh = found.sum(-1)
    fresh = torch.cat([fresh[:, :1], fresh[:, 1:] - (found[:, 1:] * found[:, :-1]).sum(-1)], 1)
    S = fresh.shape[1]
    with torch.autocast(fresh.device.type, enabled=False):  # in half precision there are whole numbers only
        return fresh @ torch.ones(S, S, device=fresh.device).triu()  # cumsum has no fixed order on a GPU
