"""Cross-entropy of a linear head that never holds the logits of a whole batch.

Axes: N positions, D hidden size, V vocabulary, C positions of a chunk, R positions of a block.
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a target at which nothing is predicted, as in torch's own cross_entropy
CHUNK_BYTES = 2**27  # of logits held at a time; with a quarter of it, a step takes a tenth longer
IN_CACHE = 2**20  # numbers that a CPU processes at a time, so that they stay in its cache
ON_A_GPU = 2**25  # logits whose softmax a GPU computes at a time, in fp32: 128 MiB
ALIGNED = 64  # numbers; if rows are no multiple of it, a product takes half as long again on a CPU


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over positions of -log softmax(hidden @ weight.T)[target], and its summands, which have no gradient.

    hidden (N, D), weight (V, D), targets (N,) of int64 -> scalar and (N,) in fp32; a position whose target is IGNORED
    adds 0. Logits and gradients are computed C positions at a time in the forward pass: memory does not grow with
    N x V, and the backward pass, which can be called only once, has nothing to recompute. Under autocast the products
    are in its type, the softmax in fp32.
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
        """Multiplies in place, so it can be called once only."""
        grads = ctx.saved_tensors
        if grad_loss.device.type != "cpu" or grad_loss != 1:  # to compare a GPU's number would wait for the GPU
            grads = [grad.mul_(grad_loss) for grad in grads]
        return *grads, None, None, None


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, kind: torch.dtype,
             wants_grad: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The loss, the loss of each position (N,), and the gradients of hidden (N, D) and of weight (V, D) for a gradient
    of 1 of the loss (None unless `wants_grad`)."""
    working, V = weight.to(kind), len(weight)
    each = hidden.new_empty(len(hidden), dtype=torch.promote_types(weight.dtype, torch.float32))
    new = torch.empty_like if len(hidden) else torch.zeros_like
    grad_hidden, grad_weight = (new(tensor) if wants_grad else None for tensor in (hidden, weight))
    padded = -(-V // ALIGNED) * ALIGNED
    on_cpu = hidden.device.type == "cpu"
    for chunk in _equal_slices(len(hidden), CHUNK_BYTES // (padded * kind.itemsize)):
        rows = hidden[chunk].to(kind)
        logits = rows.new_empty(len(rows), padded)[:, :V]  # (C, V)
        torch.mm(rows, working.T, out=logits)
        target, loss = targets[chunk, None], each[chunk, None]  # (C, 1)
        counted, target = target >= 0, target.clamp(min=0)
        for block in _slices(len(rows), (IN_CACHE if on_cpu else ON_A_GPU) // V):
            loss[block] = _softmax(logits[block], target[block], each.dtype, wants_grad)
        loss.masked_fill_(~counted, 0)
        if grad_hidden is None or grad_weight is None:
            continue
        rows = rows * counted  # masks the smaller factor: it has D columns, the logits have V
        grad_hidden[chunk] = (logits @ working).mul_(counted)
        for part in _slices(V, IN_CACHE // weight.shape[1] if on_cpu else V):
            add = Tensor.add_ if chunk.start else Tensor.copy_  # the memory is not initialized yet
            add(grad_weight[part], logits[:, part].T @ rows)
    return each.sum(), each, grad_hidden, grad_weight


def _slices(length: int, most: int) -> list[slice]:
    """Consecutive slices of at most `most` positions each, and of at least one."""
    return [slice(start, start + max(1, most)) for start in range(0, length, max(1, most))]


def _equal_slices(length: int, most: int) -> list[slice]:
    """Slices of nearly equal lengths: all but the last are multiples of ALIGNED if `most` is no smaller than that. On a
    CPU, a row of a bf16 product of 1,024 rows takes 0.7 of the time that a row of one of 1,334 rows takes."""
    most = most // ALIGNED * ALIGNED or max(1, most)
    pieces = max(1, -(-length // most))
    return _slices(length, min(most, -(-length // (pieces * ALIGNED)) * ALIGNED))


def _softmax(logits: Tensor, target: Tensor, exact: torch.dtype, wants_grad: bool) -> Tensor:
    """logits (R, V), target (R, 1) -> cross-entropy (R, 1), computed in `exact`. With `wants_grad` the logits are
    replaced by its gradient."""
    numbers = logits.to(exact)
    largest, right = numbers.amax(1, keepdim=True), numbers.gather(1, target)
    probabilities = torch.softmax(numbers, 1)
    # the largest probability is 1 / sum(exp(logits - largest))
    loss = largest - right - probabilities.amax(1, keepdim=True).log()
    if wants_grad:
        # not scatter_add_: that has no fixed order on a GPU
        probabilities.scatter_(1, target, probabilities.gather(1, target) - 1)
        logits.copy_(probabilities)
    return loss
