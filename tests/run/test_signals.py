"""Signals in the phases of a real run: answered while the phase lasts, obeyed, and nothing outlives the trainer."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from desk import TINY, Desk, living, unless_typed, until
from stoker.daemon.rundir import PROJECT, RunDir

PROGRAM = """
import atexit, os, time
from pathlib import Path
from stoker.training import train_lm
from stoker.training.train_lm import LanguageModel

def wait(what):
    if not {begun} or Path("run/metrics.jsonl").exists():
        Path("in the phase").touch()
        time.sleep({seconds})
    return what

def slow(cls, name):
    method = getattr(cls, name)
    setattr(cls, name, lambda *given, **options: wait(method(*given, **options)))

{patch}
from stoker.training.assembly.launch import main
main(LanguageModel)
"""
ROWS = "from stoker.data.text.tokens import Windows; slow(Windows, '__getitem__')"
ENCODING = """
from stoker.data.text import tokenizers
encode = tokenizers.Bytes.encode_batch
tokenizers.Bytes.encode_batch = lambda self, texts: tokenizers._shared_out(
    lambda text: wait(encode(self, [text])[0]), texts)
"""
SCORING = "slow(LanguageModel, 'score')"
EXPORT = "slow(LanguageModel, 'export')"
SAVING = "from stoker.training.core import manifest; slow(manifest, 'verify')"
LEAVING = "atexit.register(wait, None)"


class Process:
    """A trainer with one slow phase; in a session of its own, so that all it starts can be told."""

    def __init__(self, folder: Path, patch: str, *options: str, seconds: float = 0.5):
        Desk(folder)
        self.run, self.phase = RunDir(folder / "run"), folder / "in the phase"
        argv = ["--dataset", "corpus.txt", "--result_dir", str(folder), "--run_name", "run",
                *unless_typed(TINY, options), *options, "--yes"]
        program = PROGRAM.format(patch=patch, seconds=seconds, begun=patch != ENCODING)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, *argv], cwd=folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT / "run/python"),
                              "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")})

    def reach_phase(self) -> None:
        until(lambda: self.phase.exists() or self.process.poll() is not None)
        assert self.process.poll() is None

    def log(self) -> str:
        return self.run.latest_log.read_text()

    def children(self) -> list[int]:
        """What lives in its session, but itself."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(pid := int(path.name)) == self.process.pid != pid and living(pid):
                    found.append(pid)
            except ProcessLookupError:
                continue
        return found


@pytest.fixture
def started() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for each in started:
        for pid in [*each.children(), *([each.process.pid] if each.process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
        each.process.wait()


PHASES = {
    "tokenizing": (ENCODING, []),
    "waiting for rows": (ROWS, ["--max_steps", "1000"]),
    "waiting for workers": (ROWS, ["--max_steps", "1000", "--num_workers", "2"]),
    "evaluating": (SCORING, ["--max_steps", "1000", "--eval_interval", "2"]),
    "evaluating with workers": (SCORING, ["--max_steps", "1000", "--eval_interval", "2", "--num_workers", "2"]),
    "saving": (SAVING, ["--max_steps", "1000", "--snapshot_interval", "2"]),
    "handing out": (EXPORT, ["--max_steps", "3"]),
}
QUICK = ("waiting for workers",)
each_phase = pytest.mark.parametrize("phase", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                               for name in PHASES])


@each_phase
def test_a_stop_is_answered_and_obeyed(tmp_path: Path, started: list[Process], phase: str) -> None:
    """After a hang-up that is ignored; as one request, whatever phase it meets. It can go on, or it is done."""
    patch, options = PHASES[phase]
    started.append(trainer := Process(tmp_path, patch, *options))
    trainer.reach_phase()
    trainer.process.send_signal(signal.SIGHUP)
    trainer.process.send_signal(signal.SIGUSR1)
    until(lambda: "SIGUSR1: a snapshot after this step" in trainer.log())
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(60) == 0 and not trainer.children()
    log = trainer.log()
    assert log.count("SIGTERM: ") == 1 and "Traceback" not in log and "SIGHUP" not in log
    finished = phase == "handing out"
    assert trainer.run.state() == ("finished" if finished else "stopped")
    assert ("evaluation abandoned" in log) == phase.startswith("evaluating")
    assert (trainer.run.models / "final" / "model.safetensors").exists() == finished


def test_a_stop_does_not_wait_for_workers_that_hang(tmp_path: Path, started: list[Process]) -> None:
    patch, options = PHASES["waiting for workers"]
    started.append(trainer := Process(tmp_path, patch, *options, seconds=600))
    trainer.reach_phase()
    time.sleep(1.0)  # for the rows that were read ahead
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(60) == 0 and not trainer.children()
    assert trainer.run.state() == "stopped" and "Traceback" not in trainer.log()


KILLED = [(phase, (signal.SIGKILL,), -9) for phase in PHASES]
STOPPED = [(phase, (signal.SIGINT, signal.SIGTERM), 75) for phase in PHASES if phase != "waiting for workers"]  # above


@pytest.mark.parametrize("phase, numbers, code", [
    case if case in (KILLED[2], STOPPED[1]) else pytest.param(*case, marks=pytest.mark.slow)
    for case in KILLED + STOPPED])
def test_a_second_stop_and_a_kill_leave_nothing_behind(tmp_path: Path, started: list[Process], phase: str,
                                                       numbers: tuple[signal.Signals, ...], code: int) -> None:
    """A phase that would last minutes is not waited for."""
    patch, options = PHASES[phase]
    started.append(trainer := Process(tmp_path, patch, *options, seconds=600))
    trainer.reach_phase()
    if phase.startswith("waiting"):
        time.sleep(1.0)  # for the rows that were read ahead
    assert bool(trainer.children()) == phase.endswith("workers")
    for number in numbers:
        trainer.process.send_signal(number)
        until(lambda: number == signal.SIGKILL or f"{number.name}: " in trainer.log())
    assert trainer.process.wait(60) == code
    until(lambda: not trainer.children())
    assert trainer.run.state() == ("stopped" if code == 75 else "died")


def test_a_stop_while_python_takes_itself_down(tmp_path: Path, started: list[Process]) -> None:
    """The run has ended: the code is that of its end, and the rest is not waited for."""
    started.append(trainer := Process(tmp_path, LEAVING, "--max_steps", "3", seconds=600))
    trainer.reach_phase()
    assert trainer.run.state() == "finished"
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_no_compiler_outlives_a_trainer_for_long(tmp_path: Path, started: list[Process], number: int,
                                                 code: int) -> None:
    """One at work may finish its file; nobody waits for it."""
    started.append(trainer := Process(tmp_path, "", "--compile", "--max_steps", "1000000"))
    until(lambda: trainer.children() or trainer.process.poll() is not None, 120)
    trainer.process.send_signal(number)
    assert trainer.process.wait(60) == code
    until(lambda: not trainer.children(), 60)
