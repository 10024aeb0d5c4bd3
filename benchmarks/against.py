"""How much faster or slower a training step is than in another checkout of this project.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before [--stage lm ...] [--rounds 60] [--steps 4]

Each stage's nano preset is trained by two processes, one of each checkout: the trainer's own step, on the same rows,
without monitors. They take turns of a few steps, and which of them is first changes from round to round; while one
computes, the other sleeps. Printed is the median of the rounds' ratios; below 0.98 is slower than a change may make a
step. A machine's speed drifts within seconds, so short turns and many rounds tell more than long turns.
"""

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve()
PROMISED = 0.98
WARMUP = 5.0  # seconds that are not counted: a program takes a few until it knows whether it is alone
STAGES = ("lm", "audio_enc", "vision", "ocr")


class Checkout:
    """A process that trains a stage by the code of a checkout, as many steps as it is asked for."""

    def __init__(self, folder: Path, stage: str):
        self.process = subprocess.Popen([sys.executable, HERE, folder, "--train", stage], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, bufsize=1)

    def __enter__(self) -> "Checkout":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()  # it ends, and its folder with it
        self.process.wait()

    def answer(self) -> float:
        """Seconds of the steps that were asked for last."""
        assert self.process.stdout
        return float(self.process.stdout.readline())

    def seconds(self, steps: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        return self.answer()


def ratios(stage: str, before: Path, rounds: int, steps: int) -> list[float]:
    """Of each round: steps a second of this checkout, by those of the other."""
    with ExitStack() as stack:
        pair = [stack.enter_context(Checkout(folder, stage)) for folder in (HERE.parents[1], before)]
        for checkout in pair:
            checkout.answer()  # it is ready
        found = []
        for number in range(rounds):
            taken = {checkout: checkout.seconds(steps) for checkout in (pair if number % 2 else pair[::-1])}
            found.append(taken[pair[1]] / taken[pair[0]])
    return found


def train(folder: Path, stage: str) -> None:
    """Train as many steps as each line of standard input says, by the checkout in `folder`, and print their seconds."""
    sys.path.insert(0, str(folder / "benchmarks"))
    import neighbours
    import rig

    kind, options = neighbours.rig_stage(stage)
    with rig.trainer("nano", kind, device="cpu", precision="fp32", epochs=100_000, **options) as trainer:
        rig.open_up(trainer, monitors=False)
        start = time.perf_counter()
        while time.perf_counter() < start + WARMUP:
            trainer._train_step()
        trainer.step = 0  # the same rows in both: batches of other widths take longer
        trainer._open_data()
        print(0.0, flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                trainer._train_step()
            print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout's folder")
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--train", choices=STAGES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        return train(asked.before.resolve(), asked.train)
    if not (asked.before / "benchmarks/neighbours.py").is_file():
        parser.error(f"{asked.before} is no checkout of this project: it has no benchmarks/neighbours.py")
    for stage in asked.stage or STAGES:
        found = ratios(stage, asked.before, asked.rounds, asked.steps)
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{stage:10s} {middle:.3f} of the other checkout's steps a second (half of the rounds lie between "
              f"{low:.3f} and {high:.3f}; at least {PROMISED})", flush=True)


if __name__ == "__main__":
    main()
