"""What it costs that the caches are verified: reading a file of tokens with and without the digests of its blocks.

    python benchmarks/verification.py [--megabytes 1000]

Windows of 256 tokens of a file in a folder of its own, which the memory holds. "First batch": 32 windows from all over
the file, as a run reads them that resumes. "Epoch": each window once, shuffled. The median of five, in turn.
"""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import rig

from stoker.data import blocks
from stoker.data.blocks import Numbers
from stoker.data.text.tokens import Windows

LENGTH, BATCH = 256, 32


def reader(path: Path, digests: list[str], rows: list[int], *, verified: bool) -> Callable[[], None]:
    """Reads the rows of a file that was just opened, as if all of it had been verified before or nothing."""

    def read() -> None:
        numbers = Numbers(path, np.uint16, digests)
        if verified:
            numbers._verified[:] = b"\1" * len(digests)
        windows = Windows(numbers, LENGTH)
        for row in rows:
            windows[row]

    return read


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--megabytes", type=int, default=1000, help="size of the file")
    size = asked.parse_args().megabytes
    draw = np.random.default_rng(0)
    block = draw.integers(0, 50_257, 500_000).astype(np.uint16).tobytes()  # a megabyte
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokens.bin")
        digests = blocks.write(path, (block for _ in range(size)))
        rows = draw.permutation((size * 500_000 - 1) // LENGTH).tolist()
        for what, part in (("first batch", rows[:BATCH]), ("epoch", rows)):
            seconds = rig.median_seconds({
                "verified": reader(path, digests, part, verified=False),
                "trusted": reader(path, digests, part, verified=True),
            }, rounds=5)
            print(f"{what}: {seconds['verified']:.3f} s, {seconds['verified'] / seconds['trusted']:.2f} x the "
                  f"{seconds['trusted']:.3f} s without digests", flush=True)
    second = rig.median_seconds({"sha256": lambda: hashlib.sha256(block).digest()}, rounds=5)["sha256"]
    print(f"SHA-256: {len(block) / second / 1e6:,.0f} MB/s")


if __name__ == "__main__":
    main()
