"""Whatever the optimizer, an update whose gradient is not finite changes neither weights nor the optimizer's state."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stoker.config import UserError
from stoker.training.core import optim
from stoker.training.core.figures import Batch, Loss, Moment
from stoker.training.core.options import Options
from stoker.training.core.phases import Phase
from stoker.training.core.step import Step
from toys import Regression, StopAt, Toy, assert_same, new_run, train, with_callbacks

LR = 1e-2


class Counted(torch.optim.Optimizer):
    """Signs of the gradients; counts in plain numbers, of a group and of a parameter, as some optimizers do."""

    def __init__(self, groups: Any, lr: float):
        super().__init__(groups, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p -= group["lr"] * p.grad.sign() / self.state[p]["count"]


def sgd(groups: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr, momentum=0.9)


def counted(groups: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return Counted(groups, lr)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": sgd, "counted": counted,
    "fused sgd": lambda groups, lr, betas: torch.optim.SGD(groups, lr, momentum=0.9, fused=True),
    "plain adamw": lambda groups, lr, betas: torch.optim.AdamW(groups, lr, betas=betas, foreach=False),
    "adafactor": lambda groups, lr, betas: torch.optim.Adafactor(groups, lr),
    "nadam": lambda groups, lr, betas: torch.optim.NAdam(groups, lr, betas),
}


class Overflowing(Toy):
    """A row whose first number is 9 makes a gradient that is infinite, and a loss that is finite."""

    name = "overflowing"
    optimizer: Any = ""

    def model(self) -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def blocks(self, model: Any) -> list[nn.Module]:
        return [model[2]]

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(optimizer=self.optimizer),)

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        made, x = model(batch["x"]), batch["x"]
        spoiled = torch.where(x[:, :1] == 9, (made - made.detach()) * 1e38 * 1e38, made * 0)
        return Loss({"loss": (made - x.flip(1)).float().square().mean(1).sum() + spoiled.float().sum()})


def steps_of(optimizer: Any, folder: Path, precision: str) -> Step:
    stage = type("Overflowing", (Overflowing,), {"optimizer": staticmethod(optimizer) if callable(optimizer)
                                                 else optimizer})(Toy.Config(), folder)
    cfg = Options(lr=LR, warmup_steps=0, lr_schedule="constant", precision=precision, weight_decay=0.1)
    return Step(stage, stage.model().train(), cfg, 9, torch.device("cpu"), lambda *a: None, lambda *a: None)


def rows(number: int, bad: bool = False) -> list[Batch]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
    x[1, 0] = 9 if bad else 1
    return [{"x": x[:2]}, {"x": x[2:]}]


def state(step: Step) -> list[Any]:
    return [copy.deepcopy(step.model.state_dict()), copy.deepcopy(step.optimizers["main"].state_dict())]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", *MAKERS])
def test_an_update_that_is_not_finite_did_not_happen(tmp_path: Path, optimizer: str, precision: str) -> None:
    """Be it the first or a later one: the next is that of a twin which never saw it."""
    make = MAKERS.get(optimizer, optimizer)
    ours, twin = (steps_of(make, tmp_path, precision) for _ in range(2))
    for number, bad in enumerate([True, False, True, True, False]):
        before = state(ours)
        ours.run(number, rows(number, bad))
        if bad:
            assert_same(state(ours), before)
        else:
            for name, scale in twin.loss_scales.items():
                scale.load_state_dict(ours.loss_scales[name].state_dict())
            twin.run(number, rows(number))
            assert_same(state(ours), state(twin))
            assert all(scale.value < 2.0**16 for scale in ours.loss_scales.values())
    assert any(not torch.equal(a, b) for a, b in zip(before[0].values(), ours.model.state_dict().values()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "fused sgd"])
def test_the_host_waits_for_the_first_update_only(tmp_path: Path, optimizer: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: Tensor) -> bool:
        raise AssertionError("the host waits for the device")

    step = steps_of(MAKERS.get(optimizer, optimizer), tmp_path, "fp32")
    step.run(0, rows(0))
    before = state(step)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__bool__", refuse)
        optim.update(step.optimizers["main"], torch.ones(()))
    assert_same(state(step), before)


@pytest.mark.parametrize("optimizer", [name for name in MAKERS if name != "fused sgd"])
def test_good_updates_are_those_of_a_loop_written_by_hand(tmp_path: Path, optimizer: str) -> None:
    """Which leaves out the step whose gradient is not finite."""
    step = steps_of(MAKERS[optimizer], tmp_path, "fp32")
    model = copy.deepcopy(step.model)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    by_hand = MAKERS[optimizer]([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                LR, (0.9, 0.95))
    for number, bad in enumerate([False, True, False, False]):
        step.run(number, rows(number, bad))
        if bad:
            continue
        x = torch.cat([batch["x"] for batch in rows(number)])
        by_hand.zero_grad()
        ((model(x) - x.flip(1)).square().mean(1).sum() / 4).backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *vectors], 1.0)
        by_hand.step()
    for ours, theirs in zip(step.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["counted", "sgd", "adafactor"])
def test_an_optimizer_of_the_stage_s_own_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    class Own(Regression):
        def phases(self) -> tuple[Phase, ...]:
            return (Phase(optimizer=MAKERS[name]),)

    whole, run = new_run(tmp_path, Own), new_run(tmp_path, Own)
    expected, _ = train(with_callbacks(Own, StopAt(-1)), whole)
    train(with_callbacks(Own, StopAt(5)), run)
    resumed, _ = train(with_callbacks(Own, StopAt(-1)), run, resume=True)
    assert_same(expected.state_dict()["optimizers"], resumed.state_dict()["optimizers"])
    assert_same(expected.model.state_dict(), resumed.model.state_dict())


def test_an_unknown_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="phase main: no optimizer is called lion; there are adamw, muon"):
        steps_of("lion", tmp_path, "fp32")


def test_nan_in_the_state_of_any_optimizer_is_found() -> None:
    weight = nn.Linear(2, 2)
    optimizer = Counted([{"params": [weight.weight]}], 0.1)
    optimizer.state[weight.weight] = {"count": 3, "none": None, "whole": torch.ones(2, dtype=torch.long)}
    assert optim.all_finite(weight, [optimizer])
    optimizer.state[weight.weight]["mean"] = torch.tensor([1.0, float("nan")])
    assert not optim.all_finite(weight, [optimizer])
