"""Muon against torch's own, AdamW for the rest, and updates that are dropped on the device."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stoker.training.core import optim
from stoker.training.core.muon import Muon, orthogonal
from stoker.training.core.options import Options
from stoker.training.core.phases import Phase
from toys import Regression, StopAt, assert_same, new_run, train, with_callbacks


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_singular_values_are_lifted_towards_one(shape: tuple[int, int]) -> None:
    """The quintic iteration applied to the singular values themselves, in double precision: its definition."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrix).double(), u @ values.diag() @ v, rtol=1e-3, atol=1e-4)


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    values = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    return nn.Parameter(values.clone()), nn.Parameter(values.clone())


def test_a_matrix_is_updated_as_by_torchs_muon() -> None:
    """Which orthogonalizes in bf16: hence the tolerance, of a hundredth of an update."""
    ours, theirs = pair()
    a = Muon([{"params": [ours], "matrix": True, "weight_decay": 0.1}], 0.02, (0.9, 0.95))
    b = torch.optim.Muon([theirs], 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for i in range(5):
        ours.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(i + 2))
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    update = 0.02 * 0.2 * math.sqrt(20)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=0.02 * 5 * update)


def test_a_convolution_is_updated_as_the_matrix_that_it_is() -> None:
    """With a row for each channel that it computes; one of groups, and its bias, by AdamW."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv2d(4, 4, 3, groups=4)])
    flat = nn.ModuleList([nn.Linear(36, 6, bias=False)])
    with torch.no_grad():
        flat[0].weight.copy_(model[0].weight.flatten(1))
    cfg = Options(optimizer="muon", lr=0.02, weight_decay=0.1)
    ours, theirs = (optim.build(Phase(), each, cfg, each) for each in (model, flat))
    optim.set_rate(ours, 0.02)
    optim.set_rate(theirs, 0.02)
    for i in range(3):
        grads = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(i))
        model[0].weight.grad, flat[0].weight.grad = grads.clone(), grads.flatten(1).clone()
        ours.step()
        theirs.step()
    assert torch.equal(model[0].weight.flatten(1), flat[0].weight)
    matrices = [p for group in ours.param_groups if group["matrix"] for p in group["params"]]
    assert len(matrices) == 1 and matrices[0] is model[0].weight


def test_the_rest_is_updated_as_by_torchs_adamw() -> None:
    ours, theirs = pair()
    a = Muon([{"params": [ours], "weight_decay": 0.1}], 0.02, (0.8, 0.9))
    b = torch.optim.AdamW([theirs], 0.02, (0.8, 0.9), weight_decay=0.1, fused=True)
    for i in range(5):
        ours.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(i + 2))
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)


def test_a_dropped_update_changes_nothing() -> None:
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    groups = [{"params": [matrix], "matrix": True, "weight_decay": 0.1}, {"params": [vector]}]
    optimizer = Muon(groups, 0.1, (0.9, 0.95))
    for value, dropped in ((1.0, 0.0), (math.nan, 1.0), (1.0, 0.0)):
        before = [matrix.detach().clone(), vector.detach().clone(),
                  *(t.clone() for state in optimizer.state.values() for t in state.values())]
        matrix.grad, vector.grad = torch.full((4, 4), value), torch.full((4,), value)
        optim.update(optimizer, torch.tensor(dropped))
        now = [matrix, vector, *(t for state in optimizer.state.values() for t in state.values())]
        assert all(torch.equal(a, b) for a, b in zip(before, now)) == bool(dropped)
    assert all(t.isfinite().all() for t in now)


def test_it_takes_the_matrices_of_the_blocks(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "block": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    optimizer = optim.build(Phase(), model, Options(optimizer="muon"), [model["block"]])
    matrices = [p for group in optimizer.param_groups if group["matrix"] for p in group["params"]]
    assert [id(p) for p in matrices] == [id(model["block"].weight)]
    assert len(optim.parameters(optimizer)) == len(list(model.parameters()))


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Regression), new_run(tmp_path, Regression)
    expected, _ = train(with_callbacks(Regression, StopAt(-1)), whole, optimizer="muon")
    train(with_callbacks(Regression, StopAt(5)), run, optimizer="muon")
    resumed, _ = train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    assert resumed.model[0].weight in resumed.optimizers["main"].state
    assert "momentum" in resumed.optimizers["main"].state[resumed.model[0].weight]
    assert_same(expected.model.state_dict(), resumed.model.state_dict())
