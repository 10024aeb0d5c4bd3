"""The moving average of the weights: what it is, who sees it, and that training does not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stoker.training.callbacks.ema import EMA
from stoker.training.core.callback import Callback
from stoker.training.core.figures import Batch, Ratio
from stoker.training.trainer import Trainer
from toys import Buffers, Regression, StopAt, assert_same, new_run, session, train, with_callbacks


@dataclass
class History(Callback):
    """The weights after each update, before the average sees them."""

    order = 15
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def on_start(self, trainer: Trainer) -> None:
        self.weights.append(copied(trainer))

    def on_step_end(self, trainer: Trainer) -> None:
        self.weights.append(copied(trainer))


@dataclass
class Evaluated(Callback):
    order = 60
    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def on_eval_start(self, trainer: Trainer) -> None:
        self.seen.append(copied(trainer))


def copied(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def average(history: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """As the definition says, in double precision."""
    mean = {name: t.double() for name, t in history[0].items()}
    for n, weights in enumerate(history[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        mean = {name: kept * mean[name] + (1 - kept) * weights[name].double() for name in mean}
    return mean


def test_evaluations_and_the_models_see_the_average_and_training_does_not(tmp_path: Path) -> None:
    plain, _ = train(Regression, new_run(tmp_path, Regression))
    history, evaluated = History(), Evaluated()

    class FirstIsBest(Regression):
        def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
            return {"loss": Ratio(float(len(evaluated.seen)), 1)}

    stage, run = with_callbacks(FirstIsBest, history, evaluated), new_run(tmp_path, Regression)
    sitting = session(stage, run, ema_decay=0.7)
    with run.lock():
        sitting.train()
    assert_same(dict(plain.model.state_dict()), history.weights[-1])
    for seen, steps in zip(evaluated.seen, (4, 8, 9), strict=True):
        expected = average(history.weights[:steps + 1], 0.7)
        for name, tensor in seen.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert_same(torch.load(run.models / "final" / "model.pt"), evaluated.seen[-1])
    assert_same(torch.load(run.models / "best" / "model.pt"), evaluated.seen[0])


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    trainer, _ = train(with_callbacks(Buffers, StopAt(-1)), whole, ema_decay=0.9)
    train(with_callbacks(Buffers, StopAt(5)), run, ema_decay=0.9)
    resumed, _ = train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    ours, theirs = (next(c for c in t.callbacks if isinstance(c, EMA)) for t in (resumed, trainer))
    assert ours.updates == theirs.updates == 9
    assert_same(ours.state_dict(), theirs.state_dict())


def test_a_swap_leaves_the_weights_as_they_were_whatever_happens() -> None:
    model = torch.nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = EMA(0.9, average={name: torch.zeros_like(p) for name, p in model.named_parameters()})
    with pytest.raises(KeyboardInterrupt), ema.averaged(model):
        assert not any(p.any() for p in model.parameters())
        raise KeyboardInterrupt
    assert_same(before, {name: p.detach() for name, p in model.named_parameters()})
