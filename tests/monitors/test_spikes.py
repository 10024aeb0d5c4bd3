"""A loss far above the usual is reported once, with its rows; noise, short steps and NaN are not."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.monitors.spikes import ENOUGH, FLOOR, WINDOW, Spikes
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch, Ratio
from stoker.training.trainer import Trainer
from toys import GAN, Regression, StopAt, new_run, train, with_callbacks

LONG: dict[str, Any] = dict(max_steps=60, eval_interval=99, log_interval=7, rows=64, snapshot_interval=0, lr=1e-3)


@dataclass
class Loud(Callback):
    """Makes the batches of some steps ten times as large, so their loss a hundred times."""

    order = ACT
    steps: tuple[int, ...]

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        if trainer.step + 1 in self.steps:
            batch["x"] *= 10


def reported(run: RunDir) -> list[dict[str, Any]]:
    rows = [row for row in Journal(run.alerts).rows() if row["kind"] == "spike"]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_a_spike_is_reported_with_its_step_and_rows(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    trainer, _ = train(with_callbacks(Regression, Loud((40, 52))), run, **LONG)
    assert [row["step"] for row in reported(run)] == [40, 52]
    assert [row["rows"] for row in reported(run)] == [trainer.order.rows(39), trainer.order.rows(51)]
    assert all(row["loss"] > row["bound"] > 0 for row in reported(run))


def test_of_several_in_a_row_the_first_is_reported_and_a_run_without_has_none(tmp_path: Path) -> None:
    run, calm, off = (new_run(tmp_path, Regression) for _ in range(3))
    train(with_callbacks(Regression, Loud((40, 41, 42, 50))), run, **LONG)
    train(with_callbacks(Regression, Loud(())), calm, **LONG)
    train(with_callbacks(Regression, Loud((40,))), off, spike_factor=0.0, **LONG)
    assert [row["step"] for row in reported(run)] == [40, 50] and not reported(calm) and not reported(off)


@pytest.mark.parametrize("at", [38, 40, 45])
def test_interrupted_between_log_lines_the_alerts_are_the_same(tmp_path: Path, at: int) -> None:
    whole, run = new_run(tmp_path, Regression), new_run(tmp_path, Regression)
    train(with_callbacks(Regression, Loud((40, 41, 47)), StopAt(-1)), whole, **LONG)
    train(with_callbacks(Regression, Loud((40, 41, 47)), StopAt(at)), run, **LONG)
    train(with_callbacks(Regression, Loud((40, 41, 47)), StopAt(-1)), run, resume=True)
    assert reported(whole) == reported(run) and len(reported(run)) == 2


def test_each_phase_has_its_own_course(tmp_path: Path) -> None:
    @dataclass
    class LoudGenerator(Callback):
        order = ACT

        def on_loss(self, trainer: Trainer, phase: str, loss: Ratio) -> None:
            if trainer.step + 1 == 40 and phase == "generator":
                loss.total.data += 500

    run = new_run(tmp_path, GAN)
    train(with_callbacks(GAN, LoudGenerator()), run, **LONG | {"lr": 1e-4})
    (row,) = reported(run)
    assert (row["step"], row["phase"]) == (40, "generator") and "loss of generator" in row["message"]


def spikes_of(losses: list[float], counts: list[int], path: Path, factor: float = 10.0) -> list[int]:
    """The steps that a fresh monitor reports, all checked in one log step."""
    spikes = Spikes(path, factor)
    order = SimpleNamespace(rows=lambda step: [])
    for step, (loss, count) in enumerate(zip(losses, counts), start=1):
        trainer: Any = SimpleNamespace(step=step, phases=("main",), order=order, ledger=[])
        spikes.on_step_start(trainer)
        spikes.on_loss(trainer, "main", Ratio(torch.tensor(loss * count, dtype=torch.float64), count))
        spikes.on_step_end(trainer)
    spikes.on_log(trainer, {})
    return [row["step"] for row in Journal(path).rows()]


def test_the_bound_is_median_and_median_deviation(tmp_path: Path) -> None:
    """Against numpy, on losses that fall and jump: every step is compared with the window before it."""
    draw = np.random.default_rng(0)
    losses = (5 * np.exp(-np.arange(400) / 4000) + draw.standard_t(2, 400) / 10).tolist()
    expected, was_above = [], False
    for step in range(1, 401):
        before = np.array(losses[:step - 1][-WINDOW:])
        above = False
        if len(before) >= ENOUGH:
            median = np.median(before)
            deviation = max(np.median(np.abs(before - median)), FLOOR * abs(median))
            above = bool(losses[step - 1] > median + 5 * deviation)
        if above and not was_above:
            expected.append(step)
        was_above = above
    assert spikes_of(losses, [8] * 400, tmp_path / "alerts.jsonl", factor=5.0) == expected and len(expected) > 3


def test_a_flat_loss_does_not_alert_at_every_noise(tmp_path: Path) -> None:
    flat = [2.0 + (1e-6 if step % 3 else 0) for step in range(100)] + [2.15, 2.0, 2.25]
    assert spikes_of(flat, [8] * len(flat), tmp_path / "alerts.jsonl") == [103]


def test_an_epoch_s_short_last_step_is_allowed_more(tmp_path: Path) -> None:
    """One sample has eight times the spread of 64: 3.5 is usual for it, for 64 it would be a spike."""
    draw = np.random.default_rng(0)
    usual = (3 + 0.03 * draw.standard_normal(100)).tolist()
    assert not spikes_of([*usual, 3.5], [64] * 100 + [1], tmp_path / "short.jsonl")
    assert spikes_of([*usual, 3.5], [64] * 101, tmp_path / "full.jsonl") == [101]


def test_what_is_not_finite_is_no_spike_and_spoils_no_median(tmp_path: Path) -> None:
    losses = [2.0] * 40 + [math.nan, math.inf, 2.0, 9.0]
    assert spikes_of(losses, [8] * 44, tmp_path / "alerts.jsonl") == [44]
