"""Attention that is fast in bf16 on a CPU, too.

There torch's flash kernel takes up to three times as long as the code of this file, most of all where texts are short
(docs/log.md). In all other cases torch's own attention is called.

Axes: B batch, H heads, K heads of keys and values, T queries, S positions that are attended to, C size of a head;
G = H / K heads that share keys and values, N = B K, Q queries of a block, L positions that a block attends to.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 2**15  # attention weights (B H T S); with fewer, the flash kernel is faster
BLOCK = 256  # queries whose weights are held at a time, so that memory grows linearly with T


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(C)) v: (B, H, T, C), (B, K, S, C) twice -> (B, H, T, C).

    `mask`, of bool, broadcasts to (B, H, T, S) and is true where a query attends; the code here takes only masks
    (B, 1, 1, S), as in training. With `causal`, for which T = S, no query attends to a later position.
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q[..., 0].numel() * k.shape[2] >= FEW
    if slow and not torch.compiler.is_compiling() and (mask is None or mask.shape[1:3] == (1, 1)):
        return _Attention.apply(q, k, v, mask, causal)  # type: ignore[no-any-return, no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


class _Attention(torch.autograd.Function):
    """Products and softmax of one block of queries after another. The backward pass computes the attention weights
    again, unless there is only one block (Dao et al. 2022, arXiv:2205.14135)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1]**-0.5, k.flatten(0, 1), v.flatten(0, 1)
        y, p = torch.empty_like(q), None
        for block in _blocks(q):
            p, last = _weights(q, k, mask, block, causal)
            y[:, :, :, block] = (p @ v[:, :last]).view_as(y[:, :, :, block])
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, mask, p if q.shape[3] <= BLOCK else None)
        return y.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask, known = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for block in _blocks(q):
            p, last = (known, k.shape[1]) if known is not None else _weights(q, k, mask, block, ctx.causal)
            rows, dy = (x[:, :, :, block].reshape(len(k), -1, x.shape[-1]) for x in (q, grad))
            dv[:, :last] += p.mT @ dy
            ds = torch.ops.aten._softmax_backward_data(dy @ v[:, :last].mT, p, -1, p.dtype)
            dk[:, :last] += ds.mT @ rows
            dq[:, :, :, block] = (ds @ k[:, :last] * q.shape[-1]**-0.5).view_as(dq[:, :, :, block])
        shape = len(q), -1, *k.shape[1:]
        return dq.flatten(1, 2), dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape), None, None


def _blocks(q: Tensor) -> list[slice]:
    return [slice(start, min(start + BLOCK, q.shape[3])) for start in range(0, q.shape[3], BLOCK)]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, block: slice, causal: bool) -> tuple[Tensor, int]:
    """The attention weights (N, G Q, L) of the queries of a block for the first L positions, and L. `q` (B, K, G, T, C)
    is scaled already, `k` is (N, S, C), `mask` (B, 1, 1, S)."""
    rows = q[:, :, :, block]
    last = block.stop if causal else k.shape[1]
    scores = rows.reshape(len(k), -1, q.shape[-1]) @ k[:, :last].mT  # (N, G Q, L)
    by_head = scores.view(*rows.shape[:4], last)  # (B, K, G, Q, L)
    if mask is not None:
        by_head.masked_fill_(~mask[:, :, None, :, :last], -torch.inf)
    if causal:
        Q = block.stop - block.start
        by_head[..., block.start:].masked_fill_(torch.ones(Q, Q, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1), last
