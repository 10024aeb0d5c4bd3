"""How soon a signal is answered and obeyed in each phase of a run, and what outlives the trainer.

    python benchmarks/signals.py [PHASE...]

Real processes. For each phase one run gets SIGHUP, SIGUSR1 and SIGTERM, one SIGINT, one SIGINT twice, one SIGKILL.
Printed: seconds until the answer stands in the log, until the process has ended, its exit code, and how long a
process that it started outlives it. Promised: an answer within a second, nothing left behind.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from stoker.daemon.rundir import PROJECT, RunDir

PROGRAM = """
import sys, time
from stoker.training import train_lm
from stoker.training.train_lm import LanguageModel
{patch}
from stoker.training.assembly.launch import main
main(LanguageModel)
"""
SLOW_ROWS = """
from stoker.data.text.tokens import Windows
row = Windows.__getitem__
Windows.__getitem__ = lambda self, index: time.sleep(0.5) or row(self, index)
"""
SLOW_EXPORT = """
export = LanguageModel.export
LanguageModel.export = lambda self, *given: time.sleep(3) or export(self, *given)
"""
SMALL = ("--tokenizer=bytes --d_model=64 --num_heads=2 --num_layers=2 --d_ff=128 --max_seq_len=64 --batch_size=4 "
         "--log_interval=1 --threads=1 --num_workers=0 --device=cpu").split()
ENDLESS = ["--max_steps", "1000000", "--snapshot_interval", "1000000", "--eval_interval", "1000000"]
BIG = "--d_model 512 --num_heads 8 --num_layers 8 --d_ff 2048".split()
PATIENCE = 300.0  # seconds


@dataclass(frozen=True)
class Phase:
    """`reached` tells from a run whether it is in the phase; the signal follows `later` seconds after that."""

    reached: Callable[[RunDir], object]
    options: list[str] = field(default_factory=lambda: ENDLESS)
    big: bool = False  # a text of 50 MB
    patch: str = ""
    later: float = 0.0


def logged(words: str) -> Callable[[RunDir], bool]:
    return lambda run: words in log_of(run)


def in_state(state: str, step: int = 0) -> Callable[[RunDir], bool]:
    return lambda run: (status := run.status()).state == state and status.step >= step


def writing_tokens(run: RunDir) -> list[Path]:
    return list((run.path.parent / "home" / "tokens").glob(".*.stoker-tmp"))


def compiler_runs(run: RunDir) -> bool:
    trainer = run.status().pid
    return any(pid != trainer and trainer in ancestors(pid) for pid in processes())


COMPILED = ["--compile", *ENDLESS]
EVALUATED = ["--eval_interval", "2", "--max_steps", "1000000"]
PHASES = {
    "importing": Phase(lambda run: run.latest_log.exists()),
    "training a tokenizer": Phase(logged("Training a tokenizer"), ["--tokenizer", "bpe", *ENDLESS], big=True, later=1),
    "tokenizing": Phase(writing_tokens, ["--tokenizer", "bpe", "--vocab_size", "300", *ENDLESS], big=True),
    "estimating": Phase(logged("Loaded "), [*BIG, *ENDLESS], later=0.3),
    "compiling": Phase(compiler_runs, COMPILED),
    "training": Phase(in_state("training", 1)),
    "training, compiled": Phase(in_state("training", 1), COMPILED),
    "steps of seconds": Phase(in_state("training", 1),
                              [*BIG, "--batch_size", "16", *ENDLESS], later=0.5),
    "waiting for rows": Phase(in_state("training", 1), ENDLESS, patch=SLOW_ROWS),
    "waiting for workers": Phase(in_state("training", 1), ["--num_workers", "2", *ENDLESS], patch=SLOW_ROWS),
    "evaluating": Phase(in_state("evaluating"), EVALUATED, big=True, later=0.5),
    "evaluating, workers": Phase(in_state("evaluating"), [*EVALUATED, "--num_workers", "2"], big=True, later=0.5),
    "saving": Phase(lambda run: run.status().step and list(run.snapshots.glob(".snapshot_*")),
                    [*BIG, "--no_compile", "--max_steps", "1000000", "--snapshot_interval", "2"]),
    "handing out": Phase(lambda run: list(run.models.glob(".*")), ["--max_steps", "3"], patch=SLOW_EXPORT),
}


@dataclass
class Trainer:
    """A run in a session of its own, begun and followed up to a phase."""

    phase: Phase
    folder: Path

    def __post_init__(self) -> None:
        self.run = RunDir(self.folder / "run")
        text = self.folder.parent / ("big.txt" if self.phase.big else "small.txt")
        usual = [option for option in SMALL if option.partition("=")[0] not in self.phase.options]
        argv = ["--dataset", str(text), "--result_dir", str(self.folder), "--run_name", "run", *usual,
                *self.phase.options, "--yes"]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM.format(patch=self.phase.patch), *argv], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT / "run/python"), "STOKER_HOME": str(self.folder / "home"),
                              "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled")})
        until(lambda: self.run.status_file.exists() and self.phase.reached(self.run), self.process)
        time.sleep(self.phase.later)
        self.family = {pid: began for pid, (parent, session, began) in processes().items()
                       if pid != self.process.pid and self.process.pid in ancestors(pid)}

    def send(self, number: signal.Signals) -> float:
        """Seconds until the signal is told in the log."""
        before, start = log_of(self.run).count(number.name), time.monotonic()
        self.process.send_signal(number)
        until(lambda: log_of(self.run).count(number.name) > before, self.process, must_live=False)
        return time.monotonic() - start

    def ended(self) -> float:
        start = time.monotonic()
        self.process.wait(PATIENCE)
        return time.monotonic() - start

    def left(self) -> str:
        """For how long anything that it had started, or that lies in its session, outlives it."""
        start = time.monotonic()
        while alive := self._alive():
            if time.monotonic() - start > 20:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                return f"{len(alive)} STAY"
            time.sleep(0.01)
        return f"{len(self.family)} gone {time.monotonic() - start:.1f}"

    def _alive(self) -> list[int]:
        return [pid for pid, (parent, session, began) in processes().items()
                if self.family.get(pid) == began or session == self.process.pid]


def processes() -> dict[int, tuple[int, int, int]]:
    """pid -> (parent, session, when it began), of all that live."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX":
            found[int(path.parent.name)] = int(fields[1]), int(fields[3]), int(fields[19])
    return found


def ancestors(pid: int) -> set[int]:
    known, found = processes(), set[int]()
    while pid in known and pid not in found:
        found.add(pid)
        pid = known[pid][0]
    return found


def log_of(run: RunDir) -> str:
    return run.latest_log.read_text(errors="replace") if run.latest_log.exists() else ""


def until(holds: Callable[[], object], process: "subprocess.Popen[bytes]", *, must_live: bool = True) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if process.poll() is not None and not holds():
            if must_live:
                raise SystemExit(f"ended with {process.returncode} before the phase was reached")
            return
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.003)


def measure(name: str, folder: Path) -> None:
    phase = PHASES[name]
    plans = [[signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT],
             [signal.SIGKILL]]
    for number, plan in enumerate(plans):
        place = folder / f"{name}{number}"
        place.mkdir()
        trainer = Trainer(phase, place)
        answers, start = [], time.monotonic()
        for each in plan:
            if each in (signal.SIGHUP, signal.SIGKILL):
                trainer.process.send_signal(each)
                time.sleep(0.1 if each == signal.SIGHUP else 0)
                answers.append("-")
            else:
                start = time.monotonic()
                answers.append(f"{trainer.send(each):.2f}")
        trainer.ended()
        seconds = time.monotonic() - start
        print(f"{name:22s} {'+'.join(s.name[3:] for s in plan):14s} {'/'.join(answers):>14s} {seconds:7.2f} "
              f"{trainer.process.returncode:5d} {trainer.run.state():9s} {trainer.left()}", flush=True)


def main() -> None:
    print(f"{'phase':22s} {'signals':14s} {'answered, s':>14s} {'ended':>7s} {'code':>5s} {'state':9s} children")
    with TemporaryDirectory() as folder:
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijkl", k=draw.randint(2, 9))) for _ in range(20_000)]
        lines = [" ".join(draw.choices(words, k=12)) for _ in range(8_000)]
        (Path(folder) / "small.txt").write_text("\n".join(lines[:2000]))
        (Path(folder) / "big.txt").write_text("\n".join(f"{i} {line}" for i in range(80) for line in lines))
        for name in sys.argv[1:] or PHASES:
            measure(name, Path(folder))


if __name__ == "__main__":
    main()
