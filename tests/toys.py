"""Small stages that put the trainer's seams to the test: a GAN by phases, a contrastive loss, buffers."""

import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.config import Parsed, opt
from stoker.daemon import rundir
from stoker.daemon.rundir import RunDir, Status
from stoker.training.assembly.job import Job
from stoker.training.assembly.session import Session
from stoker.training.core.callback import EVENTS, Callback
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.media import Media, Picture, Sound, Text
from stoker.training.core.options import Options
from stoker.training.core.phases import Group, Phase
from stoker.training.core.plan import Plan, Setup
from stoker.training.core.signals import Signals
from stoker.training.core.stage import Stage
from stoker.training.core.step import Step
from stoker.training.core.totals import Totals
from stoker.training.trainer import Ending, Trainer

# A file of events is named by second, process and a counter, and read in the order of the names: sittings of the same
# second in one process, as only tests have them, keep their order where the counter keeps its digits.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)


@dataclass
class Config(Options):
    """Toys"""

    dataset: str = opt("toy", "nothing is read")
    rows: int = opt(22, "samples made up")
    width: int = opt(8, "width of everything")


class Points(torch.utils.data.Dataset[Tensor]):
    """Row i is a function of i alone."""

    def __init__(self, rows: int, width: int, offset: int):
        self.rows, self.width, self.offset = rows, width, offset

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(self.offset + index))


class Layer(nn.Linear):
    """A linear layer of our own: torch.compile passes over torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Toy(Stage):
    """What the toys share. `extra` are further callbacks, for tests that look on or interfere."""

    Config = Config
    presets = {"nano": {}}
    extra: list[Callback] = []

    def dataset(self, split: str) -> Points:
        return Points(self.cfg.rows if split == "train" else 7, self.cfg.width, 0 if split == "train" else 1000)

    def collate(self, samples: list[Any]) -> Batch:
        return {"x": torch.stack(samples)}

    def made_from(self) -> dict[str, str]:
        return {"content": f"{self.cfg.rows}x{self.cfg.width}"}

    def callbacks(self) -> list[Callback]:
        return list(self.extra)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, Layer)]

    def export(self, model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "model.pt")


class Buffers(Toy):
    """A forward that updates buffers (batch norm's running statistics) and draws random numbers (dropout)."""

    name = "buffers"

    def model(self) -> nn.Module:
        width = self.cfg.width
        return nn.Sequential(Layer(width, width), nn.BatchNorm1d(width), nn.Dropout(0.3), Layer(width, width))

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        error = (model(batch["x"]) - batch["x"].flip(1)).square().mean(1)
        return Loss({"loss": error.sum()})


class Showing(Buffers):
    """Makes one of each kind of what can be shown, drawing random numbers for it."""

    name = "showing"

    def samples(self, model: nn.Module) -> dict[str, Media]:
        random.random(), np.random.rand(), torch.rand(3)
        pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
        tone = 2 * np.sin(np.arange(800) / 10).astype(np.float32)  # louder than can be
        return {"text/0": Text("# not a heading\n*two* lines <b>"), "picture": Picture(pixels),
                "sound": Sound(tone, 8000)}


class Regression(Toy):
    """A plain sum over samples, so that accumulation must equal a bigger batch."""

    name = "regression"

    def model(self) -> nn.Module:
        return nn.Sequential(Layer(self.cfg.width, 16), nn.Tanh(), Layer(16, self.cfg.width))

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        error = (model(batch["x"]) - batch["x"].cumsum(1)).square().mean(1)
        return Loss({"loss": error.sum()}, {"error": Ratio(error.detach().sum(), len(error))})


class GAN(Toy):
    """Two phases, two optimizers; the generator's phase uses the noise that the discriminator's drew."""

    name = "gan"

    def phases(self) -> tuple[Phase, ...]:
        return tuple(Phase(side, (Group(f"{side}.*"),)) for side in ("discriminator", "generator"))

    def model(self) -> nn.Module:
        def net(outputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(self.cfg.width, 16), nn.ReLU(), nn.Linear(16, outputs))

        return nn.ModuleDict({"generator": net(self.cfg.width), "discriminator": net(1)})

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        if moment.phase == "discriminator":
            noise = torch.randn_like(batch["x"])
            real, made = model["discriminator"](batch["x"]), model["discriminator"](model["generator"](noise))
            return Loss({"loss": F.softplus(-real).sum() + F.softplus(made).sum()}, passed=noise)
        return Loss({"loss": F.softplus(-model["discriminator"](model["generator"](moment.passed))).sum()})

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        made = model["generator"](batch["x"])
        return {"loss": Ratio((made - batch["x"]).abs().sum(), made.numel())}


class Contrastive(Toy):
    """A loss that is no sum over samples: each is told from the others of its batch; the temperature is learned."""

    name = "contrastive"
    divisible = False

    def model(self) -> nn.Module:
        model = nn.ModuleDict({"left": nn.Linear(self.cfg.width, 8), "right": nn.Linear(self.cfg.width, 8)})
        model.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
        return model

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        left, right = (F.normalize(model[side](x), dim=1) for side, x in (("left", batch["x"]), ("right", -batch["x"])))
        logits = left @ right.T * model.temperature.exp()
        labels = torch.arange(len(logits))
        loss = F.cross_entropy(logits, labels, reduction="sum") + F.cross_entropy(logits.T, labels, reduction="sum")
        return Loss({"loss": loss / 2}, {"acc": Ratio((logits.argmax(1) == labels).sum(), len(logits))})


class TwoTerms(Toy):
    """One term counts samples, the other those numbers that are positive."""

    name = "two_terms"

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(8, 8)

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        return {"near": len(batch["x"]), "positive": (batch["x"] > 0).sum()}

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"positive": 0.1 * moment.step}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        made, x = model(batch["x"]), batch["x"]
        return Loss({"near": (made - x).square().mean(1).sum(), "positive": (made * (x > 0)).abs().sum()})


TOYS: list[type[Toy]] = [Buffers, Regression, GAN, Contrastive]

QUICK = dict(max_steps=9, batch_size=4, grad_accum_steps=2, lr=1e-2, warmup_steps=2, log_interval=2, eval_interval=4,
             snapshot_interval=4, keep_last_n_snapshots=0, delete_snapshots_after_training=False,
             gradient_monitor_interval=2, weight_monitor_interval=2, nan_recoveries=0, device="cpu", threads=1)
WITHOUT_MONITORS: dict[str, Any] = dict(gradient_monitor=False, weight_monitor=False, samples=False)


def planned(stage: Stage, **options: Any) -> Plan:
    """The plan of a stage whose data are prepared, on a CPU; all options count as typed."""
    cfg = replace(stage.cfg, **options)
    return Setup(stage, cfg, torch.device("cpu")).plan(vars(cfg).keys() - {"epochs"})


def step_of(stage: Toy, **options: Any) -> Step:
    """Makes steps of a run of ten, without a trainer."""
    found = {"lr": 1e-2, "warmup_steps": 0, "lr_schedule": "constant", "seed": 7, "precision": "fp32"} | options
    return Step(stage, stage.model().train(), Options(**found), 10, torch.device("cpu"), lambda *args: None,
                lambda *args: None)


def recording_in(figures: Totals) -> Callable[..., None]:
    """A `record` for a `Step`, which adds to these figures."""
    def record(name: str, value: Any, part: str = "") -> None:
        figures.add(name, value if isinstance(value, Ratio) else Ratio(value, 1), part)
    return record


def new_run(folder: Path, stage: type[Stage]) -> RunDir:
    return rundir.create(folder, f"run_{stage.name}", Status(stage.name, f"train_{stage.name}.py", "toy", ""))


def session(stage: type[Stage], run: RunDir, *, resume: bool = False, snapshot: Path | None = None,
            **options: Any) -> Session:
    """A sitting as `launch` would open it. `options` differ from the QUICK ones."""
    values: dict[str, Any] = QUICK | options
    if resume:
        values = json.loads(run.config_file.read_text()) | options
    if snapshot and not resume:
        values["init_from"] = str(snapshot)
    job = Job(stage, Parsed(stage.Config(**values), frozenset(values), ""), *((run, snapshot) if resume else ()))
    return Session(job, run, Signals(lambda name: 0), threading.Event())


def train(stage: type[Stage], run: RunDir, **options: Any) -> tuple[Trainer, Ending]:
    """Train in this process, with extra callbacks by `stage.extra`."""
    sitting = session(stage, run, **options)
    with run.lock():
        trainer, snapshot = sitting.prepare()
        return trainer, trainer.fit(snapshot)


def with_callbacks(stage: type[Toy], *callbacks: Callback) -> type[Toy]:
    return type(stage.__name__, (stage,), {"extra": list(callbacks)})


@dataclass
class Killed(Callback):
    """The process vanishes: nothing is saved any more, nobody is told."""

    order = 99
    step: int

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise KeyboardInterrupt


@dataclass
class StopAt(Callback):
    """Asks for a stop at a step, as a signal would."""

    order = 10
    step: int

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.signals.stop = "SIGTERM"


@dataclass
class Recorder(Callback):
    """Writes down every event."""

    order = 10

    def __post_init__(self) -> None:
        self.seen: list[str] = []


def _recording(event: str) -> Any:
    def method(self: Recorder, trainer: Trainer, *given: Any) -> None:
        shown = [str(g) for g in given if isinstance(g, str)]
        self.seen.append(" ".join([event, *shown]))

    return method


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Tensors on the bits, everything else by ==."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a.contiguous().view(torch.uint8) if a.dim() else a.reshape(1).view(torch.uint8),
                           b.contiguous().view(torch.uint8) if b.dim() else b.reshape(1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and a != a:
        assert b != b, where
    else:
        assert a == b, f"{where}: {a!r} != {b!r}"
