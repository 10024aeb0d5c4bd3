"""What becomes of a run whose memory does not suffice: the same mathematics in smaller parts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import PROJECT, RunDir
from stoker.data.loader import Order
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Ending, Trainer
from toys import (
    GAN,
    Buffers,
    Contrastive,
    Regression,
    StopAt,
    Toy,
    assert_same,
    new_run,
    session,
    train,
    with_callbacks,
)


def small(base: type[Toy], fits: int, phase: str = "", error: BaseException | None = None) -> type[Any]:
    """The stage on a device that has room for so many samples, once training has begun."""
    class Arm(Callback):
        order = ACT

        def on_start(self, trainer: Trainer) -> None:
            Small.armed = True

    class Small(base):  # type: ignore[misc, valid-type]
        seen: list[int] = []
        armed = False
        extra = [Arm()]

        def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
            loss = super().loss(model, batch, moment)
            if model.training and self.armed:
                self.seen.append(len(batch["x"]))
            if self.armed and len(batch["x"]) > fits and moment.phase in (phase or moment.phase):
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return loss

    return Small


def state(run: RunDir) -> dict[str, Any]:
    return dict(torch.load(Snapshots(run.snapshots, {}).found()[-1] / "state.pt", weights_only=True))


@pytest.mark.parametrize("error", [None, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_the_gradients_are_those_of_the_whole_batch(tmp_path: Path, error: BaseException | None,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = train(Regression, new_run(tmp_path, Regression), batch_size=8)
    caplog.clear()
    run, stage = new_run(tmp_path, Regression), small(Regression, 2, error=error)
    parts, ending = train(stage, run, batch_size=8)
    assert (ending.state, parts.step, state(run)["micro"]) == ("finished", 9, 2)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len([line for line in caplog.messages if "out of memory" in line]) == 2, "from 8 to 4, from 4 to 2"
    assert stage.seen[:3] == [8, 4, 2] and max(stage.seen[2:]) == 2, "and never again"


def test_it_is_the_run_that_had_small_batches_from_the_start(tmp_path: Path) -> None:
    """To the bit, with dropout, running statistics, monitors and early stopping: nothing of the failed try is left."""
    options: dict[str, Any] = dict(rows=24, batch_size=4, early_stopping=True, early_stop_overfit_patience=50)
    run, told = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    train(small(Buffers, 2), run, **options)
    train(Buffers, told, **options | {"batch_size": 2, "grad_accum_steps": 4})
    a, b = state(run), state(told)
    assert (a.pop("micro"), b.pop("micro")) == (2, 0)
    assert_same(a, b)


def test_the_split_is_kept_when_the_run_goes_on(tmp_path: Path) -> None:
    run, alone = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    once, never = small(Buffers, 2), small(Buffers, 2)
    train(with_callbacks(once, *once.extra, StopAt(5)), run)
    train(with_callbacks(never, *never.extra, StopAt(-1)), alone)
    once.seen.clear()
    train(with_callbacks(once, *once.extra, StopAt(-1)), run, resume=True)
    assert_same(state(run), state(alone))
    assert once.seen[0] == 2


def test_a_later_phase_goes_back(tmp_path: Path) -> None:
    """The first phase of the step is applied already: so it is done again from the snapshot."""
    def trained(run: RunDir, stage: type[Any], **options: Any) -> Ending:
        with run.lock():
            return session(stage, run, **options).train()

    run, told = new_run(tmp_path, GAN), new_run(tmp_path, GAN)
    assert trained(run, small(GAN, 2, "generator")).state == "finished"
    trained(told, GAN, batch_size=2, grad_accum_steps=4)
    a, b = state(run), state(told)
    assert (a.pop("micro"), b.pop("micro")) == (2, 0)
    assert_same(a, b)


@pytest.mark.parametrize("stage, why", [(small(Regression, 0), "micro-batches of 1 samples do not fit"),
                                        (small(Contrastive, 2), "smaller ones are another loss")])
def test_where_it_cannot_be_split_it_says_so(tmp_path: Path, stage: type[Any], why: str) -> None:
    with pytest.raises(MemoryError, match=why):
        train(stage, new_run(tmp_path, stage))


def test_the_rows_of_a_step_are_the_same_however_it_is_split() -> None:
    order = Order(23, 5, 2, 0)
    for parts in (order, order.halved(True), order.halved(True).halved(True)):
        assert [sum(parts.rows(step), []) for step in range(6)] == [sum(order.rows(step), []) for step in range(6)]
    assert [len(part) for part in order.halved(True).rows(0)] == [3, 3, 3, 1]


def never_scored(base: type[Toy], from_step: int = 0, error: type[BaseException] = torch.OutOfMemoryError) -> type[Any]:
    """The stage whose evaluations after a step fail, however small they are."""
    class Step(Callback):
        order = ACT

        def on_step_end(self, trainer: Trainer) -> None:
            Hungry.step = trainer.step

    class Hungry(base):  # type: ignore[misc, valid-type]
        step = 0
        extra = [Step()]

        def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
            if self.step >= from_step > 0:
                raise error("CUDA out of memory")
            return dict(super().score(model, batch))

    return Hungry


@pytest.mark.parametrize("base, batches", [(Regression, 1), (Contrastive, 4)])
def test_an_evaluation_without_enough_memory_costs_nothing_but_itself(tmp_path: Path, base: type[Toy], batches: int,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    """In the midst of the run, and at its end; the best of those before is exported, and so is the last."""
    alone, run, stage = new_run(tmp_path, base), new_run(tmp_path, base), never_scored(base, 5)
    train(base, alone, eval_interval=3)
    with run.lock():
        ending = session(stage, run, eval_interval=3).train()
    assert (ending.state, ending.reason) == (
        "finished", "all steps done, the last evaluation ran out of memory: ./run/evaluate.sh tries again")
    assert sorted(path.name for path in run.models.iterdir()) == ["best", "final"]
    assert_same(torch.load(run.models / "final" / "model.pt", weights_only=True), weights(alone))
    lines = [line for line in caplog.messages if "is not evaluated" in line]
    assert [line.split()[1] for line in lines] == ["6", "9"] and f"in batches of {batches} does not fit" in lines[0]
    assert [row["step"] for row in Journal(run.metrics).rows() if "eval/loss" in row] == [3]
    assert {row["step"] for row in Journal(run.metrics).rows()} == {1, 2, 3, 4, 6, 8, 9}


def test_a_last_evaluation_that_fails_finds_the_model_saved(tmp_path: Path) -> None:
    """As of a mistake in it, or where the system kills for want of memory: it alone is done when the run is resumed."""
    alone, run, stage = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers), never_scored(Buffers, 9, ValueError)
    train(Buffers, alone, snapshot_interval=0)
    with pytest.raises(ValueError):
        train(stage, run, snapshot_interval=0)
    assert_same(weights(run), weights(alone))
    stage = with_callbacks(Buffers, never := Never())
    trainer, ending = train(stage, run, resume=True)
    assert (trainer.step, ending.state, never.steps) == (9, "finished", 0)
    assert list(Journal(run.metrics).rows()) == list(Journal(alone.metrics).rows())


class Never(Callback):
    """Counts the steps that are trained."""

    order = ACT
    steps = 0

    def on_step_start(self, trainer: Trainer) -> None:
        self.steps += 1


def weights(run: RunDir) -> dict[str, Any]:
    return dict(safetensors.torch.load_file(Snapshots(run.snapshots, {}).found()[-1] / "model.safetensors"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_an_export_without_enough_memory_is_done_again(tmp_path: Path, error: BaseException) -> None:
    class Hungry(Regression):
        def export(self, model: Any, folder: Path) -> None:
            raise error

    run = new_run(tmp_path, Regression)
    with run.lock():
        ending = session(Hungry, run).train()
    assert ending.state == "halted" and ending.reason.startswith("all steps done, but the model could not be written (")
    assert ending.reason.endswith("and resume: nothing is trained again")
    assert not list(run.models.glob("[!.]*"))
    with run.lock():
        sitting = session(with_callbacks(Regression, never := Never()), run, resume=True)
        assert sitting.train().state == "finished" and never.steps == 0
    assert_same(torch.load(run.models / "final" / "model.pt", weights_only=True), weights(run))


def test_another_error_of_an_export_is_a_failure(tmp_path: Path) -> None:
    class Mistaken(Regression):
        def export(self, model: Any, folder: Path) -> None:
            raise RuntimeError("shape")

    run = new_run(tmp_path, Regression)
    with run.lock(), pytest.raises(RuntimeError, match="shape"):
        session(Mistaken, run).train()


def test_a_test_set_that_does_not_fit_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Tested(never_scored(Regression, 9)):  # type: ignore[misc]
        def splits(self) -> tuple[str, ...]:
            return "train", "validation", "test"

    run = new_run(tmp_path, Regression)
    with run.lock():
        assert session(Tested, run).train().state == "finished"
    assert any(line.startswith("test set not evaluated: an evaluation in batches of 1") for line in caplog.messages)


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from toys import Regression, new_run, train, with_callbacks
from stoker.training.core.callback import ACT, Callback

class Limit(Callback):
    order = ACT

    def on_start(self, trainer):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, used + 500 * 2**20))
        Hungry.needs = 64 * 2**20

class Hungry(Regression):
    needs = 0

    def loss(self, model, batch, moment):
        torch.empty(len(batch["x"]) * self.needs, dtype=torch.uint8)
        return super().loss(model, batch, moment)

trainer, ending = train(with_callbacks(Hungry, Limit()), new_run(Path(sys.argv[1]), Hungry), batch_size=16, rows=48)
print(json.dumps([ending.state, trainer.order.micro]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_an_allocation_that_the_system_refuses(tmp_path: Path) -> None:
    """500 MiB are left, and a sample takes 64."""
    path = os.pathsep.join([str(PROJECT / "run/python"), str(PROJECT / "tests")])
    ran = subprocess.run([sys.executable, "-P", "-c", LIMITED, str(tmp_path)], env=os.environ | {"PYTHONPATH": path},
                         capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == ["finished", 4]
