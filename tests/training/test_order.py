"""A stage that chooses its own order of rows: the trainer, a resume, and who looks into a failed step keep to it."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.data.loader import LengthOrder, Order
from stoker.training.assembly.estimate import Length
from stoker.training.core import incident
from stoker.training.core.figures import Moment
from stoker.training.core.snapshots import Snapshots
from toys import Buffers, Points, StopAt, assert_same, new_run, planned, session, train, with_callbacks

BAD_ROW, BAD_EPOCH = 7, 1


class Changing(Points):
    """Each row is another in each epoch; one of them is NaN in one of them."""

    holed = False

    def __getitem__(self, item: int) -> Tensor:
        epoch, row = divmod(item, self.rows) if self.offset == 0 else (0, item)
        bad = self.holed and self.offset == 0 and (epoch, row) == (BAD_EPOCH, BAD_ROW)
        return super().__getitem__(row) + epoch + (math.nan if bad else 0)


class Batched(Buffers):
    """By lengths of its own."""

    seen: list[list[float]] = []
    data: type[Points] = Changing

    def dataset(self, split: str) -> Points:
        return self.data(self.cfg.rows if split == "train" else 7, self.cfg.width, 0 if split == "train" else 1000)

    def order(self) -> Order:
        lengths = tuple(1.0 + row % 5 for row in range(self.cfg.rows))
        cfg = self.cfg
        return LengthOrder(cfg.rows, cfg.batch_size, cfg.grad_accum_steps, cfg.seed, lengths=lengths, batch_length=12)


def outcome(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    state, metrics = torch.load(last / "state.pt", weights_only=True), list(Journal(run.metrics).rows())
    return {"weights": load_file(last / "model.safetensors"), "state": state, "metrics": metrics}


def test_the_trainer_takes_the_stage_s_order_and_epochs(tmp_path: Path) -> None:
    class Watched(Batched):
        def loss(self, model: Any, batch: dict[str, Tensor], moment: Moment) -> Any:
            if model.training:
                self.seen.append(batch["x"].sum(1).tolist())
            return super().loss(model, batch, moment)

    Watched.seen = []
    trainer, ending = train(Watched, new_run(tmp_path, Watched), epochs=3, max_steps=None)
    order, data = trainer.order, trainer.stage.dataset("train")
    assert isinstance(order, LengthOrder) and trainer.steps == 3 * order.steps_per_epoch and ending.state == "finished"
    assert Length.of(planned(trainer.stage)).samples == 3 * 22
    expected = [[float(data[item].sum()) for item in part] for part in order.micro_batches(0, trainer.steps)]
    assert Watched.seen[-len(expected):] == expected, "what came before is the estimate's trial"
    assert len({item // 22 for part in order.micro_batches(0, trainer.steps) for item in part}) == 3


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = new_run(tmp_path, Batched), new_run(tmp_path, Batched)
    train(with_callbacks(Batched, StopAt(-1)), whole, num_workers=2)
    train(with_callbacks(Batched, StopAt(5)), parts, num_workers=2)
    train(with_callbacks(Batched, StopAt(-1)), parts, resume=True)
    assert_same(outcome(parts), outcome(whole))


def test_a_failed_step_is_looked_into_as_it_was_in_its_epoch(tmp_path: Path) -> None:
    stage = type("Holed", (Batched,), {"data": type("Data", (Changing,), {"holed": True})})
    run = new_run(tmp_path, stage)
    with run.lock():
        assert session(stage, run, nan_recoveries=3, max_steps=20).train().state == "finished"
    [path] = (path for path in run.incidents.iterdir() if path.is_dir())
    found = incident.read(path)
    assert (found.left_out, found.where) == ([BAD_ROW], "batch x")
    state = torch.load(sorted(run.snapshots.glob("snapshot_*/state.pt"))[-1], weights_only=True)
    assert state["ledger"] == [{"step": found.step, "rows": [BAD_ROW], "why": "non-finite"}]
    assert len(list(Journal(run.metrics).rows())) > 5
