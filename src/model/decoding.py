"""Next tokens from a decoder: greedy, or drawn with temperature, top-k and top-p.

Axes: B batch, T time, V vocabulary, K tokens that may be drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from model.kv_cache import KVCache


@runtime_checkable
class Decoder(Protocol):
    """What can be decoded from: a causal model whose `hidden` reads on from a cache."""

    max_seq_len: int

    def new_cache(self, capacity: int) -> KVCache: ...
    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Logits are divided by `temperature` (0: the likeliest token, always), the `top_k` likeliest tokens are kept
    (0: all), and of these the fewest whose probabilities add up to `top_p` (Holtzman et al. 2020, arXiv:1904.09751;
    1: all).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, V) -> (B,). Chosen on the CPU: the same seed draws the same everywhere, and a GPU's cumulated sums have
        no fixed order."""
        logits = logits.float().cpu()
        if self.temperature == 0:
            return logits.argmax(-1)
        weights, tokens = self.candidates(logits)
        return tokens.gather(-1, weights.multinomial(1, generator=generator))[:, 0]

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V) -> weights (B, K), falling, and the tokens they belong to (B, K); weight 0: not to be drawn."""
        V = logits.shape[-1]
        ranked, tokens = logits.topk(min(self.top_k or V, V))
        weights = ((ranked - ranked[:, :1]) / self.temperature).softmax(-1)  # the largest is 0: nothing overflows
        if self.top_p < 1:
            before = weights.cumsum(-1) - weights
            weights = weights.masked_fill(before >= self.top_p, 0)
        return weights, tokens


@torch.no_grad()
def generate(model: Decoder, prompt: Tensor, sampling: Sampling, *, max_new_tokens: int, stop: int | None = None,
             generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """What follows `prompt` (B, T), T >= 1: a tensor (B,) for each next position, of which the model is in eval mode.

    Ends when every row has come to the token `stop`, which is given too; a row that has repeats it until then.

    A context that is full goes on with its newer half, which is read anew, since positions are learned where they
    stand; of a prompt longer than the context the end is read.
    """
    device, size = prompt.device, model.max_seq_len
    context = unread = prompt[:, -size:]
    cache = model.new_cache(min(size, context.shape[1] + max_new_tokens))
    ended = torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] > size:
            context = unread = context[:, -(size // 2):]
            cache = model.new_cache(size)
        tokens = sampling.choose(model.logits(model.hidden(unread, cache)[:, -1]), generator)
        if stop is not None:
            tokens = tokens.masked_fill(ended, stop)
            ended |= tokens == stop
        yield tokens
        if ended.all():
            return
        unread = tokens[:, None].to(device)
        context = torch.cat([context, unread], 1)
