"""Stages with several data sets, with steps that grow and with streams: trained in two sittings, examined, refused."""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.data.joined import Joined
from stoker.data.loader import LengthOrder, Order
from stoker.data.mixture import InTurn, Mixture, Source, Turn, ramp
from stoker.data.stream import Shards, StreamOrder
from stoker.training.assembly.estimate import Length
from stoker.training.core import incident
from stoker.training.core.evaluation import Evaluations, merged
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Moment
from stoker.training.core.snapshots import Snapshots
from stoker.training.core.stage import Stage
from toys import (
    Killed,
    Layer,
    Points,
    Regression,
    StopAt,
    assert_same,
    new_run,
    planned,
    session,
    train,
    with_callbacks,
)

SPEECH, TEXT = 22, 9
BAD_ROW, BAD_EPOCH = 7, 1


class Changing(Points):
    """Each row is another in each epoch."""

    holed = False

    def __getitem__(self, item: int) -> Tensor:
        epoch, row = divmod(item, self.rows)
        bad = self.holed and (epoch, row) == (BAD_EPOCH, BAD_ROW)
        return super().__getitem__(row) + epoch + (math.nan if bad else 0)


def outcome(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": load_file(last / "model.safetensors"),
            "state": torch.load(last / "state.pt", weights_only=True)}


class Drawing(Regression):
    """Draws random numbers in its forward pass (dropout), and learns from a single row too."""

    def model(self) -> nn.Module:
        return nn.Sequential(Layer(8, 8), nn.Dropout(0.3), Layer(8, 8))


class Mixed(Drawing):
    """Speech that changes with the epoch, in batches of like length, and a little text."""

    speech: type[Points] = Changing

    def dataset(self, split: str) -> Any:
        if split != "train":
            return Joined({"speech": Points(5, 8, 1000), "text": Points(4, 8, 2000)})
        return Joined({"speech": self.speech(SPEECH, 8, 0), "text": Points(TEXT, 8, 500)})

    def collate(self, samples: list[Any]) -> Batch:
        sources = {sample.source for sample in samples}
        assert len(sources) == 1, "no micro-batch of two sources, in training and evaluation"
        factor = {"speech": 1, "text": -1}[sources.pop()]
        return {"x": factor * torch.stack([sample.sample for sample in samples])}

    def order(self) -> Order:
        cfg, data = self.cfg, self.dataset("train")
        lengths = tuple(1.0 + row % 5 for row in range(SPEECH))
        speech = LengthOrder(SPEECH, cfg.batch_size, 1, cfg.seed, lengths=lengths, batch_length=12)
        sources = Source(speech, 0.6), Source(Order(TEXT, 2, 1, cfg.seed), 0.4, data.starts["text"])
        return Mixture(len(data), cfg.batch_size, cfg.grad_accum_steps, cfg.seed, sources=sources)


class Growing(Mixed):
    """Both in every micro-batch, of more and more rows."""

    def collate(self, samples: list[Any]) -> Batch:
        return {"x": torch.stack([sample.sample for sample in samples])}

    def order(self) -> Order:
        cfg, data = self.cfg, self.dataset("train")
        sources = (Source(Order(SPEECH, 1, 1, cfg.seed, by_epoch=True), 2),
                   Source(Order(TEXT, 1, 1, cfg.seed), 1, data.starts["text"]))
        return Mixture(len(data), cfg.batch_size, 1, cfg.seed, sources=sources, mixed=True, growth=ramp(3, 12, 6))


class Phased(Mixed):
    """First speech, then text, each with batches and epochs of its own."""

    def order(self) -> Order:
        data, seed = self.dataset("train"), self.cfg.seed
        return InTurn(len(data), turns=(Turn(0, Order(SPEECH, 4, 2, seed, by_epoch=True)),
                                        Turn(4, Order(TEXT, 2, 3, seed), data.starts["text"])))


class Streamed(Drawing):
    """Shards of 5, 6 and 7 points; `bad` is the number of one that is NaN."""

    bad = -1

    def dataset(self, split: str) -> Any:
        def read(shard: int, row: int) -> Iterator[Tensor]:
            points = Points(5 + shard, 8, 100 * shard)
            for i in range(row, len(points)):
                yield points[i] * (math.nan if (shard << 32) + i == self.bad else 1)

        return Shards(3, read, self.cfg.seed) if split == "train" else Points(7, 8, 1000)

    def order(self) -> Order:
        cfg = self.cfg
        return StreamOrder(batch=cfg.batch_size, accum=cfg.grad_accum_steps, stream=self.dataset("train"))


@pytest.mark.parametrize("stage, options", [(Mixed, {}), (Mixed, {"num_workers": 2}), (Growing, {}), (Phased, {}),
                                            (Streamed, {}), (Streamed, {"num_workers": 2})])
def test_two_sittings_are_one(tmp_path: Path, stage: type[Drawing], options: dict[str, int]) -> None:
    whole, parts = new_run(tmp_path, stage), new_run(tmp_path, stage)
    train(stage, whole, max_steps=12)
    train(with_callbacks(stage, StopAt(5)), parts, max_steps=12, **options)
    with pytest.raises(KeyboardInterrupt):  # after step 10, which is done again from the snapshot of step 8
        train(with_callbacks(stage, Killed(10)), parts, resume=True)
    trainer, ending = train(stage, parts, resume=True)
    assert ending.state == "finished" and trainer.step == 12
    same, other = outcome(whole), outcome(parts)
    assert_same(same["weights"], other["weights"])
    assert_same(same["state"]["optimizers"], other["state"]["optimizers"])
    assert_same(same["state"]["order"], other["state"]["order"])
    assert bool(same["state"]["order"]) == (stage is Streamed)


class Apart(Mixed):
    """Has an evaluation on rows of its own, of two sources too."""

    def evaluations(self) -> list[Evaluation]:
        usual = super().evaluations()[0]
        return [usual, replace(usual, name="apart", rows=lambda split: Joined({
            "speech": Points(1, 8, 10), "text": Points(6, 8, 20)}))]


def test_evaluations_of_some_rows_and_of_all_splits(tmp_path: Path) -> None:
    """Whose batches have rows of one source too: those of all rows one by one have the same mean."""
    run = new_run(tmp_path, Apart)
    trainer, ending = train(Apart, run, max_steps=4, eval_max_rows=4)
    stage, model = trainer.stage, trainer.model.eval()
    cfg = replace(trainer.cfg, eval_max_rows=0)
    found = merged(Evaluations(stage, cfg).run("all", model, cfg, torch.device("cpu"), lambda: False) or [])
    rows = [data[row] for data in map(stage.dataset, ("train", "validation")) for row in range(len(data))]
    with torch.no_grad():
        losses = [stage.loss(model, stage.collate([row]), Moment("main")).terms["loss"].item() for row in rows]
    assert ending.state == "finished" and len(rows) == 40
    assert found["eval/loss"] == pytest.approx(sum(losses) / 40, rel=1e-5) and found["apart/loss"] > 0


def test_a_stream_is_not_evaluated_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer, _ = train(Streamed, new_run(tmp_path, Streamed), max_steps=3, eval_interval=0, eval_max_rows=5)
    assert "Evaluation eval: after the last step, 5 of 7 rows" in caplog.messages
    with pytest.raises(UserError, match="--split all: the train data are a stream, which has no end"):
        trainer.evaluations.run("all", trainer.model, trainer.cfg, trainer.device, lambda: False)


@pytest.mark.parametrize("stage", [Growing, Streamed])
def test_smaller_micro_batches_after_an_error_of_memory(tmp_path: Path, stage: type[Drawing]) -> None:
    """The rows of all steps stay, and the run that is resumed knows of it."""
    class Full(stage):  # type: ignore[valid-type, misc]
        def loss(self, model: Any, batch: Batch, moment: Any) -> Any:
            if model.training and moment.step == 3 and len(batch["x"]) > 2:
                raise MemoryError("no room")
            return super().loss(model, batch, moment)

    trainer, ending = train(Full, new_run(tmp_path, Full), max_steps=6)
    order = stage(trainer.cfg, tmp_path).order()
    if isinstance(order, StreamOrder):
        list(order.open(order.stream, list, 0, 6, 0, False, lambda: False))
    assert ending.state == "finished" and trainer.order.micro == 2
    assert sum(trainer.order.rows(5), []) == sum(order.rows(5), []) and max(map(len, trainer.order.rows(5))) == 2


class HoledSpeech(Changing):
    holed = True


class HoledMixed(Mixed):
    speech = HoledSpeech


class HoledStream(Streamed):
    bad = (1 << 32) + 3


@pytest.mark.parametrize("stage, row", [(HoledMixed, BAD_ROW), (HoledStream, (1 << 32) + 3)])
def test_a_bad_row_is_found_and_left_out(tmp_path: Path, stage: type[Drawing], row: int) -> None:
    """In a mixture: a row that is bad in its source's second epoch."""
    run: RunDir = new_run(tmp_path, stage)
    with run.lock():
        assert session(stage, run, nan_recoveries=3, max_steps=20).train().state == "finished"
    [path] = (path for path in run.incidents.iterdir() if path.is_dir())
    found = incident.read(path)
    assert (found.left_out, found.where) == ([row], "batch x") and row in sum(found.rows, [])
    assert len(list(Journal(run.metrics).rows())) > 5


def test_a_stream_needs_a_number_of_steps(tmp_path: Path) -> None:
    run = new_run(tmp_path, Streamed)
    with run.lock(), pytest.raises(UserError, match="are a stream, which has no epochs: say with --max_steps"):
        session(Streamed, run, max_steps=None).prepare()


def test_the_length_of_a_run_counts_the_rows_of_its_order(tmp_path: Path) -> None:
    for stage in (Growing, Phased, Streamed):
        made: Stage = stage(stage.Config(max_steps=9, batch_size=4, grad_accum_steps=2, eval_interval=3), tmp_path)
        order = made.order()
        if isinstance(order, StreamOrder):
            list(order.open(order.stream, list, 0, 9, 0, False, lambda: False))
        rows = sum(len(part) for step in range(9) for part in order.rows(step))
        assert Length.of(planned(made)).samples == pytest.approx(rows, rel=0.2 if stage is Phased else 1e-9)
