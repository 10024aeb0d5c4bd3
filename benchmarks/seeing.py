"""How many pictures a second training and seeing take in, against bare matrix products, and torchvision's own loader.

    python benchmarks/seeing.py [--preset nano] [--steps 40]

Pictures of the set `scenes`, drawn here. A step is the trainer's own, its data read, augmented and collated, without
monitors; the products are those of the linear layers, the strided convolutions and the attention of the very same
batches, forward and backward, into memory that is there already, nothing between them. Step and products in turn.
Seeing is that of see.sh, of pictures in memory, against the products of the forward passes.

Loading is of photographs of 320 x 240 pixels, JPEG, made here: cropped, mirrored and coloured at random, in batches,
by one process; those kept on disk, those decoded each time, and torchvision's ImageFolder in torch's DataLoader with
the same changes by its transforms v2, in turn.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rig  # noqa: I001  finds the packages of src/
import torch
from PIL import Image
from torch.utils.data import DataLoader

from stoker import wheels
from stoker.data.loader import Order, training_batches
from stoker.data.pictures import resized, scenes, table
from stoker.data.pictures.resized import Frame
from stoker.data.pictures.views import WIDEST, Augmentation, View, Views
from stoker.inference.see import AT_ONCE, Viewer
from stoker.training.core import pretrained
from stoker.training.train_vision import Vision

PHOTOGRAPHS, HEIGHT, WIDTH, SIDE = 512, 240, 320, 64
CHANGES = Augmentation(crop=0.3, flip=0.5, colour=0.2)


def training(trainer: Any, steps: int) -> None:
    took = rig.steps(trainer, steps, lambda batch: len(batch["pixels"]))
    print(f"training        {took.amount / took.stepping:6.0f} pictures a second; "
          f"{took.waiting / took.stepping:.0%} of the time spent waiting for data; "
          f"{took.multiplying / took.stepping:.2f} of the bare products")


def seeing(viewer: Viewer, rows: Any) -> None:
    pixels = [rows[row].pixels for row in range(AT_ONCE)]
    list(viewer.see(pixels, 1))
    with rig.products(viewer.model, backward=False) as made:
        start = time.perf_counter()
        for _ in range(5):
            list(viewer.see(pixels, 1))
        took = time.perf_counter() - start
    print(f"seeing          {5 * AT_ONCE / took:6.0f} pictures a second; {rig.seconds_of(made) / took:.2f} of the bare "
          "products")


# -- loading --------------------------------------------------------------------------------------------------------


def loading(folder: Path, batch: int) -> None:
    photographs(folder / "photographs")
    rows = [each for _, each in table.listed(str(folder / "photographs"))]
    frame = Frame(SIDE, SIDE)
    kept = resized.resize([each.path for each in rows], CHANGES.stored(frame))
    works: Mapping[str, Callable[[], None]] = {
        "kept on disk": ours(Views(rows, frame, resized=kept, augmentation=CHANGES), batch),
        "decoded": ours(Views(rows, frame, augmentation=CHANGES), batch),
        "torchvision": theirs(folder / "photographs", batch),
    }
    seconds = rig.median_seconds(works, rounds=3)
    for name, took in seconds.items():
        print(f"{name:15s} {PHOTOGRAPHS / took:6.0f} pictures a second, {seconds['torchvision'] / took:.2f} times "
              "torchvision's")


def photographs(folder: Path) -> None:
    """Smooth, with grain: about as large in bytes as photographs are."""
    draw = np.random.default_rng(0)
    for number in range(PHOTOGRAPHS):
        (folder / f"{number % 4}").mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[:HEIGHT, :WIDTH] / HEIGHT
        a, b, c = draw.uniform(1, 9, (3, 3))
        pixels = 127 * (1 + np.sin(a * x[..., None] + b * y[..., None] + c)) + draw.normal(0, 8, (HEIGHT, WIDTH, 3))
        path = folder / f"{number % 4}" / f"{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def ours(views: Views, batch: int) -> Callable[[], None]:
    def collate(samples: list[View]) -> torch.Tensor:
        return torch.stack([view.pixels for view in samples])

    def load() -> None:
        order = Order(len(views), batch, 1, 0, by_epoch=True)
        for _ in training_batches(views, collate, order, 0, order.steps_per_epoch, 0):
            pass

    return load


def theirs(folder: Path, batch: int) -> Callable[[], None]:
    torchvision = wheels.torchvision()
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    transform = v2.Compose([
        v2.PILToTensor(),
        v2.RandomResizedCrop(SIDE, scale=(1 - CHANGES.crop, 1), ratio=(1 / WIDEST, WIDEST), antialias=True),
        v2.RandomHorizontalFlip(CHANGES.flip),
        v2.ColorJitter(CHANGES.colour, CHANGES.colour, CHANGES.colour),
    ])
    loader = DataLoader(torchvision.datasets.ImageFolder(str(folder), transform), batch, shuffle=True)

    def load() -> None:
        for _ in loader:
            pass

    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", choices=Vision.presets)
    parser.add_argument("--steps", default=40, type=int)
    asked = parser.parse_args()
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, {asked.preset}")
    with rig.trainer(asked.preset, Vision, dataset=str(scenes.build()), device="cpu", precision="fp32") as trainer:
        rig.open_up(trainer, monitors=False)
        training(trainer, asked.steps)
        stage = trainer.stage
        with TemporaryDirectory() as folder:
            stage.export(trainer.model, Path(folder))
            pretrained.note(Path(folder), stage.name, 0, vars(trainer.cfg), {})
            viewer = Viewer(pretrained.find(folder, stage.name), torch.device("cpu"), {"a": "a star", "b": "a cross"})
        seeing(viewer, stage.dataset("validation"))
    with TemporaryDirectory() as folder:
        os.environ["STOKER_HOME"] = folder
        loading(Path(folder), trainer.cfg.batch_size)


if __name__ == "__main__":
    main()
