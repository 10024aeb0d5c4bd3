"""What a person sees of a run: console lines, TensorBoard, status, speed."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stoker.daemon.journal import Journal
from stoker.monitors import console, speed
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch
from stoker.training.trainer import Trainer
from toys import GAN, Buffers, Regression, StopAt, new_run, train, with_callbacks


def test_console_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Regression)
    train(Regression, run)
    lines = caplog.messages
    assert lines[0] == "Device: cpu" and "Loaded 22 samples" in lines and "Model parameters: 280" in lines
    assert "Trainable parameters: 280" in lines
    assert [line for line in lines if line.startswith("Epoch")] == ["Epoch 1/3:", "Epoch 2/3:", "Epoch 3/3:"]
    step = next(line for line in lines if line.startswith("Step 4/9"))
    assert re.fullmatch(r"Step 4/9: loss=\d\.\d{3} error=\d\.\d{3} lr=0\.\d{6} grad=\d+\.\d\d "
                        r"\[[\d.]+ samples/sec\] ETA \d+s", step)
    assert re.fullmatch(r"  -> Validation: loss=\d\.\d{3} error=\d\.\d{3}", lines[lines.index(step) + 1])
    assert f"  -> Saved snapshot: {run.snapshots / 'snapshot_epoch_0003'}" in lines


def test_the_lines_of_a_resumed_run_are_in_order_and_each_is_there_once(tmp_path: Path,
                                                                        caplog: pytest.LogCaptureFixture) -> None:
    """The stop at step 8, of epoch 3, comes within its evaluation, which is done first afterwards."""
    caplog.set_level("INFO")
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(8)), run)
    caplog.clear()
    train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    found = [line.split(":")[0] + line.partition("/snapshots/")[2] for line in caplog.messages
             if line.startswith(("Epoch", "Step", "  ->"))]
    assert found == ["Epoch 3/3", "Step 8/9", "  -> Validation", "  -> Saved snapshotsnapshot_step_00000008",
                     "Step 9/9", "  -> Validation", "  -> Saved snapshotsnapshot_epoch_0003"]


def test_a_snapshot_before_an_evaluation_that_is_abandoned_has_its_line(tmp_path: Path,
                                                                        caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class StopsTheEvaluation(Callback):
        def on_eval_start(self, trainer: Trainer) -> None:
            trainer.signals.stop = "SIGTERM" if trainer.step == trainer.steps else trainer.signals.stop

    caplog.set_level("INFO")
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopsTheEvaluation()), run)
    saved = [line for line in caplog.messages if "Saved snapshot" in line and "epoch_0003" in line]
    assert len(saved) == 1 and not any(line.startswith("Step 9/9") for line in caplog.messages)


@pytest.mark.parametrize("metrics, words", [
    ({"eval/loss": 4.2e-5, "eval/ppl": 1.00004}, "loss=4.2e-05 ppl=1.0"),
    ({"eval/wer": 0.00042, "eval/loss": 12.0}, "wer=0.042% loss=12.000")])
def test_small_figures_show_two_digits(metrics: dict[str, float], words: str) -> None:
    assert console.words(metrics, "eval/") == words


def test_the_figures_of_a_line_are_those_of_the_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, GAN)
    train(GAN, run)
    for row in Journal(run.metrics).rows():
        line = next(line for line in caplog.messages if line.startswith(f"Step {row['step']}/"))
        for phase in ("discriminator", "generator"):
            assert f"{phase}/loss={row[f'train/{phase}/loss']:.3f}" in line
            assert f"{phase}/grad={row[f'{phase}/grad_norm']:.2f}" in line


def test_tensorboard_is_one_clean_curve_also_after_a_kill(tmp_path: Path) -> None:
    @dataclass
    class Killed(Callback):
        order = 99

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 8:
                raise KeyboardInterrupt

    run = new_run(tmp_path, Buffers)
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Buffers, Killed()), run, log_interval=1)
    time.sleep(1.1)  # event files are named by the second
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    curves = EventAccumulator(str(run.tensorboard)).Reload()
    rows = {row["step"]: row for row in Journal(run.metrics).rows()}
    loss = [(event.step, event.value) for event in curves.Scalars("train/loss")]
    assert loss == [(step, pytest.approx(row["train/loss"], rel=1e-6)) for step, row in rows.items()]
    assert [event.step for event in curves.Scalars("eval/loss")] == [4, 8, 9]
    assert {"train/loss", "eval/loss", "lr", "grad_norm", "system/process_mb", "speed/samples_per_sec"} <= set(
        curves.Tags()["scalars"])


def test_status_is_what_the_trainer_did(tmp_path: Path) -> None:
    run = new_run(tmp_path, Buffers)
    trainer, _ = train(Buffers, run)
    status, last = run.status(), list(Journal(run.metrics).rows())[-1]
    assert (status.step, status.of, status.loss, status.best) == (9, 9, last["train/loss"], trainer.best)
    assert re.fullmatch(r"[\d.]+ samples/sec", status.speed)


@dataclass
class Clock(Callback):
    """Time in which fetching takes 1 s, the rest of a step 4 s, an evaluation 10 s, and all else none."""

    order = ACT
    now: float = 0.0
    first: float = 0.0  # more seconds of the first step

    def perf_counter(self) -> float:
        return self.now

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        self.now += 1 / len(trainer.micro_batches)

    def on_step_end(self, trainer: Trainer) -> None:
        self.now += 4 + self.first
        self.first = 0.0

    def on_eval_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.now += 10


def test_speed_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations do not make the speed look slower, and are part of the time that is left."""
    clock, run = Clock(), new_run(tmp_path, Regression)
    monkeypatch.setattr(speed, "time", clock)
    train(with_callbacks(Regression, clock), run, rows=800, eval_interval=2, log_interval=2, max_steps=8)
    rows = list(Journal(run.timings).rows())
    assert [row["speed/step_seconds"] for row in rows] == [5] * 5
    assert [row["speed/samples_per_sec"] for row in rows] == [8 / 5] * 5
    left = [0, 6 * 5 + 3 * 10, 4 * 5 + 2 * 10, 2 * 5 + 10, 0]  # at first all is as estimated: next to nothing
    assert [row["speed/eta_seconds"] for row in rows] == [pytest.approx(seconds, abs=0.1) for seconds in left]
    assert [row["speed/data_share"] for row in rows] == [pytest.approx(0.1)] * 5  # the first micro-batch's 0.5 s of 5


def test_a_slow_first_step_is_no_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warming up, compiling: 100 s of the first step. The last evaluation counts though no interval ends there."""
    clock, run = Clock(), new_run(tmp_path, Regression)
    clock.first = 100
    monkeypatch.setattr(speed, "time", clock)
    train(with_callbacks(Regression, clock), run, rows=800, eval_interval=3, log_interval=2, max_steps=8)
    found = {row["step"]: row["speed/eta_seconds"] for row in Journal(run.timings).rows()}
    assert found[4] == 4 * 5 + 2 * 10 and found[6] == 2 * 5 + 10


def test_clocks_and_memory_are_not_in_the_metrics(tmp_path: Path) -> None:
    run = new_run(tmp_path, Buffers)
    train(Buffers, run)
    assert not any(name.startswith(("speed", "system", "time")) for row in Journal(run.metrics).rows() for name in row)
    assert [row["step"] for row in Journal(run.timings).rows()] == [row["step"] for row in Journal(run.metrics).rows()]


def test_gradients_are_clipped_and_their_norm_logged_as_it_was(tmp_path: Path) -> None:
    """With plain gradient descent an update would be exactly lr * clip long; AdamW's first moment shows the same."""
    run = new_run(tmp_path, Regression)
    trainer, _ = train(Regression, run, gradient_clip=1e-3, max_steps=1)
    moments = [state["exp_avg"] for state in trainer.optimizers["main"].state.values()]
    assert sum(float((m / 0.1).square().sum()) for m in moments) ** 0.5 == pytest.approx(1e-3, rel=1e-3)
    assert list(Journal(run.metrics).rows())[0]["grad_norm"] > 1e-2
