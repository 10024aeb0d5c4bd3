"""One contract for every callback there is, then what each does."""

import importlib
import inspect
import math
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stoker import monitors
from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.monitors.blanks import Blanks
from stoker.monitors.experts import ExpertLoad
from stoker.monitors.weights import Weights
from stoker.training import callbacks
from stoker.training.callbacks.early_stopping import EarlyStopping
from stoker.training.callbacks.examination import Examination
from stoker.training.core.callback import ACT, OBSERVE, Callback, in_order
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.phases import Phase
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer
from toys import GAN, Buffers, Regression, StopAt, assert_same, new_run, session, train, with_callbacks


def all_callbacks() -> set[type[Callback]]:
    found = set()
    for package in (monitors, callbacks):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            found |= {c for _, c in members if issubclass(c, Callback) and c is not Callback}
    return found


def a_run_with_all(tmp_path: Path) -> Trainer:
    """A finished run in which every callback there is has taken part."""
    first = new_run(tmp_path, Buffers)
    train(Buffers, first)
    alerts = tmp_path / "alerts.jsonl"
    own = Blanks(alerts), ExpertLoad(alerts, lambda model: {"layer": torch.ones(2)})  # those of stages
    kind = with_callbacks(Buffers, *own)
    sitting = session(kind, new_run(tmp_path, Buffers), snapshot=first.snapshots / "snapshot_epoch_0003",
                      early_stopping=True, gradient_checkpointing=True, ema_decay=0.9, max_minutes=60.0, use_wandb=True)
    sitting.examination = Examination(5, "non-finite", sitting.run.incidents, sitting.run.metrics)
    with sitting.run.lock():
        trainer, _ = sitting.prepare()
        trainer.fit()
    return trainer


def test_every_callback_keeps_its_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = a_run_with_all(tmp_path)
    assert {type(c) for c in trainer.callbacks} == all_callbacks() and not trainer.switched_off
    for callback in trainer.callbacks:
        state = callback.state_dict()
        callback.load_state_dict(state)
        assert_same(state, callback.state_dict())
        torch.save(state, tmp_path / "state.pt")
        assert_same(state, torch.load(tmp_path / "state.pt", weights_only=True))
        callback.close(trainer)  # a second time
        assert (callback.__doc__ or "").strip(), type(callback)


def test_monitors_lie_in_monitors_and_what_acts_in_callbacks() -> None:
    for cls in all_callbacks():
        assert (cls.order >= OBSERVE) == cls.__module__.startswith("stoker.monitors."), cls


def test_order_is_by_band_and_ties_keep_their_place() -> None:
    def one(name: str, order: int) -> Callback:
        cls: type[Callback] = type(name, (Callback,), {"order": order})
        return cls()

    given = [one("d", 80), one("b", 20), one("a", 0), one("c", 20)]
    assert [c.key for c in in_order(given)] == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="share a key"):
        in_order([one("a", 0), one("a", 1)])


def test_default_monitors_leave_the_weights_bit_for_bit(tmp_path: Path) -> None:
    watched, _ = train(GAN, new_run(tmp_path, GAN), sanity_check_interval=1)
    sitting = session(GAN, new_run(tmp_path, GAN))
    with sitting.run.lock():
        bare, _ = sitting.prepare()
        bare.callbacks.clear()
        for called in bare.events.listeners.values():
            called.clear()
        bare.fit()
    assert_same(watched.model.state_dict(), bare.model.state_dict())


# -- early stopping -----------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """Stands for a trainer that evaluates every two steps and is asked to stop."""

    steps_per_epoch: int
    steps: int
    step: int = 0
    best: float = math.inf
    best_step: int = -1
    reason: str = ""
    stage = Regression
    phases = (Phase(),)

    @property
    def cfg(self) -> Any:
        return SimpleNamespace(eval_interval=2)

    @property
    def evaluations(self) -> Any:
        return SimpleNamespace(interval=lambda metric: 2)

    def ask(self, what: str, why: str, end: str = "finished") -> None:
        self.reason = self.reason or why


def stopped(stopping: EarlyStopping, rows: list[dict[str, float]], *, epoch: int = 2, steps: int = 1000
            ) -> tuple[int, str]:
    """After how many evaluations, 0 for never, and why. `epoch`: the steps in one."""
    asked: Any = Asked(epoch, steps)
    stopping.on_start(asked)
    for number, row in enumerate(rows, start=1):
        for share in (0.5, 1.5):  # two steps between evaluations, each of two samples
            stopping.on_step_start(asked)
            stopping.on_loss(asked, "main", Ratio(torch.tensor(share * 2 * row.get("train/loss", 0.0)), 2))
            asked.step += 1
            stopping.on_step_end(asked)
        if row.get("eval/loss", math.inf) < asked.best:
            asked.best, asked.best_step = row["eval/loss"], asked.step
        stopping.on_eval_end(asked, row)
        if asked.reason:
            return number, asked.reason
    return 0, ""


@pytest.mark.parametrize("values, mode, after", [
    ([3, 2, 2, 2, 1], "min", 4), ([3, 2, 1, 0.5, 0.2], "min", 0), ([1, 1.0005, 1.0009, 2], "max", 3),
    ([3, 3.1, 2.9, 2.95, 2.95], "min", 5), ([math.nan, math.nan, math.nan], "min", 2),
    ([math.nan, 3, math.nan, 2, math.nan, math.nan], "min", 6),
])
def test_patience(values: list[float], mode: str, after: int) -> None:
    rows = [{"eval/x": value} for value in values]
    assert stopped(EarlyStopping("eval/x", mode, patience=2, min_delta=0.001), rows)[0] == after


@pytest.mark.parametrize("epoch, steps, after, why", [
    (2, 1000, 4, "in 3 epochs"), (20, 1000, 1 + 30, "in 3 epochs"), (21, 1000, 1 + 32, "in 3 epochs"),
    (1, 1000, 1 + 2, "in 4 epochs"),  # an evaluation every other epoch
    (2000, 1000, 1 + 3, "in 3 evaluations"), (1000, 1000, 0, ""),
])
def test_patience_counts_epochs(epoch: int, steps: int, after: int, why: str) -> None:
    """Evaluations only where the run is shorter than an epoch."""
    found, reason = stopped(EarlyStopping("eval/x", "min", 3, 0.0), [{"eval/x": 1.0}] * 50, epoch=epoch, steps=steps)
    assert found == after and reason.endswith(why), reason


def overfit(validation: list[float], training: list[float], epoch: int = 2) -> int:
    rows = [{"eval/loss": loss, "train/loss": trained} for loss, trained in zip(validation, training, strict=True)]
    stopping = EarlyStopping("eval/loss", "min", 99, 0.001, overfit_patience=2, overfit_min_delta=0.01)
    return stopped(stopping, rows, epoch=epoch)[0]


@pytest.mark.parametrize("validation, training, after", [
    ([1.1, 1.2, 1.205, 1.3, 1.4, 1.5], [1.0] * 6, 5),  # grows, not by 0.01, grows, grows
    ([4.0, 3.9, 3.8, 3.7, 3.6, 3.5], [5.0, 4.8, 4.6, 4.4, 4.2, 4.0], 0),  # negative: validation has no dropout
    ([4.0, 4.1, 4.2, 4.3, 4.4, 4.5], [5.0] * 6, 0),  # the same, without a new best
    ([4.0, 3.9, 3.8, 3.7, 3.6, 3.5], [3.5, 3.3, 3.1, 2.9, 2.7, 2.5], 0),  # each is a new best
    ([4.0, 4.1, 3.9, 4.1, 3.8, 4.1], [3.0, 2.9, 2.5, 2.4, 1.9, 1.8], 0),  # every other is
    ([4.0, 4.1, 4.0, 4.0, 4.0, 4.0], [3.9, 3.8, 3.5, 3.2, 3.1, 3.0], 3),
])
def test_the_overfit_gap_is_positive_and_grows_without_a_new_best(validation: list[float], training: list[float],
                                                                  after: int) -> None:
    assert overfit(validation, training) == after


def test_the_overfit_gap_is_compared_from_epoch_to_epoch() -> None:
    """Of four evaluations in an epoch the means count, not what happens in between."""
    def epochs(*gaps: float) -> list[float]:
        return [1 + gap + noise for gap in gaps for noise in (-0.05, 0.05, -0.05, 0.05)]

    assert overfit([1.1, 1.2, 1.3], [1.0] * 3, epoch=1) == 2, "an evaluation every other epoch"
    grows = epochs(0.1, 0.2, 0.3, 0.4)
    assert overfit(grows, [1.0] * 16, epoch=8) == 12
    assert overfit(epochs(0.2, 0.2, 0.2, 0.2), [1.0] * 16, epoch=8) == 0
    best = [*grows[:5], 0.5, *grows[6:]]  # a new best within the second epoch
    assert overfit(best, [1.0] * 16, epoch=8) == 16


def test_a_batch_of_nan_is_left_out_of_the_overfit_gap() -> None:
    stopping = EarlyStopping("eval/loss", "min", 99, 0.001, overfit_patience=2)
    trainer: Any = Asked(2, 1000)
    stopping.on_start(trainer)
    for gap in (0.1, 0.2, 0.3):
        for loss in (4.0, math.nan):
            stopping.on_step_start(trainer)
            stopping.on_loss(trainer, "main", Ratio(torch.tensor(loss), 4))
            trainer.step += 1
            stopping.on_step_end(trainer)
        stopping.on_eval_end(trainer, {"eval/loss": 1 + gap})
    assert stopping.gap == pytest.approx(0.3) and trainer.reason


def test_a_state_of_an_older_version_is_refused() -> None:
    with pytest.raises(UserError, match="counted evaluations"):
        EarlyStopping("eval/x", "min", 5, 0.0).load_state_dict({"best": 1.0, "waited": 3, "gap": 0.1, "grown": 1})


@pytest.mark.parametrize("epoch, overfit_patience, line", [
    (40, 0, "Early stopping: 5 epochs without improvement of eval/x (an evaluation every 2 steps, 20 an epoch)"),
    (4000, 3, "Early stopping: 5 evaluations without improvement of eval/x, or 3 in which validation minus training "
              "loss grew (an evaluation every 2 steps, the run is shorter than an epoch)")])
def test_the_start_says_what_is_counted(epoch: int, overfit_patience: int, line: str,
                                        caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stopped(EarlyStopping("eval/x", "min", 5, 0.0, overfit_patience), [], epoch=epoch)
    assert caplog.messages == [line]


def test_an_abandoned_evaluation_does_not_count() -> None:
    rows: list[dict[str, float]] = [{"eval/x": 1.0}, {}, {}, {"eval/x": 0.5}]
    assert stopped(EarlyStopping("eval/x", "min", 1, 0.0), rows) == (0, "")


@pytest.mark.parametrize("restore", [True, False])
def test_the_best_weights_are_the_ones_handed_out(tmp_path: Path, restore: bool) -> None:
    class Worse(Regression):
        """Gets worse after step 2, by its own account."""

        def score(self, model: Any, batch: Batch) -> dict[str, Any]:
            return {"loss": Ratio(float(abs(self.extra[0].step - 2)), 1)}  # type: ignore[attr-defined]

    @dataclass
    class Step(Callback):
        order = ACT
        step: int = 0

        def on_step_end(self, trainer: Trainer) -> None:
            self.step = trainer.step

    run = new_run(tmp_path, Worse)
    sitting = session(with_callbacks(Worse, Step()), run, eval_interval=1, early_stopping=True, early_stop_patience=1,
                      early_stop_restore_best=restore)
    with run.lock():
        ending = sitting.train()
    assert "early stopping: eval/loss has not improved" in ending.reason
    best, final = (torch.load(run.models / name / "model.pt", weights_only=True) for name in ("best", "final"))
    from safetensors.torch import load_file

    assert_same(best, load_file(run.snapshots / "snapshot_step_00000002" / "model.safetensors"))
    assert all(torch.equal(best[k], final[k]) for k in best) == restore


# -- sanity -------------------------------------------------------------------------------------------------------


@dataclass
class Poison(Callback):
    """Puts NaN into the batches of some steps."""

    order = ACT
    steps: tuple[int, ...]

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        if trainer.step in self.steps:
            batch["x"][0, 0] = math.nan


def alerts(run: RunDir) -> list[dict[str, Any]]:
    return list(Journal(run.alerts).rows())


def test_nan_never_reaches_the_weights_and_is_named(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    trainer, ending = train(with_callbacks(Regression, Poison((4,))), run)
    assert ending.state == "finished" and all(p.isfinite().all() for p in trainer.model.parameters())
    (alert,) = alerts(run)
    assert alert["step"] == 5 and alert["rows"] == trainer.order.rows(4) and "in the loss;" in alert["message"]
    assert (run.incidents / "step_00000005.json").exists()


def test_the_bad_gradient_nearest_the_output_is_named(tmp_path: Path) -> None:
    """From there the backward pass carries NaN down to all the others."""
    @dataclass
    class OneBad(Callback):
        order = ACT

        def on_grad(self, trainer: Trainer, phase: str) -> None:
            if trainer.step == 4:
                trainer.model[2].weight.grad[1] = trainer.model[0].bias.grad[0] = math.nan

    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, OneBad()), run)
    assert "NaN or Inf in gradient of 2.weight;" in alerts(run)[0]["message"]


def test_what_was_dropped_does_not_count_in_the_means(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, Poison((4,))), run, log_interval=3)
    row = next(row for row in Journal(run.metrics).rows() if row["step"] == 6)
    assert row["health/dropped_share"] == pytest.approx(0.5)  # of steps 5 and 6: there was a log line at 4
    assert math.isfinite(row["train/loss"]) and math.isfinite(row["grad_norm"])


def test_in_a_row_means_in_a_row_where_the_host_looks_at_log_steps_only(tmp_path: Path) -> None:
    """As on a GPU: dropped updates far from each other are no reason to halt, three together are."""
    def halted(steps: tuple[int, ...]) -> bool:
        @dataclass
        class OnGpu(Callback):
            order = ACT

            def on_start(self, trainer: Trainer) -> None:
                sanity = next(c for c in trainer.callbacks if type(c).__name__ == "Sanity")
                look = sanity._look
                sanity._look = lambda trainer: None
                sanity.on_log = lambda trainer, metrics: look(trainer)

        run = new_run(tmp_path, Regression)
        _, ending = train(with_callbacks(Regression, OnGpu(), Poison(steps)), run, log_interval=9, eval_interval=99,
                          max_steps=10)
        assert alerts(run)[0]["step"] == steps[0] + 1 and alerts(run)[0]["rows"]
        return ending.state == "halted"

    assert not halted((1, 4, 7)) and halted((1, 4, 5, 6))


def test_nan_does_not_stay_in_buffers(tmp_path: Path) -> None:
    run = new_run(tmp_path, Buffers)
    trainer, ending = train(with_callbacks(Buffers, Poison((4,))), run, sanity_check_interval=1)
    assert ending.state == "finished" and all(t.isfinite().all() for t in trainer.model.state_dict().values())


def test_a_dropped_update_is_as_if_the_step_had_not_been(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, Poison((3,))), run, snapshot_interval=1)
    from safetensors.torch import load_file

    before, after = (load_file(run.snapshots / name / "model.safetensors")
                     for name in ("snapshot_epoch_0001", "snapshot_step_00000004"))
    assert_same(before, after)


def test_a_run_that_keeps_having_nan_is_halted_and_can_go_on(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    trainer, ending = train(with_callbacks(Regression, Poison(tuple(range(2, 99)))), run)
    assert (ending.state, trainer.step) == ("halted", 5) and "3 updates in a row" in ending.reason
    trainer, ending = train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    assert (ending.state, trainer.step) == ("finished", 9)


def test_nan_in_the_optimizer_is_found_at_the_interval(tmp_path: Path) -> None:
    @dataclass
    class Corrupt(Callback):
        order = ACT

        def on_step_start(self, trainer: Trainer) -> None:
            if trainer.step == 2:
                trainer.optimizers["main"].state[trainer.model[0].weight]["exp_avg_sq"][0, 0] = math.inf

    run = new_run(tmp_path, Regression)
    _, ending = train(with_callbacks(Regression, Corrupt()), run, sanity_check_interval=1)
    assert ending.state == "halted" and "optimizer's exp_avg_sq of 0.weight" in ending.reason
    newest = Snapshots(run.snapshots, {}).newest_good()
    assert newest is not None and newest.name == "snapshot_step_00000000"  # the bad state was not saved


# -- gradients, weights ---------------------------------------------------------------------------------------------


def test_gradient_norms_by_part_make_up_the_whole(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(Regression, run, gradient_monitor_interval=1, log_interval=1)
    for row in Journal(run.metrics).rows():
        parts = [value for name, value in row.items() if name.startswith("gradients/") and name != "gradients/zeros"]
        assert len(parts) == 2 and math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-5)


def test_update_ratio_is_that_of_the_weights_themselves(tmp_path: Path) -> None:
    """A sample larger than the tensors is all of them."""
    run = new_run(tmp_path, Regression)
    train(Regression, run, weight_monitor_interval=4, log_interval=4, snapshot_interval=1,
          weight_monitor_sample_size=999)
    from safetensors.torch import load_file

    before, after = (load_file(run.snapshots / name / "model.safetensors")
                     for name in ("snapshot_epoch_0001", "snapshot_step_00000004"))
    part = [name for name in after if name.startswith("0.")]
    change = torch.cat([(after[n] - before[n]).flatten() for n in part]).norm()
    expected = float(change / torch.cat([after[n].flatten() for n in part]).norm())
    row = next(row for row in Journal(run.metrics).rows() if row["step"] == 4)
    assert row["updates/0"] == pytest.approx(expected, rel=1e-5)


def test_a_frozen_part_that_moves_and_a_dead_one_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Meddle(Callback):
        """Freezes the first layer and moves it all the same; the last gets no gradient."""

        order = ACT

        def on_build(self, trainer: Trainer) -> None:
            trainer.model[0].requires_grad_(False)

        def on_grad(self, trainer: Trainer, phase: str) -> None:
            trainer.model[0].weight.data += 0.1
            for p in trainer.model[2].parameters():
                p.grad.zero_()

    train(with_callbacks(Regression, Meddle()), new_run(tmp_path, Regression), weight_decay=0.0)
    assert "0 is frozen and moved" in caplog.text and "2 is trainable and does not move" in caplog.text
    assert "the gradients of 2 are vanishing" in caplog.text


def test_a_part_that_stands_still_at_the_end_is_not_dead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the learning rate comes to 0, what a step adds to a weight is less than its last digit."""
    trainer: Any = SimpleNamespace(model=torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), step=9,
                                   media={}, show=lambda name, media: None)
    watch = Weights(1, 10, tmp_path / "alerts.jsonl")
    watch.on_log(trainer, {"updates/0": 0.0, "weights/0/drift": 0.2, "updates/1": 1e-3, "weights/1/drift": 0.2})
    assert "does not move" not in caplog.text
    watch.on_log(trainer, {"updates/0": 1e-3, "weights/0/drift": 0.2, "updates/1": 0.0, "weights/1/drift": 0.0})
    assert "1 is trainable and does not move" in caplog.text
