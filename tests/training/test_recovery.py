"""What becomes of NaN: it goes back, finds the rows, leaves them out, and is then the run that never had them."""

import json
import math
import shutil
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.data.loader import Order
from stoker.training.assembly import launch
from stoker.training.core import incident, saver
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Loss, Moment
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Ending, Trainer
from toys import GAN, Buffers, Points, Regression, StopAt, assert_same, new_run, session, with_callbacks

ROW, CPU = 5, torch.device("cpu")
STEP = next(step for step in range(3) if ROW in sum(Order(24, 4, 2, 42).rows(step), [])) + 1  # of the first epoch


class Holed(Points):
    """Some rows are NaN."""

    holes: tuple[int, ...] = (ROW,)

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) * (math.nan if self.offset == 0 and index in self.holes else 1)


class Poisoned(Buffers):
    """With batch norm and dropout: one bad row spoils its batch, and random numbers must come out the same."""

    data: type[Points] = Holed

    def dataset(self, split: str) -> Points:
        return self.data(self.cfg.rows if split == "train" else 7, self.cfg.width, 0 if split == "train" else 1000)


def trained(stage: type[Any], run: RunDir, **options: Any) -> Ending:
    with run.lock():
        return session(stage, run, **{"nan_recoveries": 3, "rows": 24} | options).train()


def outcome(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    state = torch.load(last / "state.pt", weights_only=True)
    return {"weights": load_file(last / "model.safetensors"), "state": state,
            "metrics": list(Journal(run.metrics).rows())}


@pytest.mark.parametrize("stop", [-1, STEP, 7])
def test_it_ends_as_if_it_had_the_skip_list_from_the_start(tmp_path: Path, stop: int) -> None:
    """Also when it was stopped meanwhile, and with workers that have read ahead."""
    run, told = new_run(tmp_path, Poisoned), new_run(tmp_path, Poisoned)
    stage = with_callbacks(Poisoned, StopAt(stop))
    trained(stage, run, num_workers=2 if stop == STEP else 0)
    if stop > 0:
        trained(with_callbacks(Poisoned, StopAt(-1)), run, resume=True)
    (path,) = (p for p in run.incidents.iterdir() if p.is_dir())
    found = incident.read(path)
    assert (found.step, found.left_out, found.where) == (STEP, [ROW], "batch x")
    trained(with_callbacks(Poisoned, StopAt(-1)), told, skip_rows=str(path / "incident.json"))
    assert_same(outcome(run), outcome(told))
    assert outcome(run)["state"]["ledger"] == [{"step": STEP, "rows": [ROW], "why": "non-finite"}]
    assert [row["step"] for row in Journal(run.metrics).rows()] == [1, 2, 4, 6, 8, 9]
    assert not list(told.incidents.iterdir())


def test_the_rows_left_out_leave_the_others_where_they_were() -> None:
    whole, holed = Order(24, 4, 2, 42), Order(24, 4, 2, 42, {ROW: 0, 7: 4})
    for step in range(9):
        gone = (ROW, 7) if step >= 4 else (ROW,)
        assert sum(holed.rows(step), []) == [row for row in sum(whole.rows(step), []) if row not in gone]
    assert Order(2, 1, 2, 0, {0: 0, 1: 0}).rows(0) == []


def test_what_does_not_come_again_was_not_the_data(tmp_path: Path) -> None:
    @dataclass
    class Once(Callback):
        """A bit that falls over in the machine."""

        order = ACT
        done: bool = False

        def on_grad(self, trainer: Trainer, phase: str) -> None:
            if trainer.step == 4 and not self.done:
                self.done, trainer.model[0].weight.grad[0, 0] = True, math.inf

    run, alone = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    trained(with_callbacks(Buffers, Once()), run)
    trained(with_callbacks(Buffers, Once(done=True)), alone)
    assert_same(outcome(run), outcome(alone))
    (path,) = (p for p in run.incidents.iterdir() if p.is_dir())
    assert (incident.read(path).where, incident.read(path).left_out) == ("", [])


def test_it_does_not_go_back_for_ever(tmp_path: Path) -> None:
    class AllHoles(Holed):
        holes = tuple(range(24))

    run = new_run(tmp_path, Poisoned)
    ending = trained(type("Hopeless", (Poisoned,), {"data": AllHoles}), run, nan_recoveries=2)
    assert ending.state == "halted" and "though the run went back 2 times before" in ending.reason
    state = outcome(run)["state"]
    assert [entry["step"] for entry in state["ledger"]] == [1, 2] and state["step"] == 3
    assert all(tensor.isfinite().all() for tensor in outcome(run)["weights"].values())


def test_rows_that_are_bad_only_together_are_left_out_together(tmp_path: Path) -> None:
    class Together(Regression):
        """Two certain rows in one batch."""

        def collate(self, samples: list[Any]) -> dict[str, Tensor]:
            batch = super().collate(samples)
            if sum(bool((batch["x"] == self.dataset("train")[row]).all(1).any()) for row in self.pair) == 2:
                batch["x"] = batch["x"] * math.inf
            return batch

        pair = Order(24, 4, 2, 42).rows(3)[0][:2]

    run = new_run(tmp_path, Together)
    trained(Together, run, max_steps=4)
    assert outcome(run)["state"]["ledger"][0]["rows"] == sorted(sum(Order(24, 4, 2, 42).rows(3), []))
    assert outcome(run)["state"]["step"] == 4, "a step without rows is a step"


class Net(nn.Module):
    """Bad where it is told to be."""

    def __init__(self, bad: str):
        super().__init__()
        self.bad, self.first, self.second = bad, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x) * (math.inf if self.bad == "forward" else 1))
        return (0 * y).sqrt() if self.bad == "backward" else y  # the root of 0 has an infinite slope


@pytest.mark.parametrize("bad, where", [("none", ""), ("forward", "output of second"),
                                        ("backward", "gradient at the output of second")])
def test_the_first_bad_place_is_named(tmp_path: Path, bad: str, where: str) -> None:
    class Small(Regression):
        def model(self) -> nn.Module:
            return Net(bad)

    torch.manual_seed(0)
    stage = Small(Small.Config(width=3), tmp_path)
    model, batch = stage.model(), {"x": torch.randn(4, 3)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert incident.examine(stage, model, [batch], 1, CPU, "fp32").where == where
    assert_same(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())


def test_an_incident_can_be_done_again(tmp_path: Path) -> None:
    run = new_run(tmp_path, Poisoned)
    trained(Poisoned, run)
    (path,) = (p for p in run.incidents.iterdir() if p.is_dir())
    stage = Poisoned(Poisoned.Config(**json.loads(run.config_file.read_text())), run.path)
    assert incident.replay(path, stage, CPU, "fp32").where == incident.read(path).where == "batch x"
    with pytest.raises(UserError, match=f"{tmp_path}/incident.json is no incident of a run .*: there is no such file$"):
        incident.read(tmp_path)
    (tmp_path / "other.json").write_text('{"skipped": 1}')
    with pytest.raises(UserError, match="other.json is no incident of a run .*: holds something else$"):
        incident.read(tmp_path / "other.json")
    with pytest.raises(UserError, match="^--skip_rows nofile.json: not found; name the incident.json of a run"):
        launch.decide(Poisoned, ["--skip_rows", "nofile.json"])


def test_phases_go_back_together(tmp_path: Path) -> None:
    class HoledGAN(GAN):
        dataset = Poisoned.dataset
        data = Holed

    run, told = new_run(tmp_path, HoledGAN), new_run(tmp_path, HoledGAN)
    trained(HoledGAN, run)
    (path,) = (p for p in run.incidents.iterdir() if p.is_dir())
    trained(HoledGAN, told, skip_rows=str(path))
    assert_same(outcome(run), outcome(told))


def test_a_spike_is_gone_back_for(tmp_path: Path) -> None:
    """In a later epoch: before, the same rows are trained on, also in a run that is given the ledger."""
    class Shouting(Regression):
        def loss(self, model: Any, batch: dict[str, Tensor], moment: Moment) -> Loss:
            loss = super().loss(model, batch, moment)
            odd = sum((batch["x"] == self.dataset("train")[row]).all(1).sum() for row in self.pair)
            return Loss({"loss": loss.terms["loss"] * (1e4 if odd == 2 else 1)}, loss.figures)

        pair = sum(Order(24, 4, 2, 42).rows(43), [])[:2]

    options = dict(spike_recovery=True, max_steps=70, log_interval=3)
    run, told, alone = (new_run(tmp_path, Shouting) for _ in range(3))
    trained(Shouting, run, **options)
    (path,) = (p for p in run.incidents.iterdir() if p.is_dir())
    found = incident.read(path)
    assert (found.step, found.why, found.where, found.left_out) == (44, "spike", "", sum(found.rows, []))
    assert float(found.loss) > 100 and found.rows == Order(24, 4, 2, 42).rows(43)
    trained(Shouting, told, skip_rows=str(path), **options)
    assert_same(outcome(run), outcome(told))
    trained(Shouting, alone, **options | {"spike_recovery": False})
    assert outcome(alone)["state"]["ledger"] == [] and not list(alone.incidents.iterdir())


def spiky(step: int) -> type[Any]:
    """The loss of one step is far too high."""
    class Spiky(Regression):
        def loss(self, model: Any, batch: dict[str, Tensor], moment: Moment) -> Loss:
            loss = super().loss(model, batch, moment)
            bad = any((batch["x"] == self.dataset("train")[self.row]).all(1)) and model.training
            return Loss({"loss": loss.terms["loss"] * (1e4 if bad else 1)}, loss.figures)

        row = sum(Order(200, 4, 2, 42).rows(step - 1), [])[0]

    return Spiky


def test_what_is_needed_to_go_back_is_not_rotated_away(tmp_path: Path) -> None:
    """A spike is found at the log line, when two snapshots of later steps are there already."""
    run, stage = new_run(tmp_path, Regression), spiky(33)
    ending = trained(stage, run, rows=200, max_steps=50, log_interval=16, snapshot_interval=2, eval_interval=99,
                     keep_last_n_snapshots=1, spike_recovery=True)
    assert ending.state == "finished"
    assert [(entry["step"], entry["why"]) for entry in outcome(run)["state"]["ledger"]] == [(33, "spike")]


def test_with_nothing_to_go_back_to_it_halts(tmp_path: Path) -> None:
    @dataclass
    class Careless(Callback):
        """Somebody deletes the snapshots meanwhile."""

        order = ACT

        def on_step_start(self, trainer: Trainer) -> None:
            if trainer.step == STEP - 1:
                for path in trainer.snapshots.found():
                    shutil.rmtree(path)

    ending = trained(with_callbacks(Poisoned, Careless()), new_run(tmp_path, Poisoned), snapshot_interval=0)
    assert ending.state == "halted" and f"no snapshot of a step before {STEP} is left" in ending.reason


def test_going_back_frees_the_model_and_keeps_count_of_time(tmp_path: Path) -> None:
    seen: list[Any] = []

    @dataclass
    class Watch(Callback):
        order = ACT

        def on_build(self, trainer: Trainer) -> None:
            assert all(model() is None for model in seen), "the one before is gone when there is a new one"
            seen.append(weakref.ref(trainer.model))

    run, began = new_run(tmp_path, Poisoned), time.time()
    trained(with_callbacks(Poisoned, Watch()), run)
    assert len(seen) == 2 and run.status().busy_seconds < time.time() - began


def test_a_full_disk_does_not_keep_a_run_from_going_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot of the step before cannot be written, and there is no room for any: it goes back all the same."""
    @dataclass
    class Full(Callback):
        order = ACT

        def on_step_start(self, trainer: Trainer) -> None:
            free = 0 if trainer.step < STEP + 1 else usage.free
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))

    run, told, usage = new_run(tmp_path, Poisoned), new_run(tmp_path, Poisoned), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saver, "FIRST_WAIT", 0.01)
    assert trained(with_callbacks(Poisoned, Full()), run, snapshot_interval=1).state == "finished"
    trained(Poisoned, told, snapshot_interval=1, skip_rows=str(next(run.incidents.glob("step_*/"))))
    assert_same(outcome(run), outcome(told))
