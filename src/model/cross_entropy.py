"""Cross-entropy of a linear head that never holds the logits of a whole batch.

Axes: N positions, D width, V vocabulary, C positions of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a target at which nothing is predicted, as in torch's own cross_entropy
CHUNK_NUMBERS = 2**25  # logits held at a time: 128 MiB in fp32; with a quarter of it a step takes a tenth more


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over positions of -log softmax(hidden @ weight.T)[target], and its summands, which have no gradient.

    hidden (N, D), weight (V, D), targets (N,) of int64 -> scalar and (N,) in fp32; a position whose target is IGNORED
    adds 0. The logits are made C positions at a
    time, and the gradients with them, so the backward pass has nothing to recompute and memory does not grow with
    N x V. Under autocast the products are in its type, the softmax in fp32.
    """
    kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, each = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, kind, wants_grad)
    return loss, each


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kind: torch.dtype | None,
                wants_grad: bool) -> tuple[Tensor, Tensor]:
        """`wants_grad` comes from outside: in here gradients are off, and without them needs_input_grad is true too."""
        with torch.autocast(hidden.device.type, enabled=False):
            loss, each, grad_hidden, grad_weight = _chunked(hidden, weight, targets, kind or weight.dtype, wants_grad)
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(each)
        return loss, each

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_each: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, kind: torch.dtype,
             wants_grad: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, that of each position, and the gradients for an upstream gradient of 1 (None where they are not wanted)."""
    working = weight.to(kind)
    loss = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=hidden.device)
    each = loss.new_empty(len(hidden))
    grad_hidden = torch.empty_like(hidden) if wants_grad else None
    grad_weight = torch.zeros_like(weight) if wants_grad else None
    size = max(1, CHUNK_NUMBERS // len(weight))
    for start in range(0, len(hidden), size):
        rows, target = hidden[start:start + size].to(kind), targets[start:start + size, None]
        ignored, target = target < 0, target.clamp(min=0)  # (C, 1)
        logits = (rows @ working.T).to(loss.dtype)  # (C, V)
        largest, right = logits.amax(1, keepdim=True), logits.gather(1, target)
        error = logits.sub_(largest).exp_()  # from here on all in the memory of the logits
        normalizer = error.sum(1, keepdim=True)
        own = (normalizer.log() + largest - right).masked_fill(ignored, 0)  # (C, 1)
        loss += own.sum()
        each[start:start + size] = own[:, 0]
        if grad_hidden is None or grad_weight is None:
            continue
        error.div_(normalizer.masked_fill(ignored, torch.inf))  # softmax; 0 where the position is ignored
        # not scatter_add_: that has no fixed order on a GPU
        error.scatter_(1, target, error.gather(1, target) - (~ignored).to(error.dtype))
        error = error.to(kind)
        grad_hidden[start:start + size] = error @ working
        if kind == weight.dtype:
            grad_weight.addmm_(error.T, rows)  # without a second V x D
        else:
            grad_weight += (error.T @ rows).to(weight.dtype)
    return loss, each, grad_hidden, grad_weight
