"""How much two programs that compute on one CPU slow each other down, under settings of how OpenMP's threads wait.

    python benchmarks/neighbours.py [--stage lm] [--setting GOMP_SPINCOUNT=3000 ...] [--rounds 5] [--seconds 3]

For each stage two processes train its nano preset, each with all cores: the trainer's own step, on data made here,
without monitors. In each round each setting is measured twice, one after the other: one of the two alone, then both at
once, while all other processes sleep; its first seconds are not counted. Printed are medians of steps a second, and how
many times slower each of the two was than alone: 2 is half the machine for each. `default` is what this project does
(src/sharing.py), `libgomp` is the library left to itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "run/python"))

from stoker import sharing

STAGES = ("lm", "text", "audio_enc", "vision", "ocr")
LIBGOMP = "GOMP_SPINCOUNT=300000"  # what it takes by itself
SETTLE = 5.0  # seconds that are not counted: a program takes a few until it knows whether it is alone
SLOWDOWN, SHARE = 2.2, 0.99  # at most, beside one other program; at least, of libgomp's speed alone
LINES = {"train": 2000, "validation": 200, "test": 50}


def environment(setting: str) -> dict[str, str]:
    """The environment under "default", "libgomp" or settings such as "GOMP_SPINCOUNT=3000"."""
    clean = {name: value for name, value in os.environ.items() if name not in sharing.SETTINGS}
    if setting == "default":
        return clean
    return clean | dict(pair.split("=", 1) for pair in (LIBGOMP if setting == "libgomp" else setting).split(","))


class Neighbour:
    """A process that trains a stage whenever it is asked to; `program` may be this file of another checkout."""

    def __init__(self, stage: str, setting: str, program: str | Path = __file__):
        self.process = subprocess.Popen([sys.executable, program, "--train", stage], env=environment(setting),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def __enter__(self) -> "Neighbour":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()  # it ends, and its folder with it
        self.process.wait()

    def begin(self, seconds: float) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{seconds}\n")

    def answer(self) -> float:
        """Steps a second of what was begun last."""
        assert self.process.stdout
        return float(self.process.stdout.readline())


def together(neighbours: list[Neighbour], seconds: float) -> float:
    """Mean steps a second of programs that train at the same time."""
    for neighbour in neighbours:
        neighbour.begin(seconds)
    return statistics.mean([neighbour.answer() for neighbour in neighbours])


def measure(stage: str, settings: list[str], rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Setting -> steps a second alone, and of each of two."""
    with ExitStack() as stack:
        pairs = {setting: [stack.enter_context(Neighbour(stage, setting)) for _ in range(2)] for setting in settings}
        for pair in pairs.values():
            for neighbour in pair:
                neighbour.answer()  # it is ready
        found: dict[str, list[tuple[float, float]]] = {setting: [] for setting in settings}
        for _ in range(rounds):
            for setting, pair in pairs.items():
                found[setting].append((together(pair[:1], seconds), together(pair, seconds)))
    return {setting: (statistics.median(alone for alone, _ in figures), statistics.median(both for _, both in figures))
            for setting, figures in found.items()}


def report(stage: str, found: dict[str, tuple[float, float]]) -> None:
    usual = found.get("libgomp", (0.0, 0.0))[0]
    for setting, (alone, both) in found.items():
        against = f", {alone / usual:.3f} of libgomp's alone (aim {SHARE})" if usual and setting != "libgomp" else ""
        print(f"{stage:10s} {setting:26s} {alone:6.2f} steps/s alone, {both:6.2f} each of two: {alone / both:5.2f} "
              f"times slower (aim {SLOWDOWN}){against}", flush=True)


def train(stage: str) -> None:
    """Train for as many seconds as each line of standard input says, and print the steps a second."""
    import rig

    kind, options = rig_stage(stage)
    with rig.trainer("nano", kind, device="cpu", precision="fp32", epochs=100_000, **options) as trainer:
        rig.open_up(trainer, monitors=False)
        for _ in range(3):
            trainer._train_step()
        print(0.0, flush=True)
        for line in sys.stdin:
            trainer.step = 0  # the same rows each time: batches of other widths take longer
            trainer._open_data()
            _steps_a_second(trainer, SETTLE)
            print(_steps_a_second(trainer, float(line)), flush=True)


def _steps_a_second(trainer: Any, seconds: float) -> float:
    start, steps = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        trainer._train_step()
        steps += 1
    return steps / (time.perf_counter() - start)


def rig_stage(stage: str, preset: str = "nano") -> tuple[type, dict[str, str]]:
    """A stage, and the options that give it data."""
    import rig

    from stoker.data.pictures import lines, scenes
    from stoker.data.speech import spoken
    from stoker.training.train_audio_enc import AudioEncoder
    from stoker.training.train_ocr import OCR
    from stoker.training.train_vision import Vision

    if stage in ("lm", "text"):
        base: Any = rig.Random if stage == "lm" else rig.RandomThinker
        size = base.presets[preset].get("vocab_size", base.vocabulary)
        return type("Text", (base,), {"vocabulary": size}), {}
    kind: type = {"audio_enc": AudioEncoder, "vision": Vision, "ocr": OCR}[stage]
    build: dict[str, Callable[[], Path]] = {"audio_enc": lambda: spoken.build("spoken-digits"), "vision": scenes.build,
                                            "ocr": lambda: lines.build(sizes=LINES)}
    data = build[stage]()
    return kind, {"dataset": str(data)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--setting", action="append", help="NAME=VALUE[,NAME=VALUE], default or libgomp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--train", choices=STAGES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        return train(asked.train)
    for stage in asked.stage or STAGES:
        report(stage, measure(stage, asked.setting or ["libgomp", "default"], asked.rounds, asked.seconds))


if __name__ == "__main__":
    main()
