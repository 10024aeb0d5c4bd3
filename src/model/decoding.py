"""Next tokens from a decoder: drawn with temperature, top-k and top-p; or a whole text, the likeliest that greedy or
beam search finds.

Axes: B batch, T time, V vocabulary, K tokens that may be drawn, or texts of a beam.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stoker.model.kv_cache import KVCache


@runtime_checkable
class Decoder(Protocol):
    """What can be decoded from: a causal model whose `hidden` reads on from a cache."""

    max_seq_len: int

    @property
    def head_weight(self) -> Tensor: ...
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


# -- whole texts ----------------------------------------------------------------------------------------------------


class Kept(Protocol):
    """What a decoder keeps of what it has read, and looks at."""

    def select(self, rows: Tensor) -> None: ...


class Writer(Protocol):
    """What writes texts: a causal model that reads on from what is kept."""

    def log_probs(self, tokens: Tensor, kept: Any, /) -> Tensor:
        """Of what comes after tokens (B,) -> (B, V)."""


@dataclass(frozen=True)
class Written:
    """A text, and the log probability of each of its tokens and, unless it was cut short, of its end."""

    tokens: list[int]
    log_probs: list[float]

    @property
    def log_prob(self) -> float:
        return sum(self.log_probs)


@torch.no_grad()
def greedy(model: Writer, kept: Kept, limits: Tensor, *, ends: int) -> list[Written]:
    """For each row the text each of whose tokens is the likeliest, of `limits` (B,) tokens at most. The token `ends`
    stands before each text and after it. The model is in eval mode; `kept` has read nothing yet, and is used up."""
    tokens, ended = torch.full_like(limits, ends), limits < 1
    texts, costs = (torch.zeros(len(limits), 0, dtype=kind, device=limits.device) for kind in (torch.long, torch.float))
    while not ended.all():
        best, tokens = model.log_probs(tokens, kept).max(-1)  # (B,)
        tokens = tokens.masked_fill(ended, ends)
        texts = torch.cat([texts, tokens[:, None]], 1)
        costs = torch.cat([costs, best.masked_fill(ended, 0)[:, None]], 1)
        ended = ended | (tokens == ends) | (texts.shape[1] >= limits)
    return _written(texts, costs, limits, ends)


@torch.no_grad()
def beam_search(model: Writer, kept: Kept, limits: Tensor, *, ends: int, width: int) -> list[Written]:
    """As `greedy`, but of `width` texts of each row that are gone on with at a time the likeliest. With as many as
    there are texts it is exact, with one it is `greedy`."""
    B, K = len(limits), width
    rows = torch.arange(B, device=limits.device)[:, None]  # (B, 1)
    kept.select(rows.expand(B, K).flatten())
    scores = torch.full((B, K), -torch.inf, device=limits.device)
    scores[:, 0] = 0  # at first all are the same one
    texts, costs = (torch.zeros(B, K, 0, dtype=kind, device=limits.device) for kind in (torch.long, torch.float))
    tokens, ended = torch.full((B, K), ends, device=limits.device), limits[:, None].expand(B, K) < 1
    while not ended[:, 0].all():  # the first is the likeliest, and the others only become less likely
        log_probs = model.log_probs(tokens.flatten(), kept).unflatten(0, (B, K))  # (B, K, V)
        log_probs[..., ends].masked_fill_(ended, 0)  # what else may come after an end is less likely, and never first
        scores, best = (scores[..., None] + log_probs).flatten(1).topk(K)  # (B, K)
        before, tokens = best // log_probs.shape[2], best % log_probs.shape[2]
        texts = torch.cat([texts[rows, before], tokens[..., None]], 2)
        costs = torch.cat([costs[rows, before], log_probs[rows, before, tokens][..., None]], 2)
        ended = ended[rows, before] | (tokens == ends) | (texts.shape[2] >= limits[:, None])
        kept.select((rows * K + before).flatten())
    return _written(texts[:, 0], costs[:, 0], limits, ends)


def _written(texts: Tensor, costs: Tensor, limits: Tensor, ends: int) -> list[Written]:
    """(B, T) each, up to the first `ends` of each row; a text that is as long as it may be has no end of its own."""
    found = []
    for tokens, log_probs, limit in zip(texts.tolist(), costs.tolist(), limits.tolist()):
        length = tokens.index(ends) if ends in tokens else len(tokens)
        found.append(Written(tokens[:length], log_probs[:min(length + 1, limit)]))
    return found
