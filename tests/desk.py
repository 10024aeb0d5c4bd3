"""A user's desk for the scripts of run/, with real processes: a text, a result folder, a list of runs of its own."""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from in_process import trained
from stoker.daemon import registry
from stoker.daemon.table import row

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--tokenizer bytes --d_model 16 --num_heads 2 --num_layers 1 --d_ff 32 --max_seq_len 16 --batch_size 4 "
        "--log_interval 5 --eval_interval 1000 --threads 1 --no_compile").split()
SMALL = ["--tokenizer", "bytes", "--max_steps", "9", "--epochs", "20", "--precision", "auto", "--no_compile"]
ENDLESS = ["--max_steps", "1000000", "--snapshot_interval", "1000000"]


def unless_typed(defaults: Sequence[str], argv: Sequence[str]) -> list[str]:
    """The options of `defaults` that `argv` does not give as well: twice with different values is a mistake."""
    def name(word: str) -> str:
        return word.removeprefix("--").removeprefix("no_")

    given, left, kept = {name(word) for word in argv if word.startswith("--")}, list[str](), True
    for word in defaults:
        kept = name(word) not in given if word.startswith("--") else kept
        left += [word] if kept else []
    return left


def until(holds: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


@dataclass
class Desk:
    """`started`: the processes to end when the desk is cleared."""

    folder: Path
    started: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(200)]
        self.corpus.write_text("\n\n".join(" ".join(draw.choices(words, k=30)) for _ in range(170)))

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.txt"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "STOKER_HOME": str(self.folder / "home"), "TMPDIR": str(self.folder)}

    def call(self, script: str, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(ROOT / "run" / script), *argv], cwd=cwd or self.folder, env=self.env, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=120)

    def train(self, *argv: str) -> subprocess.CompletedProcess[str]:
        usual = ["--dataset", str(self.corpus), "--result_dir", str(self.results), *TINY]
        return self.call("run_train_lm.sh", *unless_typed(usual, argv), *argv)

    def train_here(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """What the script calls with --foreground, in this process, which has torch already."""
        usual = ["--dataset", str(self.corpus), "--result_dir", str(self.results), *TINY]
        return self.start_here(*unless_typed(usual, argv), *argv)

    def start_here(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return trained("lm", *argv, "--yes", env={"STOKER_HOME": self.env["STOKER_HOME"]})

    def begun(self, ran: subprocess.CompletedProcess[str]) -> int:
        """The PID that a script printed which has started a run."""
        assert ran.returncode == 0, ran.stdout + ran.stderr
        pid = int(next(line for line in ran.stdout.splitlines() if line.startswith("PID ")).split()[1])
        self.started.append(pid)
        return pid

    def runs(self) -> list[dict[str, Any]]:
        """What ps.sh --json shows of the runs in this desk's folder, read in this process: tests ask over and over."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STOKER_HOME", self.env["STOKER_HOME"])
            return [row(run) for run in registry.runs() if run.path.parent == self.results]

    def run(self, name: str) -> dict[str, Any]:
        return next(row for row in self.runs() if row["run"] == name)

    def steps(self, name: str) -> list[int]:
        lines = (self.results / name / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
