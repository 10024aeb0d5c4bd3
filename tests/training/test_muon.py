"""Muon against torch's own, AdamW for the rest, and updates that are dropped on the device."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stoker.model.experts import Experts, MixtureOfExperts
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
    torch.testing.assert_close(orthogonal([matrix])[0].double(), u @ values.diag() @ v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 0.05)])
def test_a_batch_of_matrices_is_as_each_alone(bf16: bool, tolerance: float) -> None:
    """Tall, wide, stacked, some a thousand times as large as others. In bf16 to its rounding, which is not 0."""
    shapes = [(6, 9), (9, 6), (9, 6), (4, 4), (3, 6, 9), (2, 2, 9, 6)]
    made = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=made) * 10.0 ** (number % 4) for number, shape in enumerate(shapes)]
    for matrix, found in zip(matrices, orthogonal(matrices, bf16=bf16)):
        alone = [orthogonal([each])[0] for each in matrix.reshape(-1, *matrix.shape[-2:])]
        assert found.shape == matrix.shape and found.dtype == torch.float32
        torch.testing.assert_close(found, torch.stack(alone).reshape(matrix.shape), rtol=0, atol=tolerance)
        assert torch.equal(found, found.bfloat16().float()) == bf16


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_matrices_are_orthogonalized_in_bf16_where_the_run_is(precision: str) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "block": nn.Linear(4, 4)})
    groups = optim.build(Phase(), model, Options(optimizer="muon", precision=precision), [model["block"]]).param_groups
    assert [(group["matrix"], group["bf16"]) for group in groups] == [(True, precision == "bf16"), (False, False),
                                                                      (False, False)]


def test_the_experts_of_a_mixture_are_matrices_too() -> None:
    """Each is updated as if it were a matrix by itself."""
    mixture = MixtureOfExperts(8, Experts(24, 1, 16))
    for parameter in mixture.parameters():
        nn.init.normal_(parameter)
    one = nn.Parameter(mixture.down[1].detach().clone())
    optimizer = optim.build(Phase(), mixture, Options(optimizer="muon"), [mixture])
    alone = Muon([{"params": [one], "matrix": True, "weight_decay": 0.1}], Options.lr, (0.9, 0.95))
    mixture.down.grad = torch.randn(24, 8, 16, generator=torch.Generator().manual_seed(0))
    one.grad = mixture.down.grad[1].clone()
    optimizer.step()
    alone.step()
    torch.testing.assert_close(mixture.down[1], one)


def test_a_state_from_before_precision_was_noted_can_be_loaded() -> None:
    ours, theirs = pair()
    state = Muon([{"params": [ours], "matrix": True}], 0.02, (0.9, 0.95)).state_dict()
    del state["param_groups"][0]["bf16"]
    optimizer = Muon([{"params": [theirs], "matrix": True}], 0.02, (0.9, 0.95))
    optimizer.load_state_dict(state)
    theirs.grad = torch.ones_like(theirs)
    optimizer.step()
    assert not torch.equal(ours, theirs)


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Regression), new_run(tmp_path, Regression)
    expected, _ = train(with_callbacks(Regression, StopAt(-1)), whole, optimizer="muon")
    train(with_callbacks(Regression, StopAt(5)), run, optimizer="muon")
    resumed, _ = train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    assert resumed.model[0].weight in resumed.optimizers["main"].state
    assert "momentum" in resumed.optimizers["main"].state[resumed.model[0].weight]
    assert_same(expected.model.state_dict(), resumed.model.state_dict())
