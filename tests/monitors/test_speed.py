"""Operations a second, and the share of a run's time that counted, by a clock that the test moves."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.daemon import pulse
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.daemon.table import row
from stoker.monitors import goodput, speed, status
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch
from stoker.training.trainer import Trainer
from toys import Killed, Regression, StopAt, new_run, train, with_callbacks

PREPARING, STEP, EVALUATION, IDLE = 30, 5, 10, 1000


@dataclass
class Clock(Callback):
    """Time in which a step takes 5 s, an evaluation 10 s, and all else none. Stands for the module `time` too."""

    order = ACT
    now: float = 1e6
    step_seconds: float = STEP

    def perf_counter(self) -> float:
        return self.now

    time = monotonic = perf_counter

    def on_step_end(self, trainer: Trainer) -> None:
        self.now += self.step_seconds

    def on_eval_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.now += EVALUATION


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (speed, status, pulse):
        monkeypatch.setattr(module, "time", clock)
    return clock


def prepare(run: RunDir, clock: Clock) -> None:
    """What is done before a trainer trains."""
    run.write_status(replace(run.status(), started=clock.now, pid=os.getpid()))
    clock.now += PREPARING


def shares(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["speed/goodput"] for row in Journal(run.timings).rows()}


def test_goodput_counts_what_stands_over_all_that_was_lived(tmp_path: Path, clock: Clock) -> None:
    """Killed at step 7 with a snapshot of step 4; idle, then done from there, in steps of 8 s: 8 steps count, 7 + 4
    were done."""
    run = new_run(tmp_path, Regression)
    prepare(run, clock)
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Regression, clock, Killed(7)), run, rows=800, max_steps=8, eval_interval=99)
    assert shares(run) == {1: 5 / 35, 2: 10 / 40, 4: 20 / 50, 6: 30 / 60}
    assert run.status().busy_seconds == PREPARING + 7 * STEP
    clock.now, clock.step_seconds = clock.now + IDLE, 8
    prepare(run, clock)
    train(with_callbacks(Regression, clock, StopAt(-1)), run, resume=True)
    lived = PREPARING + 7 * STEP + PREPARING
    assert shares(run) == {1: 5 / 35, 2: 10 / 40, 4: 20 / 50, 6: (20 + 16) / (lived + 16),
                           8: (20 + 32) / (lived + 32 + EVALUATION)}
    assert run.status().busy_seconds == row(run)["busy_seconds"] == lived + 32 + EVALUATION


def test_what_was_done_since_the_last_line_counts_when_the_run_goes_on(tmp_path: Path, clock: Clock) -> None:
    """Stopped at step 3, between log lines: the line of step 4 covers step 3 too, though this sitting did 4 only."""
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, clock, StopAt(3)), run, rows=800, max_steps=4, eval_interval=99)
    train(with_callbacks(Regression, clock, StopAt(-1)), run, resume=True)
    assert shares(run)[4] == pytest.approx(4 * STEP / (4 * STEP + EVALUATION))
    assert goodput.Goodput(run).state_dict() == {}, "clocks are no part of a snapshot"


@dataclass
class Rates(Callback):
    """Gives the speed monitor what an estimate would."""

    order = ACT
    flops_per_sample: float
    peak_flops: float

    def on_start(self, trainer: Trainer) -> None:
        monitor = next(c for c in trainer.callbacks if isinstance(c, speed.Speed))
        monitor.flops_per_sample, monitor.peak_flops = self.flops_per_sample, self.peak_flops


@pytest.mark.parametrize("flops, peak, tflops, share", [(3e12, 6e12, 4.8, 0.8), (3e12, 0.0, 4.8, None),
                                                        (0.0, 6e12, None, None)])
def test_operations_a_second(tmp_path: Path, clock: Clock, flops: float, peak: float, tflops: float | None,
                             share: float | None) -> None:
    """8 samples in 5 s."""
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, clock, Rates(flops, peak)), run, rows=800)
    for logged in Journal(run.timings).rows():
        assert logged.get("speed/tflops") == (None if tflops is None else pytest.approx(tflops))
        assert logged.get("speed/peak_share") == (None if share is None else pytest.approx(share))


def test_the_time_left_follows_from_the_estimate_then_from_recent_lines(clock: Clock) -> None:
    """A line a step, and 2 s between two lines for a snapshot, which is no part of the speed."""
    monitor, took = speed.Speed(step_seconds=7.0), [50, 5, 6, 30, 7, 8, 8, 8]
    trainer: Any = SimpleNamespace(step=0, steps=20, timings={}, evaluations=SimpleNamespace(times=lambda *steps: 0))
    found, expected = list[float](), [7, 7, 7.5, 8, 8.5, 9, 10, 10]
    for step, seconds in enumerate(took, 1):
        monitor.on_step_start(trainer)
        clock.now += seconds
        trainer.step = step
        monitor.on_step_end(trainer)
        monitor.on_log(trainer, {})
        clock.now += 2
        found.append(trainer.timings["speed/eta_seconds"] / (20 - step))
        assert trainer.timings["speed/step_seconds"] == pytest.approx(seconds)
    assert found == pytest.approx(expected)


def test_the_samples_are_a_stage_s_first_unit(tmp_path: Path, clock: Clock) -> None:
    class Tokens(Regression):
        def size(self, batch: Batch) -> dict[str, int]:
            return {"images": 2 * len(batch["x"]), "tok": 1000}

    run = new_run(tmp_path, Tokens)
    train(with_callbacks(Tokens, clock, Rates(3e12, 0.0)), run, rows=800)
    assert {row["speed/tflops"] for row in Journal(run.timings).rows()} == {9.6}
