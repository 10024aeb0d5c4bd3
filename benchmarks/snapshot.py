"""How long a snapshot keeps training waiting, as a share of the time between two.

    python benchmarks/snapshot.py

Tiny and small preset, written, synced, read back and verified; the median of three. By default a snapshot is taken
every ten minutes at the latest, and twenty times in a run.
"""

import rig

PROMISED, MINUTES = 0.02, 10


def main() -> None:
    for preset in ("tiny", "small"):
        with rig.trainer(preset, batch_size=1, device="cpu", precision="fp32", keep_last_n_snapshots=1) as trainer:
            rig.open_up(trainer)
            trainer._train_step()  # the optimizer's state exists from here on
            path = trainer.snapshots.folder
            seconds = rig.median_seconds({preset: trainer._save}, rounds=3)[preset]
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        share = seconds / (60 * MINUTES)
        print(f"{preset:8s} {size / 1e6:5.0f} MB  {seconds:6.2f} s   {share:6.2%} of {MINUTES} minutes   "
              f"promised {PROMISED:.0%}")


if __name__ == "__main__":
    main()
