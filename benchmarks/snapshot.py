"""How long a snapshot keeps training waiting, as a share of the time between two.

    python benchmarks/snapshot.py

Tiny and small preset; medians of three. It is copied aside while training waits (`stall`), then written, synced, read
back and verified beside it, which takes longer (`whole after`), and steps meanwhile are slower (`steps meanwhile`). By
default a snapshot is taken every ten minutes at the latest, and twenty times in a run.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import rig

from stoker.training.core import device as devices
from stoker.training.core.stage import Stage
from stoker.training.trainer import Trainer

PROMISED, MINUTES = 0.02, 10


def timed(trainer: Trainer, call: Callable[[], object]) -> float:
    """Seconds, until the device has done it."""
    start = time.perf_counter()
    call()
    devices.wait(trainer.device)
    return time.perf_counter() - start


def measure(preset: str, kind: type[Stage], **options: Any) -> str:
    with rig.trainer(preset, kind, keep_last_n_snapshots=1, **options) as trainer:
        rig.open_up(trainer)
        timed(trainer, trainer._train_step)  # the optimizer's state exists from here on
        stalls, whole, alone, beside = [], [], [], []
        for _ in range(3):
            alone += [timed(trainer, trainer._train_step) for _ in range(4)]
            start = time.perf_counter()
            stalls.append(timed(trainer, trainer._save))
            while not (trainer.saver._writing and trainer.saver._writing.done()):
                beside.append(timed(trainer, trainer._train_step))
            whole.append(time.perf_counter() - start)
            trainer.saver.finish(patient=False)
        size = sum(file.stat().st_size for file in trainer.snapshots.folder.rglob("*") if file.is_file())
    stall = statistics.median(stalls)
    meanwhile = (f"{statistics.median(beside) / statistics.median(alone):.2f} times as long" if beside else
                 "none: it was written within a step")
    return (f"{preset:8s} {size / 1e6:5.0f} MB  stall {stall:5.2f} s, {stall / (60 * MINUTES):6.2%} of {MINUTES} "
            f"minutes (promised {PROMISED:.0%});  whole after {statistics.median(whole):5.2f} s, steps meanwhile "
            f"{meanwhile}")


def main() -> None:
    for preset in ("tiny", "small"):
        print(measure(preset, rig.Random, batch_size=1, device="cpu", precision="fp32"))


if __name__ == "__main__":
    main()
