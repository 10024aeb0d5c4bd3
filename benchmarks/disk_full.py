"""A run on a disk of its own, filled while it trains and emptied again: the same bits as left alone.

    python benchmarks/disk_full.py [--seconds 8]

The disk is a small tmpfs, in a mount namespace of this program's (`unshare --map-root-user --mount`), so it needs no
rights and leaves nothing. One run has all the room it needs; another finds the disk full for so many seconds, and not
a byte of it free; a third finds it full to the end of its patience, and is resumed.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kill_matrix import differences, outcome, write_text

HERE = Path(__file__).resolve()
SCRIPT, SOURCE = HERE.parents[1] / "src/training/train_lm.py", HERE.parents[1] / "run/python"
sys.path.insert(0, str(SOURCE))

from stoker.daemon.rundir import RunDir  # noqa: E402

DISK = "48m"
STEPS, FULL_AT = 4000, 200
OPTIONS = (
    "--tokenizer bytes --d_model 64 --num_heads 2 --num_layers 2 --d_ff 128 --max_seq_len 32 --dropout 0.1 "
    f"--batch_size 4 --grad_accum_steps 2 --max_steps {STEPS} --log_interval 20 --eval_interval 500 "
    "--snapshot_interval 100 --threads 1 --no_compile --no_delete_snapshots_after_training --yes"
).split()


def start(disk: Path, name: str, *options: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", str(SCRIPT), "--dataset", str(disk / "text.txt"), "--result_dir", str(disk),
         "--run_name", name, *OPTIONS, *options],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "STOKER_HOME": str(disk.parent / "home")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def full(disk: Path, process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Until the process ends or the time is over, every byte that becomes free is taken at once."""
    end = time.monotonic() + seconds
    with open(disk / "filling", "wb", buffering=0) as file:
        while time.monotonic() < end and process.poll() is None:
            for size in (2**20, 2**12):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    pass
            time.sleep(0.01)
    (disk / "filling").unlink()


def until_step(run: RunDir, step: int) -> None:
    while not (run.status_file.exists() and run.status().step >= step):
        time.sleep(0.05)


def found(run: RunDir) -> dict[str, Any]:
    """What must be equal. What monitors showed while the disk was full is lost, but for the curves."""
    whole = outcome(run.path)
    last = max(whole["snapshots"], key=lambda name: int(whole["snapshots"][name]["state"]["step"]))
    curves = {tag: events for tag, events in whole["tensorboard"].items()
              if tag.startswith(("train/", "eval/", "lr", "grad_norm"))}
    return {"last snapshot": whole["snapshots"][last], "metrics": whole["metrics"], "timings": whole["timings"],
            "models": {name: content for name, content in whole["models"].items() if name.endswith(".safetensors")},
            "curves": curves}


def measure(disk: Path, seconds: float) -> Iterator[tuple[str, str, list[str]]]:
    """For each run: its name, what `ps.sh` said while the disk was full, and what differs from the one left alone."""
    write_text(disk / "text.txt")
    alone = RunDir(disk / "alone")
    assert start(disk, "alone").wait() == 0
    for name, options, expected in (("filled", (), 0), ("given up", ("--disk_full_minutes", "0.1"), 75)):
        run, process = RunDir(disk / name), start(disk, name, *options)
        until_step(run, FULL_AT)
        full(disk, process, seconds if expected == 0 else 1e9)
        said = run.status().reason
        code = process.wait()
        assert code == expected, f"exit code {code}: {run.status().reason}"
        if expected:
            assert start(disk, name).wait() == 0
        yield name, said, list(differences(found(alone), found(run), name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long the disk is full")
    parser.add_argument("--disk", help=argparse.SUPPRESS)  # where the tmpfs is
    given = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells what it forgets
    if given.disk is None:
        with tempfile.TemporaryDirectory() as folder:
            disk = Path(folder) / "disk"
            disk.mkdir()
            inside = f'mount -t tmpfs -o size={DISK} tmpfs "$1" && exec "$2" "$3" --disk "$1" --seconds "$4"'
            return subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh", str(disk),
                                   sys.executable, str(HERE), str(given.seconds)], check=False).returncode
    different = 0
    for name, said, differ in measure(Path(given.disk), given.seconds):
        print(f"{name:10s} {'DIFFERS: ' + '; '.join(differ[:3]) if differ else 'the same bits as left alone'}; "
              f"the status said: {said}", flush=True)
        different += bool(differ)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
