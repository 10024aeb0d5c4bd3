"""The plain loop that training speed is compared with: a GPT-2 and a few lines of PyTorch around it, no framework.

It is what a person writes who wants nothing but speed: torch's fused attention and fused AdamW, mixed precision, the
whole model compiled. It checks nothing, saves nothing, and need not be deterministic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.training.core import device as devices

BATCHES = 8  # in the host's memory, used in turn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """GPT-2 (Radford et al. 2019) without dropout, its head tied to the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int, inner: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Both (B, T) of int64 -> the mean cross-entropy."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


@contextmanager
def step(cfg: Any, vocabulary: int, device: torch.device, *, compiled: bool) -> Iterator[Callable[[], Tensor]]:
    """A function that makes one step and returns its loss. `cfg` is the language model's, with its precision chosen.
    Within the context torch may use operators that are not deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield _step(cfg, vocabulary, device, compiled)
    finally:
        torch.use_deterministic_algorithms(before)


def _step(cfg: Any, vocabulary: int, device: torch.device, compiled: bool) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = PlainGPT(vocabulary, cfg.max_seq_len, cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.d_ff).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    forward: Any = torch.compile(model) if compiled else model
    windows = torch.randint(vocabulary, (BATCHES, cfg.batch_size, cfg.max_seq_len + 1))
    batches = list(windows.pin_memory() if device.type == "cuda" else windows)

    def make_one() -> Tensor:
        batch = batches.pop(0)
        batches.append(batch)
        window = batch.to(device, non_blocking=True)
        with devices.autocast(device, cfg.precision):
            loss: Tensor = forward(window[:, :-1], window[:, 1:])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return make_one
