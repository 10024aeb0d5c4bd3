"""Attention and dropout for the CPU against torch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stoker.model import attention as ours
from stoker.model.attention import attention
from stoker.model.dropout import Dropout


def heads(H: int, T: int, kind: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """(2, H, T, 16), as layers make them: strided."""
    drawn = torch.randn(2, T, H, 16, generator=torch.Generator().manual_seed(seed))
    return drawn.to(kind).transpose(1, 2).requires_grad_()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("T, S, H, K, causal, masked", [
    (8, 8, 4, 4, True, False),
    (21, 21, 4, 2, True, False),  # several blocks; two heads share keys
    (21, 13, 4, 4, False, True),
    (5, 13, 4, 1, False, False),
    (21, 21, 2, 2, True, True),
])
def test_values_and_gradients_are_those_of_double_precision(monkeypatch: pytest.MonkeyPatch, T: int, S: int, H: int,
                                                            K: int, causal: bool, masked: bool) -> None:
    monkeypatch.setattr(ours, "BLOCK", 8)
    monkeypatch.setattr(ours, "FEW", 0)
    q, k, v = heads(H, T), heads(K, S, seed=1), heads(K, S, seed=2)
    mask = None
    if masked:
        mask = torch.arange(S) < torch.tensor([S, S // 2])[:, None, None, None]
    y, grad = attention(q, k, v, mask, causal=causal), torch.randn(2, H, T, 16)
    y.backward(grad.to(y.dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    allowed = torch.ones(T, S, dtype=torch.bool).tril() if causal else torch.ones(T, S, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(*exact, allowed if mask is None else mask & allowed, enable_gqa=True)
    expected.backward(grad.double())
    assert type(y.grad_fn).__name__ == "_AttentionBackward" and relative(y, expected) < 0.01
    for found, known in zip((q, k, v), exact):
        assert found.grad is not None and known.grad is not None and relative(found.grad, known.grad) < 0.015


def test_elsewhere_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    q = heads(4, 9, torch.float32)
    assert torch.equal(attention(q, q, q, causal=True), F.scaled_dot_product_attention(q, q, q, is_causal=True))


def test_memory_grows_linearly() -> None:
    """What is kept for the backward pass of twice as many positions is twice as large."""
    kept: list[int] = []
    for T in (512, 1024):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        q = heads(2, T)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            attention(q, q, q, causal=True)
        kept.append(sum(sizes.values()))
    assert kept[1] == 2 * kept[0]


# -- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_a_share_of_p_is_dropped_and_the_mean_stays(p: float, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(1001, 999, dtype=kind))
    share = float((y == 0).double().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / y.numel())**0.5
    assert set(y[y != 0].tolist()) == {float(torch.tensor(1 / (1 - p), dtype=kind))} or kind == torch.float32
    assert float(y.double().mean()) == pytest.approx(1, abs=0.01)


def test_numbers_are_dropped_independently() -> None:
    torch.manual_seed(0)
    dropped = (Dropout(0.3)(torch.ones(4000, 64)) == 0).double()
    assert (torch.corrcoef(dropped.T) - torch.eye(64)).abs().max() < 0.09  # five standard deviations
    assert abs(float((dropped[:-1] * dropped[1:]).mean()) - 0.09) < 0.003


def test_the_gradient_passes_where_the_number_did() -> None:
    x = torch.ones(50, 7, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_it_follows_from_the_seed() -> None:
    drawn: list[Any] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(Dropout(0.5)(torch.ones(64)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_nothing_is_dropped_in_evaluation_or_at_0() -> None:
    x = torch.randn(5, 5)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.5).eval().vectors(x) is x
    assert torch.equal(Dropout(0.0)(x), x) and Dropout(0.0).vectors(x) is x


def test_vectors_are_dropped_whole() -> None:
    torch.manual_seed(0)
    y = Dropout(0.25).vectors(torch.ones(40, 50, 8))
    zero = y == 0
    assert torch.equal(zero.all(-1), zero.any(-1)) and 0.2 < float(zero.double().mean()) < 0.3
