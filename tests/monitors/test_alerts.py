"""No progress, overfitting, slowness, an idle and a hot GPU: reported once, with what to do, until it passes."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stoker.daemon.journal import Journal
from stoker.monitors.alerts import Alarm, Alerts
from stoker.monitors.pace import Pace
from stoker.monitors.progress import Progress, stands_still
from toys import Regression, StopAt, new_run, train, with_callbacks

OF_THE_MACHINE = {"slow", "gpu idle", "gpu hot"}  # the rest follows from the mathematics


def reported(path: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["kind"]) for row in Journal(path).rows()]


def test_what_is_done_again_is_not_reported_again(tmp_path: Path) -> None:
    alerts = Alerts(tmp_path / "alerts.jsonl")
    for step, message in ((3, "one"), (3, "one"), (4, "one"), (3, "other")):
        alerts.report(step, "kind", message, rows=[[1]])
    assert [(row["step"], row["message"]) for row in Journal(alerts.path).rows()] == [(3, "one"), (4, "one"),
                                                                                      (3, "other")]


def test_an_alarm_rings_once_until_it_has_passed() -> None:
    alarm = Alarm(patience=2)
    assert [alarm.rings(holds == "x") for holds in "x.xxx.xxxx"] == [c == "!" for c in "...!...!.."]


# -- progress -----------------------------------------------------------------------------------------------------


def after(path: Path, losses: list[float], *, steps: int, evaluations: dict[int, float] | None = None,
          every: int = 10) -> Progress:
    """A monitor that has seen these losses, a log line each `every` steps of a run of `steps`."""
    monitor = Progress(path)
    for line, loss in enumerate(losses, start=1):
        metrics = {"train/loss": loss, "lr": 1.0}
        if evaluations and line in evaluations:
            metrics["eval/loss"] = evaluations[line]
        trainer: Any = SimpleNamespace(step=every * line, steps=steps)
        monitor.on_log(trainer, metrics)
    return monitor


def test_to_stand_still_is_to_fall_by_less_than_a_hundredth_with_certainty() -> None:
    """Against numpy's least squares and its covariance."""
    draw = np.random.default_rng(0)
    answers = set()
    for slope in np.linspace(-0.004, 0.004, 41):
        steps = np.arange(20) * 10
        losses = 3 + slope * steps + 0.05 * draw.standard_normal(20)
        (fitted, _), covariance = np.polyfit(steps, losses, 1, cov=True)
        steepest = fitted - 2 * math.sqrt(covariance[0, 0])
        expected = bool(-steepest * 190 < 0.01 * losses.mean())
        assert stands_still(tuple(steps), tuple(losses)) == expected
        answers.add(expected)
    assert answers == {True, False}


def test_the_last_steps_of_a_run_that_learned_are_no_standstill(tmp_path: Path) -> None:
    """The course of a language model's loss: falling ever more slowly, with the noise of single batches."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        losses = [5 + 5 * math.exp(-step / 60) + 0.1 * draw.standard_normal() for step in range(1, 201)]
        after(tmp_path / "alerts.jsonl", losses, steps=200, every=1)
    assert not reported(tmp_path / "alerts.jsonl")


@pytest.mark.parametrize("course, expected", [
    ("falls slowly", 0), ("stands still", 1), ("rises", 1), ("is constant", 1),
])
@pytest.mark.parametrize("seed", range(5))
def test_no_progress(tmp_path: Path, course: str, expected: int, seed: int) -> None:
    """Falling until step 100; then for 300 of the run's 400 steps as it says."""
    draw = np.random.default_rng(seed)
    slope = {"falls slowly": -0.004, "stands still": 0.0, "rises": 0.005, "is constant": 0.0}[course]
    noise = 0.0 if course == "is constant" else 0.01
    losses = [4 - 0.2 * line for line in range(10)]
    losses += [2 + slope * line + noise * draw.standard_normal() for line in range(30)]
    after(tmp_path / "alerts.jsonl", losses, steps=400)
    found = reported(tmp_path / "alerts.jsonl")
    assert len(found) >= 1 if expected else not found  # noise may look like progress for a while: then twice
    assert all(100 < step <= 320 for step, _ in found[:1]), "not long after two quarters of the run"


def test_no_progress_is_reported_again_after_progress(tmp_path: Path) -> None:
    losses = [2.0] * 20 + [2 - 0.1 * line for line in range(15)] + [0.5] * 20
    after(tmp_path / "alerts.jsonl", losses, steps=400)
    assert len(reported(tmp_path / "alerts.jsonl")) == 2


def test_a_short_run_s_quarter_is_too_few_lines_to_judge_by(tmp_path: Path) -> None:
    after(tmp_path / "alerts.jsonl", [2.0] * 11, steps=120)
    assert not reported(tmp_path / "alerts.jsonl")
    after(tmp_path / "alerts.jsonl", [2.0] * 13, steps=130)
    assert reported(tmp_path / "alerts.jsonl") == [(130, "no progress")]


@pytest.mark.parametrize("evaluated, trained, expected", [
    ([3.0, 2.9, 3.0, 3.1, 3.2, 3.3], [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], [(100, "overfitting")]),
    ([3.0, 2.9, 3.0, 3.1, 3.0, 3.1], [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], []),
    ([3.0, 2.9, 3.0, 3.1, 3.2, 3.3], [3.0, 2.5, 2.6, 2.7, 2.8, 2.9], []),  # both get worse: that is no overfitting
    ([3.0, 2.9, math.nan, 3.0, 3.1, 3.2], [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], [(120, "overfitting")]),
])
def test_overfitting(tmp_path: Path, evaluated: list[float], trained: list[float],
                     expected: list[tuple[int, str]]) -> None:
    """Two log lines to an evaluation; their mean is what counts."""
    losses = [loss + way for loss in trained for way in (0.2, -0.2)]
    after(tmp_path / "alerts.jsonl", losses, steps=10**6,
          evaluations={2 * (i + 1): value for i, value in enumerate(evaluated)})
    found = [row for row in reported(tmp_path / "alerts.jsonl") if row[1] == "overfitting"]
    assert found == expected


@pytest.mark.parametrize("cut", range(1, 12))
def test_it_goes_on_where_it_was(tmp_path: Path, cut: int) -> None:
    """Overfitting from the start; the state moves to a fresh monitor after any line."""
    trained = [3.0, 2.9, 2.5, 2.6, 2.0, 2.1, 1.5, 1.4, 1.0, 0.9, 0.5, 0.6]
    lines = [{"train/loss": loss} | ({"eval/loss": 2 + i / 10} if i % 2 else {}) for i, loss in enumerate(trained)]
    whole, run = Progress(tmp_path / "whole.jsonl"), Progress(tmp_path / "run.jsonl")
    for i, metrics in enumerate(lines):
        if i == cut:
            fresh = Progress(tmp_path / "run.jsonl")
            fresh.load_state_dict(run.state_dict())
            run = fresh
        for monitor in (whole, run):
            trainer: Any = SimpleNamespace(step=10 * i, steps=10**6)
            monitor.on_log(trainer, metrics)
    assert reported(tmp_path / "whole.jsonl") == reported(tmp_path / "run.jsonl") == [(70, "overfitting")]
    assert whole.state_dict() == run.state_dict()


def test_a_stage_without_one_training_loss_is_left_alone(tmp_path: Path) -> None:
    monitor = Progress(tmp_path / "alerts.jsonl")
    for step in range(1, 50):
        trainer: Any = SimpleNamespace(step=step, steps=50)
        monitor.on_log(trainer, {"train/generator/loss": 1.0, "eval/loss": float(step)})
    assert not reported(tmp_path / "alerts.jsonl")


def test_alerts_of_the_mathematics_are_the_same_after_a_resume(tmp_path: Path) -> None:
    """With a learning rate of nothing nothing progresses."""
    options: dict[str, Any] = dict(max_steps=150, log_interval=5, eval_interval=30, snapshot_interval=50, lr=1e-12,
                                   rows=8)
    whole, run = new_run(tmp_path, Regression), new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(-1)), whole, **options)
    train(with_callbacks(Regression, StopAt(113)), run, **options)
    train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    kinds = [[(step, kind) for step, kind in reported(each.alerts) if kind not in OF_THE_MACHINE]
             for each in (whole, run)]
    assert kinds[0] == kinds[1] and "no progress" in {kind for _, kind in kinds[0]}


# -- pace ---------------------------------------------------------------------------------------------------------


def paced(path: Path, rows: list[dict[str, float]]) -> list[tuple[int, str]]:
    monitor = Pace(path)
    for step, row in enumerate(rows, start=1):
        trainer: Any = SimpleNamespace(step=step, timings=row)
        monitor.on_log(trainer, {})
    return reported(path)


def seconds(values: list[float], waiting: float = 0.0) -> list[dict[str, float]]:
    return [{"speed/step_seconds": value, "speed/data_share": waiting} for value in values]


@pytest.mark.parametrize("values, expected", [
    ([9.0] + [1.0] * 10 + [2.5, 2.5] + [1.0] * 5, []),  # two lines, an evaluation's aftermath, are no drop
    ([9.0] + [1.0] * 10 + [2.5] * 5 + [1.0] * 20 + [3.0] * 3, [(14, "slow"), (39, "slow")]),
    ([1.0, 3.0, 3.0, 3.0], []), ([1.0 + 0.09 * i for i in range(40)], []),
])
def test_slow(tmp_path: Path, values: list[float], expected: list[tuple[int, str]]) -> None:
    assert paced(tmp_path / "alerts.jsonl", seconds(values)) == expected


@pytest.mark.parametrize("waiting, advice", [
    (0.7, "70% of the time is spent waiting for data: the data come too slowly: raise --num_workers"),
    (0.01, "look for other programs"),
])
def test_slow_says_what_to_do(tmp_path: Path, waiting: float, advice: str) -> None:
    paced(tmp_path / "alerts.jsonl", seconds([1.0] * 10 + [5.0] * 3, waiting))
    row = list(Journal(tmp_path / "alerts.jsonl").rows())[-1]
    assert advice in row["message"] and "a step takes 5 s, usual are 1 s" in row["message"]


def test_waiting_for_data(tmp_path: Path) -> None:
    rows = [row for share in (0.5, 0.0, 0.3, 0.1) for row in seconds([1.0] * 5, share)]
    assert paced(tmp_path / "alerts.jsonl", rows) == [(5, "waiting"), (15, "waiting")]


def gpu(percent: float, celsius: float, waiting: float = 0.0) -> dict[str, float]:
    return {"system/gpu_percent": percent, "system/gpu_celsius": celsius, "speed/data_share": waiting}


def test_an_idle_gpu_and_a_hot_one(tmp_path: Path) -> None:
    rows = [gpu(95, 60), *[gpu(70, 60)] * 4, gpu(81, 85), *[gpu(79, 86)] * 6, gpu(99, 70), gpu(99, 90)]
    assert paced(tmp_path / "alerts.jsonl", rows) == [(7, "gpu hot"), (11, "gpu idle"), (14, "gpu hot")]


@pytest.mark.parametrize("waiting, advice", [(0.5, "raise --num_workers"), (0.0, "raise --batch_size")])
def test_an_idle_gpu_says_what_to_do(tmp_path: Path, waiting: float, advice: str) -> None:
    paced(tmp_path / "alerts.jsonl", [gpu(30, 50, waiting)] * 5)
    (row,) = Journal(tmp_path / "alerts.jsonl").rows()
    assert advice in row["message"] and "used 30 %" in row["message"]
