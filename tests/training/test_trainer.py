"""The loop: order of events, accumulation, evaluation, what callbacks may and may not do."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker.daemon.journal import Journal
from stoker.training.core import callback
from stoker.training.core.callback import ACT, OBSERVE, Callback
from stoker.training.core.figures import Batch, Ratio
from stoker.training.trainer import Trainer
from toys import (
    GAN,
    TOYS,
    Buffers,
    Contrastive,
    Recorder,
    Regression,
    StopAt,
    Toy,
    assert_same,
    new_run,
    train,
    with_callbacks,
)

ORDER = """
on_build
on_start
on_save
on_step_start
on_batch
on_batch
on_loss discriminator
on_loss discriminator
on_grad discriminator
on_loss generator
on_loss generator
on_grad generator
on_step_end
on_log
on_step_start
on_batch
on_loss discriminator
on_grad discriminator
on_loss generator
on_grad generator
on_step_end
on_save
on_eval_start
on_eval_end
on_log
on_save
on_stop all steps done
close
"""


def test_events_come_in_the_documented_order(tmp_path: Path) -> None:
    """Two phases, two micro-batches; the second step is an epoch's last and has one only."""
    recorder = Recorder()
    train(with_callbacks(GAN, recorder), new_run(tmp_path, GAN), rows=12, max_steps=2, eval_interval=2, log_interval=2,
          snapshot_interval=2)
    assert recorder.seen == ORDER.split("\n")[1:-1]
    second = recorder.seen[recorder.seen.index("on_log") + 1:]  # in the first there is no evaluation before the log
    seen = ["on_build", "on_start", *(line.split()[0] for line in second)]
    seen = list(dict.fromkeys(reversed(seen)))[::-1]  # the save before the last evaluation comes out of turn
    documented = [line.split()[0] for line in (callback.__doc__ or "").splitlines() if line.strip().startswith("on_")]
    assert seen == [event for event in [*documented, "close"] if event in seen]


@dataclass
class Kept(Callback):
    """Keeps the gradients of the first update, and every loss logged."""

    order = ACT

    def __post_init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_grad(self, trainer: Trainer, phase: str) -> None:
        if trainer.step == 0:
            self.kept = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["train/loss"])


@pytest.mark.parametrize("batch, accum", [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_accumulation_equals_a_bigger_batch(tmp_path: Path, batch: int, accum: int) -> None:
    """Also for the uneven last step of an epoch (20 rows are two steps of 8 and one of 4)."""
    size = batch * accum
    whole, parts = Kept(), Kept()
    train(with_callbacks(Regression, whole), new_run(tmp_path, Regression), batch_size=size, grad_accum_steps=1,
          rows=20)
    train(with_callbacks(Regression, parts), new_run(tmp_path, Regression), batch_size=batch, grad_accum_steps=accum,
          rows=20)
    for a, b in zip(whole.kept, parts.kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert whole.losses == pytest.approx(parts.losses, rel=1e-4) and len(whole.losses) > 3


def test_loss_is_the_mean_over_samples_of_the_whole_validation_set(tmp_path: Path) -> None:
    """7 rows in batches of 4 and 3: the mean of batch means would be another number."""
    run = new_run(tmp_path, Regression)
    trainer, _ = train(Regression, run)
    rows = torch.stack([trainer.stage.dataset("validation")[i] for i in range(7)])
    with torch.no_grad():
        expected = (trainer.model(rows) - rows.cumsum(1)).square().mean()
    last = list(Journal(run.metrics).rows())[-1]
    assert last["eval/loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("toy", TOYS)
def test_toys_learn(tmp_path: Path, toy: type[Toy]) -> None:
    run = new_run(tmp_path, toy)
    train(toy, run, max_steps=150, lr=1e-2, log_interval=15, eval_interval=150, rows=16, snapshot_interval=0)
    rows = list(Journal(run.metrics).rows())
    losses = [row.get("train/loss", row.get("train/discriminator/loss")) for row in rows]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.9 * losses[0]


def test_gradient_penalty_of_one_phase_does_not_reach_the_other(tmp_path: Path) -> None:
    """Each optimizer of the GAN holds its own part, and steps it."""
    trainer, _ = train(GAN, new_run(tmp_path, GAN))
    held = {phase: {id(p) for g in o.param_groups for p in g["params"]} for phase, o in trainer.optimizers.items()}
    assert not held["generator"] & held["discriminator"]
    assert held["generator"] == {id(p) for p in trainer.model["generator"].parameters()}


class Restless(Buffers):
    """Draws random numbers while it is evaluated."""

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        random.random(), np.random.rand(), torch.rand(1)
        return super().score(model, batch)


def test_how_often_is_evaluated_does_not_change_what_is_learned(tmp_path: Path) -> None:
    often, never = (train(Restless, new_run(tmp_path, Restless), eval_interval=n)[0] for n in (1, 99))
    assert_same(often.model.state_dict(), never.model.state_dict())


@dataclass
class Broken(Callback):
    """Raises at one event."""

    event: str
    order = OBSERVE

    def fail(self, *given: Any) -> None:
        raise RuntimeError("broken on purpose")


def broken(event: str, order: int) -> Callback:
    cls = type("Broken", (Broken,), {event: Broken.fail, "order": order})
    return cls(event)  # type: ignore[no-any-return]


MONITORED = [event for event in callback.EVENTS if event not in ("on_error", "on_trouble")]


@pytest.mark.parametrize("event", MONITORED)
def test_a_monitor_that_raises_leaves_the_weights_as_they_are(tmp_path: Path, event: str) -> None:
    good, _ = train(Buffers, new_run(tmp_path, Buffers))
    bad, ending = train(with_callbacks(Buffers, broken(event, OBSERVE)), new_run(tmp_path, Buffers))
    assert ending.state == "finished" and bad.step == good.step and bad.switched_off == ["Broken"]
    assert_same(good.model.state_dict(), bad.model.state_dict())


def test_an_acting_callback_that_raises_ends_the_run(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        train(with_callbacks(Buffers, recorder, broken("on_step_end", ACT)), new_run(tmp_path, Buffers))
    assert recorder.seen[-2:] == ["on_error", "close"]


@dataclass
class Skip(Callback):
    """Skips one update."""

    order = ACT
    step: int

    def on_grad(self, trainer: Trainer, phase: str) -> None:
        if trainer.step == self.step:
            trainer.skip("on purpose")


def test_a_skipped_update_changes_nothing(tmp_path: Path) -> None:
    trainer, _ = train(with_callbacks(Contrastive, Skip(0)), new_run(tmp_path, Contrastive), max_steps=1)
    fresh, _ = train(with_callbacks(Contrastive, StopAt(-1)), new_run(tmp_path, Contrastive), max_steps=1)
    start = trainer.snapshots.folder / "snapshot_step_00000000"
    from safetensors.torch import load_file

    assert_same(load_file(start / "model.safetensors"), dict(trainer.model.state_dict()))
    assert not torch.equal(trainer.model["left"].weight, fresh.model["left"].weight)


@pytest.mark.parametrize("toy", TOYS)
def test_the_same_seed_gives_the_same_bits_and_another_other_ones(tmp_path: Path, toy: type[Toy]) -> None:
    first, second, other = (train(toy, new_run(tmp_path, toy), seed=seed)[0] for seed in (1, 1, 2))
    assert_same(first.model.state_dict(), second.model.state_dict())
    with pytest.raises(AssertionError):
        assert_same(first.model.state_dict(), other.model.state_dict())
