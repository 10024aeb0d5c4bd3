"""Phases one after the other, each with rows, collate, batch size and a schedule of its own: a codec, then a talker."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.data.joined import Joined
from stoker.data.loader import Order
from stoker.data.mixture import InTurn, Turn
from stoker.training.core import incident
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Loss, Moment
from stoker.training.core.phases import Group, Phase
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer
from toys import Points, StopAt, Toy, assert_same, new_run, session, train, with_callbacks

BORDER, STEPS = 5, 12
SOUNDS, TEXTS = 22, 9


class Speaker(Toy):
    """The codec reads sounds up to the border, the talker texts from there on. Neither's batches are of use to the
    other. `bad`: a text that is NaN."""

    name = "speaker"
    best = ("talk/loss", "min")
    bad = -1

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("codec", (Group("codec.*", lr_factor=0.5),), last=BORDER),
                Phase("talker", (Group("talker.*"),), first=BORDER, lr_schedule="linear", warmup_steps=3,
                      min_lr_ratio=0.0))

    def dataset(self, split: str) -> Any:
        sizes = (SOUNDS, TEXTS) if split == "train" else (4, 3)
        texts = Points(sizes[1], 8, 500 if split == "train" else 2000)
        return Joined({"sounds": Points(sizes[0], 8, 0 if split == "train" else 1000),
                       "texts": [texts[i] * (math.nan if i == self.bad else 1) for i in range(len(texts))]})

    def order(self) -> Order:
        data, seed = self.dataset("train"), self.cfg.seed
        return InTurn(len(data), turns=(Turn(0, Order(SOUNDS, 4, 2, seed)),
                                        Turn(BORDER, Order(TEXTS, 2, 3, seed), data.starts["texts"])))

    def collate(self, samples: list[Any]) -> Batch:
        (name,) = {sample.source for sample in samples}
        return {name: torch.stack([sample.sample for sample in samples])}

    def model(self) -> nn.Module:
        def net() -> nn.Module:
            return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8))

        return nn.ModuleDict({"codec": net(), "talker": net()})

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        x = batch["sounds" if moment.phase == "codec" else "texts"]
        return Loss({"loss": (model[moment.phase](x) - x.flip(1)).square().mean(1).sum()})

    def evaluations(self) -> list[Evaluation]:
        usual = super().evaluations()[0]
        return [replace(usual, name="talk", rows=lambda split: Joined({"texts": self.dataset(split).parts["texts"]}))]


@dataclass
class Rates(Callback):
    order = ACT
    seen: list[tuple[str, float, float]] = field(default_factory=list)

    def on_grad(self, trainer: Trainer, phase: str) -> None:
        self.seen.append((phase, trainer.optimizers[phase].param_groups[0]["lr"], trainer.lr))
        sizes = [len(next(iter(batch.values()))) for batch in trainer.micro_batches]
        names = {name for batch in trainer.micro_batches for name in batch}
        assert names == {"sounds" if phase == "codec" else "texts"}
        assert max(sizes) == (4 if phase == "codec" else 2) and len(sizes) <= (2 if phase == "codec" else 3)


def outcome(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": load_file(last / "model.safetensors"), "state": torch.load(last / "state.pt", weights_only=True),
            "metrics": list(Journal(run.metrics).rows())}


OPTIONS = dict(max_steps=STEPS, lr=1e-2, warmup_steps=5, min_lr_ratio=0.2)


def test_each_phase_has_its_own_schedule_over_its_own_span(tmp_path: Path) -> None:
    """By hand: the codec's cosine over 5 steps after 5 * 5 // 12 = 2 of warm-up, the talker's line over 7."""
    rates, run = Rates(), new_run(tmp_path, Speaker)
    trainer, ending = train(with_callbacks(Speaker, rates), run, **OPTIONS, log_interval=1)
    assert ending.state == "finished"
    codec = [0.5, 1.0, *(0.2 + 0.8 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3))]
    talker = [1 / 3, 2 / 3, 1.0, *(1 - i / 4 for i in range(4))]
    assert [phase for phase, *_ in rates.seen] == ["codec"] * 5 + ["talker"] * 7
    halved = [0.5 * r for r in codec]
    assert [lr for _, lr, _ in rates.seen] == pytest.approx([1e-2 * r for r in halved + talker])
    assert [lr for *_, lr in rates.seen] == pytest.approx([1e-2 * r for r in codec + talker]), "before its factors"
    logged = list(Journal(run.metrics).rows())
    assert [row["lr"] for row in logged] == pytest.approx([1e-2 * r for r in codec + talker])
    assert ["train/codec/loss" in row for row in logged] == [True] * 5 + [False] * 7
    assert run.status().loss == pytest.approx(logged[-1]["train/talker/loss"])


def test_the_codec_stays_as_it_is_after_its_last_step(tmp_path: Path) -> None:
    run = new_run(tmp_path, Speaker)
    train(Speaker, run, **OPTIONS, snapshot_interval=1)
    weights = {step: load_file(run.snapshots / f"snapshot_step_{step:08d}" / "model.safetensors") for step in (0, 5, 7)}
    for name, before in weights[5].items():
        assert torch.equal(before, weights[7][name]) == name.startswith("codec.")
        assert torch.equal(before, weights[0][name]) == name.startswith("talker.")


@pytest.mark.parametrize("at", [2, BORDER, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_uninterrupted(tmp_path: Path, at: int, workers: int) -> None:
    """Within each phase and where one ends and the other begins."""
    whole, run = new_run(tmp_path, Speaker), new_run(tmp_path, Speaker)
    train(with_callbacks(Speaker, StopAt(-1)), whole, **OPTIONS)
    trainer, _ = train(with_callbacks(Speaker, StopAt(at)), run, **OPTIONS, num_workers=workers)
    assert trainer.step == at
    train(with_callbacks(Speaker, StopAt(-1)), run, resume=True)
    assert_same(outcome(run), outcome(whole))


def test_a_failed_step_is_examined_by_the_phases_that_it_has(tmp_path: Path) -> None:
    """Only the talker can compute a loss of a text; the bad one is left out, as in a run that knew of it."""
    stage = type("Speaker", (Speaker,), {"bad": 3})
    back, told = new_run(tmp_path, stage), new_run(tmp_path, stage)
    with back.lock():
        assert session(stage, back, **OPTIONS, nan_recoveries=3).train().state == "finished"
    (path,) = (each for each in back.incidents.iterdir() if each.is_dir())
    found = incident.read(path)
    assert (found.left_out, found.where) == ([SOUNDS + 3], "batch texts") and found.step > BORDER
    assert incident.replay(path, stage(stage.Config(), tmp_path), torch.device("cpu"), "fp32").where == found.where
    with told.lock():
        assert session(stage, told, **OPTIONS, nan_recoveries=3, skip_rows=str(path)).train().state == "finished"
    assert_same(outcome(back), outcome(told))


@pytest.mark.parametrize("step, phase", [(BORDER, "codec"), (BORDER + 1, "talker")])
def test_at_the_border_the_examination_has_the_step_s_own_phase(tmp_path: Path, step: int, phase: str) -> None:
    """Steps count from 1 there. In evaluation mode its loss is that of the phase alone."""
    stage = Speaker(Speaker.Config(), tmp_path)
    model, x = stage.model().eval(), torch.randn(4, 8)
    found = incident.examine(stage, model, [{"sounds": x, "texts": x}], step, torch.device("cpu"), "fp32")
    expected = (model[phase](x) - x.flip(1)).square().mean().item()
    assert found.where == "" and float(found.loss) == pytest.approx(expected, rel=1e-5)


def test_rows_know_their_steps() -> None:
    codec, talker = Order(6, 2, 1, 0), Order(4, 2, 1, 0)
    order = InTurn(10, turns=(Turn(0, codec), Turn(4, talker, 6), Turn(9, codec)))
    for row in range(10):
        steps = order.steps_of(row)
        assert all(any(step in some for some in steps) for step in range(30) if row in sum(order.rows(step), []))
        assert not any(step in some for some in steps for step in range(30)
                       if (row < 6) != (max(sum(order.rows(step), [])) < 6))
