"""How much speech an hour of training or of transcribing takes in, against the bare matrix products of the encoder.

    python benchmarks/hearing.py [--preset nano] [--steps 40]

Speech of the set `spoken-digits`, made here. A step is the trainer's own, its data read, augmented and padded, without
monitors; the products are those of the linear layers, the strided convolutions and the attention of the very same
batches, forward and backward, into memory that is there already, nothing between them. Step and products in turn.
Transcribing is that of transcribe.sh, of one recording at a time and of one long recording in windows, against the
products of the forward passes.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rig  # noqa: I001  finds the packages of src/
import torch
from torch import nn

from data import spoken
from inference.transcribe import Config as Hearing
from inference.transcribe import Listener
from model.transformer import Attention
from training import pretrained
from training.train_audio_enc import AudioEncoder

LONG, SHORT = 120, 50  # seconds of one recording; recordings


@contextmanager
def products(model: nn.Module, *, backward: bool) -> Iterator[list[Callable[[], list[rig.Factors]]]]:
    """Within it, a list that grows by what makes the factors of each layer's products."""
    made: list[Callable[[], list[rig.Factors]]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Linear):
            sizes = output.numel() // module.out_features, module.in_features, module.out_features
        elif isinstance(module, nn.Conv1d):
            sizes = output.shape[0] * output.shape[2], module.in_channels * module.kernel_size[0], module.out_channels
        else:
            assert isinstance(module, Attention)
            B, T, D = inputs[0].shape
            sizes = B * module.num_heads, T, D // module.num_heads
        of, forward = (rig.of_attention, 2) if isinstance(module, Attention) else (rig.of_layer, 1)
        made.append(lambda: of(*sizes)[:None if backward else forward])

    hooks = [module.register_forward_hook(note) for module in model.modules()
             if isinstance(module, (nn.Linear, Attention)) or (isinstance(module, nn.Conv1d) and module.groups == 1)]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def seconds_of(made: Sequence[Callable[[], list[rig.Factors]]]) -> float:
    multiply = rig.bare_products([factors for make in made for factors in make()])
    start = time.perf_counter()
    multiply()
    return time.perf_counter() - start


def training(trainer: Any, steps: int) -> None:
    waited, sound = 0.0, 0.0
    batches = trainer._batches

    def counted() -> Iterator[Any]:
        nonlocal waited, sound
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            sound += float(batch["samples"].sum()) / 16000
            yield batch

    trainer._batches = counted()
    for _ in range(3):
        trainer._train_step()
    waited = sound = stepping = multiplying = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        with products(trainer.model, backward=True) as made:
            trainer._train_step()
        stepping += time.perf_counter() - start
        multiplying += seconds_of(made)
    print(f"training       {sound / stepping:6.0f} hours of speech an hour; {waited / stepping:.0%} of the time spent "
          f"waiting for data; {multiplying / stepping:.2f} of the bare products")


def transcribing(name: str, listener: Listener, recordings: list[np.ndarray], cfg: Hearing) -> None:
    listener.hear(recordings[0], cfg)
    with products(listener.model, backward=False) as made:
        start = time.perf_counter()
        for samples in recordings:
            listener.hear(samples, cfg)
        hearing = time.perf_counter() - start
    multiplying = seconds_of(made)
    sound = sum(map(len, recordings)) / 16000
    print(f"{name:14s} {sound / hearing:6.0f} hours of speech an hour, a real-time factor of {hearing / sound:.4f}; "
          f"{multiplying / hearing:.2f} of the bare products")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", choices=AudioEncoder.presets)
    parser.add_argument("--steps", default=40, type=int)
    asked = parser.parse_args()
    speech = spoken.build("spoken-digits")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, {asked.preset}")
    with rig.trainer(asked.preset, AudioEncoder, dataset=str(speech), device="cpu", precision="fp32") as trainer:
        for listeners in trainer.events.listeners.values():
            listeners.clear()
        rig.open_up(trainer)
        training(trainer, asked.steps)
        stage = trainer.stage
        rows = [stage.dataset("validation").samples(row) for row in range(SHORT)]
        long = np.resize(np.concatenate(rows), LONG * 16000)
        with TemporaryDirectory() as folder:
            stage.export(trainer.model, Path(folder))
            options = {"dataset": str(speech), **vars(trainer.cfg)}
            pretrained.note(Path(folder), stage.name, 0, options, {})
            listener = Listener(pretrained.find(folder, stage.name), torch.device("cpu"))
        transcribing("short, greedy", listener, rows, Hearing())
        transcribing("short, beam 16", listener, rows, Hearing(beam=16))
        transcribing("long, greedy", listener, [long], Hearing())


if __name__ == "__main__":
    main()
