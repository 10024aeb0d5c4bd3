"""What becomes of a run whose memory does not suffice: the same mathematics in smaller parts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon.rundir import PROJECT, RunDir
from data.loader import Order
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
from training.callback import ACT, Callback
from training.snapshots import Snapshots
from training.stage import Batch, Ratio
from training.trainer import Ending, Trainer


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

        def loss(self, model: Any, batch: Batch, now: str) -> tuple[Ratio, dict[str, Ratio]]:
            loss = super().loss(model, batch, now)
            if model.training and self.armed:
                self.seen.append(len(batch["x"]))
            if self.armed and len(batch["x"]) > fits and now in (phase or now):
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


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from toys import Regression, new_run, train, with_callbacks
from training.callback import ACT, Callback

class Limit(Callback):
    order = ACT

    def on_start(self, trainer):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, used + 500 * 2**20))
        Hungry.needs = 64 * 2**20

class Hungry(Regression):
    needs = 0

    def loss(self, model, batch, phase):
        torch.empty(len(batch["x"]) * self.needs, dtype=torch.uint8)
        return super().loss(model, batch, phase)

trainer, ending = train(with_callbacks(Hungry, Limit()), new_run(Path(sys.argv[1]), Hungry), batch_size=16, rows=48)
print(json.dumps([ending.state, trainer.order.micro]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_an_allocation_that_the_system_refuses(tmp_path: Path) -> None:
    """500 MiB are left, and a sample takes 64."""
    path = os.pathsep.join([str(PROJECT / "src"), str(PROJECT / "tests")])
    ran = subprocess.run([sys.executable, "-P", "-c", LIMITED, str(tmp_path)], env=os.environ | {"PYTHONPATH": path},
                         capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == ["finished", 4]
