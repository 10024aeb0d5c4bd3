"""A stage computes weights from its first batches before step 0, once: a codebook by k-means, the mean of its data."""

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from composed import Composed
from stoker.config import Parsed, UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.data.loader import Order
from stoker.data.stream import Shards, StreamOrder
from stoker.training.assembly import eval_only
from stoker.training.assembly.job import Job
from stoker.training.core import pretrained
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch, Loss, Moment
from stoker.training.core.signals import Interrupted
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer
from toys import Killed, Points, StopAt, Toy, assert_same, new_run, session, train, with_callbacks

READ = 3  # micro-batches of 4
FIRST = np.random.default_rng((42, 0)).permutation(22)[:4 * READ]  # rows of the first epoch, as Order documents it


class Quantizer(nn.Module):
    """The nearest entry of a codebook to what is left when the mean of the data is taken away."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.codebook = nn.Parameter(torch.randn(3, width))
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.3)

    def nearest(self, x: Tensor) -> Tensor:
        return torch.cdist(x - self.mean, self.codebook).argmin(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.codebook[self.nearest(x)]))  # type: ignore[no-any-return]


class Clustered(Toy):
    name = "clustered"
    called: list[bool] = []  # for each call, whether the model was in training mode

    def model(self) -> nn.Module:
        return Quantizer(self.cfg.width)

    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        self.called.append(model.training)
        x = torch.cat([batch["x"] for batch in islice(batches, READ)])
        model.mean.copy_(x.mean(0))
        model.codebook.copy_((x - model.mean)[torch.randperm(len(x))[:3]])
        for _ in range(20):
            near = model.nearest(x)
            for entry in near.unique():
                model.codebook[entry] = (x - model.mean)[near == entry].mean(0)

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": (model(batch["x"]) - batch["x"]).square().mean(1).sum()})


@pytest.fixture(autouse=True)
def nothing_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clustered, "called", [])


def outcome(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": load_file(last / "model.safetensors"), "state": torch.load(last / "state.pt", weights_only=True),
            "metrics": list(Journal(run.metrics).rows())}


@pytest.fixture
def whole(tmp_path: Path) -> RunDir:
    run = new_run(tmp_path, Clustered)
    train(with_callbacks(Clustered, StopAt(-1)), run)
    return run


def test_the_first_snapshot_has_the_clusters_of_the_first_rows(whole: RunDir) -> None:
    """k-means as it is defined: each row is with the nearest centre, each centre the mean of its rows."""
    weights = load_file(whole.snapshots / "snapshot_step_00000000" / "model.safetensors")
    rows = np.stack([Points(22, 8, 0)[int(row)].numpy() for row in FIRST]).astype(np.float64)
    mean, centres = weights["mean"].numpy(), weights["codebook"].numpy()
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-6)
    distances = np.square((rows - rows.mean(0))[:, None] - centres).sum(2)
    for entry in range(3):
        own = (rows - rows.mean(0))[distances.argmin(1) == entry]
        assert len(own)
        np.testing.assert_allclose(centres[entry], own.mean(0), atol=1e-5)
    assert Clustered.called == [False], "in evaluation mode, and not by the estimate before the run"


class Looks(Toy):
    """Reads batches and draws random numbers, but writes nothing."""

    name = "looks"
    reads = 0

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8))

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": (model(batch["x"]) - batch["x"].flip(1)).square().mean(1).sum()})


class Reads(Looks):
    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        assert not torch.is_grad_enabled() and len(list(islice(batches, self.reads))) == self.reads
        torch.rand(5), np.random.rand(5)


class Streamed:
    def dataset(self, split: str) -> Any:
        if split != "train":
            return Points(7, 8, 1000)
        return Shards(3, lambda shard, row: iter([Points(9, 8, 100 * shard)[i] for i in range(row, 9)]), 0)

    def order(self) -> Order:
        cfg = self.cfg  # type: ignore[attr-defined]
        return StreamOrder(batch=cfg.batch_size, accum=cfg.grad_accum_steps, stream=self.dataset("train"))


@pytest.mark.parametrize("reads, mixed_in, workers", [
    (0, (), 0), (1, (), 0), (14, (), 0), (5, (), 2), (1, (Streamed,), 0), (14, (Streamed,), 0), (14, (Streamed,), 1)])
def test_reading_shifts_neither_the_data_nor_random_numbers(tmp_path: Path, reads: int, mixed_in: tuple[type, ...],
                                                            workers: int) -> None:
    """However many batches are read, also more than an epoch: training is as without."""
    plain = type("Looks", (*mixed_in, Looks), {})
    stage = type("Reads", (*mixed_in, Reads), {"reads": reads})
    runs = new_run(tmp_path, plain), new_run(tmp_path, stage)
    for kind, run in zip((plain, stage), runs):
        trainer, ending = train(kind, run, num_workers=workers)
        assert ending.state == "finished"
    assert_same(*map(outcome, runs))


class KilledAtStart(Callback):
    """The process vanishes when all is built, before the first snapshot."""

    order = ACT

    def on_start(self, trainer: Trainer) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("callback, calls", [(KilledAtStart(), 2), (Killed(1), 1), (Killed(6), 1), (StopAt(3), 1)])
def test_resumed_is_uninterrupted(tmp_path: Path, whole: RunDir, callback: Callback, calls: int) -> None:
    """Before the first snapshot it is done once more, and identically; afterwards never."""
    Clustered.called.clear()
    run = new_run(tmp_path, Clustered)
    try:
        train(with_callbacks(Clustered, callback), run)
    except KeyboardInterrupt:
        assert isinstance(callback, Killed | KilledAtStart)
    train(with_callbacks(Clustered, StopAt(-1)), run, resume=True)
    assert_same(outcome(run), outcome(whole))
    assert len(Clustered.called) == calls


def test_another_seed_is_another_codebook(tmp_path: Path, whole: RunDir) -> None:
    run = new_run(tmp_path, Clustered)
    train(with_callbacks(Clustered, StopAt(-1)), run, seed=43)
    first = "snapshot_step_00000000/model.safetensors"
    assert not torch.equal(load_file(run.snapshots / first)["codebook"], load_file(whole.snapshots / first)["codebook"])


class Spoiled(Clustered):
    """The loss of one row is NaN in training: the run goes back to step 0, and leaves it out."""

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss = super().loss(model, batch, moment)
        bad = (batch["x"] == Points(22, 8, 0)[int(FIRST[1])]).all(1).any()
        return Loss({"loss": loss.terms["loss"] * (math.nan if bad else 1)})


def test_a_run_that_goes_back_is_the_one_that_left_the_row_out_from_the_start(tmp_path: Path) -> None:
    back, told = new_run(tmp_path, Spoiled), new_run(tmp_path, Spoiled)
    with back.lock():
        assert session(Spoiled, back, nan_recoveries=3).train().state == "finished"
    assert len(Clustered.called) == 1, "the snapshot of step 0 has what was computed"
    (incident,) = (path for path in back.incidents.iterdir() if path.is_dir())
    with told.lock():
        assert session(Spoiled, told, nan_recoveries=3, skip_rows=str(incident)).train().state == "finished"
    assert_same(outcome(back), outcome(told))


def test_the_average_begins_with_what_was_computed(tmp_path: Path) -> None:
    run = new_run(tmp_path, Clustered)
    train(Clustered, run, ema_decay=0.9)
    first = run.snapshots / "snapshot_step_00000000"
    average = torch.load(first / "state.pt", weights_only=True)["callbacks"]["EMA"]["state"]["average"]
    assert_same(average["codebook"], load_file(first / "model.safetensors")["codebook"])


def test_trained_weights_are_not_initialized_again(tmp_path: Path, whole: RunDir,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    """Neither in a run that begins with them, nor where they are evaluated."""
    Clustered.called.clear()
    source, run = Snapshots(whole.snapshots, {}).found()[-1], new_run(tmp_path, Clustered)
    with caplog.at_level("INFO"):
        trainer, _ = train(Clustered, run, snapshot=source)
    assert_same(load_file(run.snapshots / "snapshot_step_00000000" / "model.safetensors"),
                load_file(source / "model.safetensors"))
    assert "Not initialized from data: the weights are those of --init_from" in caplog.messages
    job = Job(Clustered, Parsed(trainer.cfg, frozenset(), ""), evaluated=pretrained.find(str(source)))
    assert eval_only.evaluated(job)[0].metrics
    assert Clustered.called == []


# -- what may not be written ----------------------------------------------------------------------------------------


class Unsaved(Clustered):
    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        model.calls += 1


class Replaced(Composed):
    how = {"train": "whole"}

    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        model.thinker.norm.weight = nn.Parameter(torch.ones(16))


class Overwritten(Composed):
    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        model.thinker.layers[0].weight.mul_(2)


class New(Overwritten):
    """Its part has no source, so its weights are as new as any; its head is a new tensor."""

    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        super().initialize(model, batches)
        model.head.weight = nn.Parameter(torch.ones(8, 16))


class NotFinite(Clustered):
    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        model.mean.copy_(next(iter(batches))["x"].mean(0) / 0)


@pytest.mark.parametrize("stage, error, message", [
    (Unsaved, ValueError, "stage clustered has changed calls, which has a source or is in no snapshot"),
    (Overwritten, ValueError, "stage composed has changed thinker.layers.0.weight"),
    (Replaced, ValueError, "stage composed has changed thinker.norm.weight"),
    (NotFinite, UserError, "stage clustered left NaN or infinity in mean"),
])
def test_what_it_may_not_write_is_refused(tmp_path: Path, source: Path, stage: type[Toy], error: type[Exception],
                                          message: str) -> None:
    run = new_run(tmp_path, stage)
    sitting = session(stage, run, **({"thinker_ckpt": str(source)} if issubclass(stage, Composed) else {}))
    with run.lock(), pytest.raises(error, match=message):
        sitting.train()
    assert not sitting.begun.is_set() and not Snapshots(run.snapshots, {}).found()


def test_new_weights_may_be_replaced_and_are_trained(tmp_path: Path) -> None:
    run = new_run(tmp_path, New)
    trainer, ending = train(New, run)
    first = load_file(run.snapshots / "snapshot_step_00000000" / "model.safetensors")
    assert torch.equal(first["head.weight"], torch.ones(8, 16)) and ending.state == "finished"
    assert not torch.equal(trainer.model.head.weight, torch.ones(8, 16))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_meanwhile_leaves_nothing_begun(tmp_path: Path, workers: int) -> None:
    class Stopped(Clustered):
        def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
            sitting.signals.stop = "SIGTERM"
            super().initialize(model, batches)

    run = new_run(tmp_path, Stopped)
    sitting = session(Stopped, run, num_workers=workers)
    with run.lock(), pytest.raises(Interrupted, match="SIGTERM"):
        sitting.train()
    assert not sitting.begun.is_set() and not Snapshots(run.snapshots, {}).found()
