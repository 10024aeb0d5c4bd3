"""A page of figures of one NVIDIA GPU in at most eight minutes: speed, determinism, recovery. gpu.sh starts it.

    python benchmarks/gpu.py [--device auto] [--quick] [--output FILE] [--only WORD ...]

With --device cpu it measures tiny models: that shows only that this script works, and what needs a GPU is named as not
measured. --quick compiles nothing. --only takes the sections whose titles contain a word. Exit code 1 if a section has
failed, 2 if there is no such device.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import gpu_determinism
import gpu_safety
import gpu_speed
import rig
import torch._inductor  # noqa: F401  which deterministic algorithms need: once, not in each section
from gpu_page import Asked, Page, Section

from stoker import files
from stoker.daemon import machine

SECTIONS = [
    Section("The machine", gpu_speed.the_machine, 20),
    Section("A plain loop", gpu_speed.plain, 65),
    Section("Training the language model", partial(gpu_speed.training, rig.Random), 80),
    Section("Training the thinker", partial(gpu_speed.training, rig.RandomThinker), 60),
    Section("Monitors", gpu_speed.monitors, 35),
    Section("Snapshots", gpu_speed.snapshots, 50),
    Section("Killed and resumed", gpu_safety.resuming, 100),
    Section("Determinism", gpu_determinism.operators, 25),
    Section("Out of memory", gpu_safety.memory, 15),
    Section("NaN", gpu_safety.not_a_number, 20),
    Section("Alerts of the GPU", gpu_safety.alerts, 10),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, which is the GPU; cuda:N; or cpu")
    parser.add_argument("--quick", action="store_true", help="compile nothing")
    parser.add_argument("--output", type=Path, help="the page (default: result/gpu_<time>.md)")
    parser.add_argument("--only", action="append", help="sections whose titles contain this word")
    asked = parser.parse_args()
    if asked.device == "auto" and not machine.has_nvidia_gpu():
        parser.error("nvidia-smi lists no GPU here; --device cpu tries this script out on the CPU")
    wanted = [section for section in SECTIONS
              if not asked.only or any(word.lower() in section.title.lower() for word in asked.only)]
    page = Page((asked.output or files.results() / f"gpu_{time.strftime('%Y%m%d-%H%M%S')}.md").resolve())
    with TemporaryDirectory() as folder:
        os.environ |= {"STOKER_HOME": f"{folder}/home", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
        device = "cuda" if asked.device == "auto" else asked.device
        failed = page.write(wanted, Asked(device, asked.quick, Path(folder)),
                            f"Stoker on {device}, {time.strftime('%Y-%m-%d %H:%M')}")
    print(f"{len(failed)} of {len(wanted)} sections failed: {', '.join(failed)}" if failed else
          f"all {len(wanted)} sections done")
    print(page.path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
