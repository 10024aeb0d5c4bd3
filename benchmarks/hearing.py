"""How much speech an hour of training or of transcribing takes in, against the bare matrix products of the encoder.

    python benchmarks/hearing.py [--preset nano] [--steps 40]

Speech of the set `spoken-digits`, made here. A step is the trainer's own, its data read, augmented and padded, without
monitors; the products are those of the linear layers, the strided convolutions and the attention of the very same
batches, forward and backward, into memory that is there already, nothing between them. Step and products in turn.
Transcribing is that of transcribe.sh, of one recording at a time and of one long recording in windows, against the
products of the forward passes. Resampling is that of recordings at usual rates, and of those that --speed plays faster
or slower, against torchaudio's windowed sinc, by one thread, in turn.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rig  # noqa: I001  finds the packages of src/
import torch

from stoker import wheels
from stoker.data.speech import audio, spoken
from stoker.data.threads import one_thread
from stoker.inference.transcribe import Config as Hearing
from stoker.inference.transcribe import Listener
from stoker.training.core import pretrained
from stoker.training.train_audio_enc import AudioEncoder

LONG, SHORT = 120, 50  # seconds of one recording; recordings
RESAMPLED, TURNS = 5, 51  # seconds; turns


def training(trainer: Any, steps: int) -> None:
    took = rig.steps(trainer, steps, lambda batch: float(batch["samples"].sum()) / 16000)
    print(f"training       {took.amount / took.stepping:6.0f} hours of speech an hour; "
          f"{took.waiting / took.stepping:.0%} of the time spent waiting for data; "
          f"{took.multiplying / took.stepping:.2f} of the bare products")


def transcribing(name: str, listener: Listener, recordings: list[np.ndarray], cfg: Hearing) -> None:
    listener.hear(recordings[0], cfg)
    with rig.products(listener.model, backward=False) as made:
        start = time.perf_counter()
        for samples in recordings:
            listener.hear(samples, cfg)
        hearing = time.perf_counter() - start
    multiplying = rig.seconds_of(made)
    sound = sum(map(len, recordings)) / 16000
    print(f"{name:14s} {sound / hearing:6.0f} hours of speech an hour, a real-time factor of {hearing / sound:.4f}; "
          f"{multiplying / hearing:.2f} of the bare products")


def resampling() -> None:
    for rate, new_rate in ((8000, 16000), (44100, 16000), (48000, 16000), (18, 20), (19, 20), (21, 20), (22, 20)):
        own = rate if rate > 100 else 16000
        samples = np.random.default_rng(0).standard_normal(RESAMPLED * own).astype(np.float32)
        sinc = wheels.torchaudio().transforms.Resample(rate, new_rate)
        ours, theirs = in_turn(lambda: audio.resampled(samples, rate, new_rate),
                               lambda: sinc(torch.from_numpy(samples)).numpy())
        print(f"resampling     {rate} -> {new_rate}: {theirs / ours:.2f} times as fast as a windowed sinc, "
              f"{RESAMPLED / ours:,.0f} seconds of speech a second")


def in_turn(*works: Callable[[], object]) -> list[float]:
    """The median seconds of CPU of each."""
    took: list[list[float]] = [[] for _ in works]
    with one_thread():
        for _ in range(TURNS):
            for work, seconds in zip(works, took):
                start = time.process_time()
                work()
                seconds.append(time.process_time() - start)
    return [sorted(seconds)[TURNS // 2] for seconds in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", choices=AudioEncoder.presets)
    parser.add_argument("--steps", default=40, type=int)
    asked = parser.parse_args()
    resampling()
    speech = spoken.build("spoken-digits")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, {asked.preset}")
    with rig.trainer(asked.preset, AudioEncoder, dataset=str(speech), device="cpu", precision="fp32") as trainer:
        rig.open_up(trainer, monitors=False)
        training(trainer, asked.steps)
        stage: Any = trainer.stage
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
