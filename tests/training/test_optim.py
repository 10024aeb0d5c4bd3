"""The learning rate against torch's schedulers, AdamW against torch's own, decay on matrices only."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from stoker.training.core import optim
from stoker.training.core.options import Options
from stoker.training.core.phases import Phase


def built(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return optim.build(Phase(), model, Options(lr=lr, weight_decay=weight_decay))


def test_cosine_is_torchs_after_a_linear_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=9)
    cosine = CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    schedule = SequentialLR(optimizer, [warm, cosine], milestones=[10])
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [optim.rate(step, 100, warmup=10, min_ratio=0.1, schedule="cosine") for step in range(100)]
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("schedule, middle, last", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1),
                                                    ("constant", 1.0, 1.0)])
def test_schedules(schedule: str, middle: float, last: float) -> None:
    rates = [optim.rate(step, 110, warmup=10, min_ratio=0.1, schedule=schedule) for step in range(110)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[60] == pytest.approx(middle, abs=1e-9) and rates[-1] == pytest.approx(last, abs=0.06)
    assert rates[-1] > 0.1 or schedule == "constant"
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_no_update_is_wasted_at_a_rate_of_zero() -> None:
    assert optim.rate(0, 100, warmup=0, min_ratio=0.0, schedule="linear") == 1.0
    assert optim.rate(99, 100, warmup=0, min_ratio=0.0, schedule="linear") == pytest.approx(0.01)


def test_decay_is_for_matrices_only() -> None:
    """With gradients of zero an update is the decay alone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4))
    optimizer = built(model, 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if p.dim() == 2 else before[name]
        torch.testing.assert_close(p.detach(), expected)


def test_it_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    a = built(ours, 0.01, 0.0)
    b = torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for _ in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_a_dropped_update_leaves_weights_and_moments_bit_for_bit() -> None:
    model = nn.Linear(4, 4)
    optimizer = built(model, 0.1, 0.5)
    for value, dropped in ((1.0, 0.0), (float("nan"), 1.0)):
        before = [p.detach().clone() for p in model.parameters()]
        moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optim.update(optimizer, torch.tensor(dropped))
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
        assert same == bool(dropped)
    assert all(torch.equal(v, w) for v, w in zip(moments, (v for s in optimizer.state.values() for v in s.values())))


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    assert optim.parameters(built(model, 0.1, 0.1)) == [model.weight]


def test_the_loss_scale_is_torchs() -> None:
    """Against torch's own GradScaler, over overflows and long stretches without."""
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=optim.LossScale.GROWTH_INTERVAL)
    ours, weight = optim.LossScale(torch.device("cpu")), nn.Parameter(torch.zeros(1))
    optimizer, values = torch.optim.SGD([weight], lr=0.0), []
    for step in range(4200):
        overflows = step in (0, 1, 7, 2100)
        weight.grad = torch.tensor([math.inf if overflows else 1.0])
        theirs.scale(torch.ones(()))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(overflows)))
        values.append((float(ours.value), theirs.get_scale()))
    assert all(mine == torchs for mine, torchs in values)
    assert {mine for mine, _ in values} == {2.0**15, 2.0**14, 2.0**13}  # halved, and doubled again
