"""How long a person waits: --help, ps.sh, a refused typo, and from the wrapper to the first step.

    python benchmarks/latency.py

Prints the median of five (of three for the start) and the limit that is promised. Uses a folder of its own.
"""

import os
import random
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRAPPER = str(ROOT / "run" / "run_train_lm.sh")


def seconds(command: list[str], times: int, environment: dict[str, str], code: int = 0) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        taken.append(time.perf_counter() - start)
        if result.returncode != code:
            raise SystemExit(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr}")
        if pid := re.search(r"^PID +(\d+)", result.stdout, re.MULTILINE):
            subprocess.run([str(ROOT / "run" / "stop.sh"), pid.group(1)], env=environment, capture_output=True)
    return statistics.median(taken)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"STOKER_HOME": folder}
        text, chosen = Path(folder) / "text.txt", random.Random(0)
        words = [f"word{i}" for i in range(500)]
        text.write_text("\n".join(" ".join(chosen.choices(words, k=12)) for _ in range(20_000)))
        train = [WRAPPER, "--preset", "tiny", "--tokenizer", "bpe", "--vocab_size", "1000", "--dataset", str(text),
                 "--result_dir", folder, "--max_steps", "1000"]
        seconds(train, 1, environment)  # fills the caches
        script = [str(ROOT / ".venv/bin/python"), str(ROOT / "src/training/train_lm.py")]
        rows = [
            ("--help", seconds([*script, "--help"], 5, environment), 0.5),
            ("ps.sh", seconds([str(ROOT / "run" / "ps.sh")], 5, environment), 0.3),
            ("a typo refused", seconds([WRAPPER, "--prest", "nano"], 5, environment, code=2), 0.5),
            ("wrapper to first step (tiny, cached)", seconds(train, 3, environment), 10.0),
        ]
    for name, taken, limit in rows:
        print(f"{name:40s} {taken:6.2f} s   promised {limit:4.1f} s   {taken / limit:4.0%}")


if __name__ == "__main__":
    main()
