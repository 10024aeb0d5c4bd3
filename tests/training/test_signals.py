"""Signals: answered at once, also while the main thread is in C; obeyed when it is convenient."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch._inductor.async_compile import AsyncCompile

from desk import until
from stoker.daemon.rundir import PROJECT
from stoker.training.callbacks.blocks import Blocks
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.signals import Interrupted, Signals
from stoker.training.trainer import Trainer
from toys import Regression, new_run, session, with_callbacks

PROGRAM = """
import hashlib, logging, sys, time
from stoker.training.core.signals import Interrupted, Signals
logging.basicConfig(stream=sys.stdout, level="INFO", format="%(message)s")

def at_second(name):
    print("last words", flush=True)
    return 75

with Signals(at_second) as signals:
    print("ready", flush=True)
    {body}
print("left", signals.stop, flush=True)
"""
IN_C = 'hashlib.pbkdf2_hmac("sha256", b"x", b"y", {rounds})'  # seconds without a bytecode between


class Program:
    """A process that runs `body` under Signals; its lines with the time at which each came."""

    def __init__(self, body: str):
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM.replace("{body}", body)], text=True,
                                        stdout=subprocess.PIPE,
                                        env=os.environ | {"PYTHONPATH": str(PROJECT / "run/python")})
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


def test_a_stop_is_answered_within_a_second_while_the_main_thread_is_in_c() -> None:
    program = Program(IN_C.format(rounds=20_000_000))
    time.sleep(0.3)
    start = time.monotonic()
    program.process.send_signal(signal.SIGTERM)
    assert program.line().startswith("SIGTERM: finishing this step") and time.monotonic() - start < 1
    assert program.process.poll() is None
    start = time.monotonic()
    program.process.send_signal(signal.SIGINT)
    code, out = program.end()
    assert code == 75 and "second SIGINT: ending at once\nlast words" in out and time.monotonic() - start < 1


def test_a_hang_up_is_ignored_and_the_rest_noted() -> None:
    program = Program("[time.sleep(0.05) for _ in range(20)]; print('save', signals.take_save(), signals.take_save())")
    program.process.send_signal(signal.SIGHUP)
    program.process.send_signal(signal.SIGUSR1)
    assert program.line() == "SIGUSR1: a snapshot after this step"
    program.process.send_signal(signal.SIGTERM)
    code, out = program.end()
    assert code == 0 and "save True False" in out and out.endswith("left SIGTERM\n")


def test_while_nothing_is_trained_a_stop_interrupts() -> None:
    with Signals(lambda name: 0) as signals:
        signals.interruptible = True
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert signals.stop == "SIGTERM"


def test_what_was_before_is_there_again() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]
    with Signals(lambda name: 0):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]
    assert signal.set_wakeup_fd(-1) == -1


def blocked(pid: int) -> bool:
    """Whether a process does not receive SIGINT, as the kernel says (proc(5))."""
    text = Path(f"/proc/{pid}/status").read_text()
    return bool(int(next(line for line in text.splitlines() if line.startswith("SigBlk")).split()[1], 16)
                & 1 << signal.SIGINT - 1)


def test_ctrl_c_does_not_reach_what_is_started_meanwhile() -> None:
    with Signals() as signals:
        with signals.children_spared(), subprocess.Popen(["sleep", "600"]) as child:
            os.kill(child.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: signals.stop == "SIGINT")
            assert blocked(child.pid) and child.poll() is None
            child.kill()
        assert not blocked(os.getpid())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_training_spares_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch.compile too, of which a trial has started some before."""
    def in_compiler() -> bool:
        mask = AsyncCompile.pool().submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        return signal.SIGINT in mask.result()

    class Look(Callback):
        order = ACT

        def on_step_end(self, trainer: Trainer) -> None:
            found.extend([blocked(os.getpid()), in_compiler()])

    class Compiled(Blocks):
        def on_build(self, trainer: Trainer) -> None:
            trainer.cfg.compile = True
            super().on_build(trainer)

    monkeypatch.setattr("torch._inductor.config.compile_threads", 2)  # where there is one core, it starts no others
    found = [in_compiler()]
    monkeypatch.setattr("stoker.training.core.blocks.compile_blocks", lambda blocks: None)
    stage = with_callbacks(Regression, Look(), Compiled())
    sitting = session(stage, new_run(tmp_path, Regression), compile=False, max_steps=1)
    with sitting.run.lock(), sitting.signals:
        assert sitting.train().state == "finished"
    assert found == [False, True, True] and not blocked(os.getpid())
