"""How long a snapshot keeps training waiting, as a share of the time between two.

    python benchmarks/snapshot.py

Tiny and small preset; medians of three. It is copied aside while training waits (`stall`), then written, synced, read
back and verified beside it, which takes longer (`whole after`), and steps meanwhile are slower (`steps meanwhile`). By
default a snapshot is taken every ten minutes at the latest, and twenty times in a run.
"""

import statistics
import time

import rig

PROMISED, MINUTES = 0.02, 10


def timed(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    for preset in ("tiny", "small"):
        with rig.trainer(preset, batch_size=1, device="cpu", precision="fp32", keep_last_n_snapshots=1) as trainer:
            rig.open_up(trainer)
            trainer._train_step()  # the optimizer's state exists from here on
            stalls, whole, alone, beside = [], [], [], []
            for _ in range(3):
                alone += [timed(trainer._train_step) for _ in range(4)]
                start = time.perf_counter()
                stalls.append(timed(trainer._save))
                while not (trainer.saver._writing and trainer.saver._writing.done()):
                    beside.append(timed(trainer._train_step))
                whole.append(time.perf_counter() - start)
                trainer.saver.finish(patient=False)
            size = sum(file.stat().st_size for file in trainer.snapshots.folder.rglob("*") if file.is_file())
        stall = statistics.median(stalls)
        print(f"{preset:8s} {size / 1e6:5.0f} MB  stall {stall:5.2f} s, {stall / (60 * MINUTES):6.2%} of {MINUTES} "
              f"minutes (promised {PROMISED:.0%});  whole after {statistics.median(whole):5.2f} s, steps meanwhile "
              f"{statistics.median(beside) / statistics.median(alone):.2f} times as long")


if __name__ == "__main__":
    main()
