"""How many lines a second training and reading take in, against bare matrix products.

    python benchmarks/reading.py [--preset nano] [--steps 40]

Lines of the set `lines`, printed here. A step is the trainer's own, its data read, augmented and padded, without
monitors; the products are those of the linear layers, the strided convolutions and the encoder's attention of the very
same batches, forward and backward, into memory that is there already, nothing between them. Step and products in turn.
Reading is that of read.sh, of lines in memory, by a model that has learned nothing and is made to write 32 labels on
each line; against the products of the forward passes.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rig  # noqa: I001  finds the packages of src/
import torch

from stoker.data.pictures import lines
from stoker.inference.read import AT_ONCE, LineReader
from stoker.training.core import pretrained
from stoker.training.train_ocr import OCR

ROUNDS, LENGTH = 5, 32
SIZES = {"train": 2000, "validation": 200, "test": 50}


def training(trainer: Any, steps: int) -> None:
    took = rig.steps(trainer, steps, lambda batch: len(batch["texts"]))
    print(f"training         {took.amount / took.stepping:6.0f} lines a second; "
          f"{took.waiting / took.stepping:.0%} of the time spent waiting for data; "
          f"{took.multiplying / took.stepping:.2f} of the bare products")


def reading(name: str, reader: LineReader, pixels: list[torch.Tensor], beam: int) -> None:
    list(reader.read(pixels, beam))
    with rig.products(reader.model, backward=False) as made:
        start = time.perf_counter()
        for _ in range(ROUNDS):
            list(reader.read(pixels, beam))
        took = time.perf_counter() - start
    print(f"{name:16s} {ROUNDS * len(pixels) / took:6.0f} lines a second; {rig.seconds_of(made) / took:.2f} of the "
          "bare products")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", choices=OCR.presets)
    parser.add_argument("--steps", default=40, type=int)
    asked = parser.parse_args()
    data = str(lines.build(sizes=SIZES))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, {asked.preset}")
    with rig.trainer(asked.preset, OCR, dataset=data, device="cpu", precision="fp32") as trainer:
        rig.open_up(trainer, monitors=False)
        training(trainer, asked.steps)
        stage = trainer.stage
        assert isinstance(stage, OCR)
        with TemporaryDirectory() as folder:
            stage.export(trainer.model, Path(folder))
            pretrained.note(Path(folder), stage.name, 0, vars(trainer.cfg), {})
            reader = LineReader(pretrained.find(folder, stage.name), torch.device("cpu"))
        reader.stage.cfg.max_text_length = LENGTH
        with torch.no_grad():
            end = reader.stage.tokenizer.end_of_text  # never the likeliest
            reader.model.decoder.embedding.weight[end], reader.model.head.bias[end] = 0, -100
        rows = stage.dataset("validation")
        middle = len(rows) // 2  # they stand in the order of their widths
        pixels = [rows[row].pixels for row in range(middle, min(middle + AT_ONCE, len(rows)))]
    reading("reading, greedy", reader, pixels, 1)
    reading("reading, beam 8", reader, pixels, 8)


if __name__ == "__main__":
    main()
