"""A toy of two parts, a head on a thinker from elsewhere, and a judge beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toys
from stoker.config import opt
from stoker.daemon.rundir import RunDir
from stoker.training.core import networks, parts, pretrained
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.parts import Lora, Part
from stoker.training.core.snapshots import Snapshots
from stoker.training.core.stage import Stage
from stoker.training.trainer import Trainer
from toys import Layer, StopAt, Toy, assert_same, new_run, train


@dataclass
class Config(toys.Config):
    """Toys with a part"""

    hidden: int = opt(16, "size of the thinker")
    thinker_ckpt: str = opt("", "the thinker's weights", path=())
    judge_ckpt: str = opt("", "the judge's weights", path=())


class Thinker(nn.Module):
    """Two layers with dropout between them and batch norm after them: both differ between training and evaluation."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, hidden), Layer(hidden, hidden)])
        self.norm, self.dropout = nn.BatchNorm1d(hidden), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers[1](self.dropout(self.layers[0](x).tanh())))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.thinker, self.head = Thinker(width, hidden), Layer(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.thinker(x))  # type: ignore[no-any-return]


class Composed(Toy):
    """A head on a thinker."""

    name = "composed"
    Config = Config
    how: dict[str, Any] = {"train": "frozen"}

    def parts(self) -> Sequence[Part]:
        return [Part("thinker", self.cfg.thinker_ckpt, **self.how)]

    def model(self) -> nn.Module:
        return Model(self.cfg.width, self.cfg.hidden)

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        error = (model(batch["x"]) - batch["x"].flip(1)).square().mean(1)
        return Loss({"loss": error.sum()})

    def export(self, model: nn.Module, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in parts.exported(self.parts(), model).items()},
                  folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    def load(self, model: nn.Module, folder: Path) -> None:
        from stoker.model import weights

        weights.load(model, folder, but=parts.referenced(self.parts(), model))

    @classmethod
    def options_from(cls, pretrained: Any) -> dict[str, Any]:
        return {"hidden": pretrained.options["hidden"], "width": pretrained.options["width"]}


def trained(**how: Any) -> type[Composed]:
    return type("Composed", (Composed,), {"how": how})


LORA = trained(train=Lora(rank=2, alpha=6.0))


class Judged(Composed):
    """Scored by a network outside of the model."""

    name = "judged"

    def parts(self) -> Sequence[Part]:
        cfg = self.cfg
        judge = Part("judge", cfg.judge_ckpt, use="evaluation", build=lambda: Layer(cfg.width, 1))
        return [*super().parts(), judge] if cfg.judge_ckpt else super().parts()

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        figures = super().score(model, batch)
        if judge := self.judges.get("judge"):
            figures["opinion"] = Ratio(judge(batch["x"]).sum(), len(batch["x"]))
        return figures


def folder_of(path: Path, weights: dict[str, Tensor]) -> Path:
    """A model folder of another program."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def thinker(hidden: int = 16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    found = Thinker(8, hidden).state_dict()
    return {name: torch.rand(t.shape, generator=draw) if t.is_floating_point() else t + 7 for name, t in found.items()}


def resumed(stage: type[Stage], run: RunDir, **options: Any) -> Trainer:
    return train(stage, run, resume=True, **options)[0]


def resumed_as_uninterrupted(stage: type[Toy], folder: Path, source: Path) -> tuple[Trainer, RunDir, RunDir]:
    """Train in one sitting and in two, whose weights and metrics must be the same bits. The trainer of the one, and the
    run of each."""
    whole, halves = new_run(folder / "1", stage), new_run(folder / "2", stage)
    expected = train(stage, whole, thinker_ckpt=str(source))[0]
    train(toys.with_callbacks(stage, StopAt(5)), halves, thinker_ckpt=str(source))
    found = resumed(stage, halves)
    assert_same(found.model.state_dict(), expected.model.state_dict())
    assert halves.metrics.read_text() == whole.metrics.read_text()
    return expected, whole, halves


def last(run: RunDir) -> Path:
    return Snapshots(run.snapshots, {}).found()[-1]


def saved(run: RunDir) -> dict[str, Tensor]:
    return load_file(last(run) / "model.safetensors")


def built(stage: type[Composed], source: Path | str, **options: Any) -> Any:
    made = stage(Config(**{"thinker_ckpt": str(source), **options}), Path())
    pretrained.resolve_parts(made)
    return networks.build(made, "cpu")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.zeros(2))
