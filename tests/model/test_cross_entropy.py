"""The chunked cross-entropy is torch's, and never makes a tensor of the size of the logits."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.model import cross_entropy
from stoker.model.cross_entropy import linear_cross_entropy


def inputs(n: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, (n,))


@pytest.mark.parametrize("n", [1, 16, 37])
def test_loss_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 16 * 64 * 8)  # 16 rows to a chunk
    hidden, weight, targets = inputs(n, 8, 50, torch.float64)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected_grads = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)[0]
    torch.testing.assert_close(loss, expected)
    again, each = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(again, loss) and not each.requires_grad
    torch.testing.assert_close(each, F.cross_entropy(hidden @ weight.T, targets, reduction="none").detach())
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), expected_grads)


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(4, 8, 50, torch.float32)
    expected = F.cross_entropy(1e3 * hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(1e3 * hidden, weight, targets)[0], expected, rtol=1e-5, atol=1e-2)


def test_ignored_targets_add_nothing_to_loss_or_gradients() -> None:
    hidden, weight, targets = inputs(9, 8, 50, torch.float64)
    targets[2:5] = cross_entropy.IGNORED
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    loss, each = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    assert each[2:5].eq(0).all()
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)),
                               torch.autograd.grad(expected, (hidden, weight)))


def test_without_gradients() -> None:
    hidden, weight, targets = inputs(5, 8, 50, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets)[0],
                                   F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))


def test_under_autocast_products_are_in_bf16_and_the_sum_is_not() -> None:
    hidden, weight, targets = inputs(64, 32, 50, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)[0]
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    exact = linear_cross_entropy(*(t.detach() for t in (hidden, weight)), targets)[0]
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    assert loss.item() != exact.item()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize(("length", "most", "lengths"), [
    (2048, 1334, [1024, 1024]), (2600, 1334, [896, 896, 808]), (2048, 4096, [2048]), (130, 100, [64, 64, 2]),
    (5, 3, [3, 2]), (0, 7, [])])
def test_chunks_are_of_nearly_equal_lengths(length: int, most: int, lengths: list[int]) -> None:
    """Products of 1,334 and 714 rows were a third slower than twice those of 1,024."""
    rows = torch.arange(length)
    chunks = [rows[chunk] for chunk in cross_entropy._equal_slices(length, most)]
    assert [len(chunk) for chunk in chunks] == lengths
    assert torch.equal(torch.cat([*chunks, rows[:0]]), rows)


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 2**14 * 4)
    hidden, weight, targets = inputs(4096, 4, 512, torch.float32)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert largest.numbers <= 2**14 < 4096 * 512


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


def test_an_evaluation_makes_no_gradients() -> None:
    hidden, weight, targets = inputs(64, 32, 50, torch.float32)
    with Products() as trained:
        linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad(), Products() as scored:
        linear_cross_entropy(hidden, weight, targets)
    assert (trained.count, scored.count) == (3, 1)
