"""How much faster or slower a training step is than in another checkout of this project.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before [--stage lm ...] [--rounds 12] [--seconds 3]

Each stage's nano preset is trained by two processes, one of each checkout: the trainer's own step, on the same data,
without monitors. They take turns, and which of them is first changes from round to round; while one computes, the
other sleeps. Printed is the median of the rounds' ratios; below 0.98 is slower than a change may make a step.
"""

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

from neighbours import STAGES, Neighbour, together

HERE = Path(__file__).with_name("neighbours.py")
PROMISED = 0.98


def ratios(stage: str, before: Path, rounds: int, seconds: float) -> list[float]:
    """Of each round: steps a second of this checkout, by those of the other."""
    with ExitStack() as stack:
        pair = [stack.enter_context(Neighbour(stage, "default", program)) for program in (HERE, before)]
        for neighbour in pair:
            neighbour.answer()  # it is ready
        found = []
        for number in range(rounds):
            taken = {neighbour: together([neighbour], seconds) for neighbour in (pair if number % 2 else pair[::-1])}
            found.append(taken[pair[0]] / taken[pair[1]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout's folder")
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    program = asked.before / "benchmarks/neighbours.py"
    if not program.is_file():
        parser.error(f"{asked.before} is no checkout of this project: it has no benchmarks/neighbours.py")
    for stage in asked.stage or STAGES:
        found = ratios(stage, program, asked.rounds, asked.seconds)
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{stage:10s} {middle:.3f} of the other checkout's steps a second (half of the rounds lie between "
              f"{low:.3f} and {high:.3f}; at least {PROMISED})", flush=True)


if __name__ == "__main__":
    main()
