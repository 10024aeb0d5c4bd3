"""What the trainers of a run died of, as far as it can be known: rows of deaths.jsonl."""

import logging
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from stoker import files
from stoker.daemon import machine, process, records
from stoker.daemon.journal import Journal
from stoker.daemon.process import Process
from stoker.daemon.rundir import ACTIVE, RESTARTING, RunDir, Status

log = logging.getLogger(__name__)

NOT_KNOWN = "killed, or the machine crashed: by whom is not known"


@dataclass(frozen=True)
class Death:
    """`step` and `phase` are those of the trainer's last status; `code` is its exit code, negative for a signal, None
    where nobody saw it end."""

    step: int
    phase: str
    cause: str
    pid: int
    code: int | None = None
    restarted: bool = False
    time: float = field(default_factory=time.time)


def note(run: RunDir, death: Death) -> None:
    try:
        Journal(run.deaths).append(asdict(death))
    except OSError as error:  # a full disk is no reason to stop
        log.warning("%s could not be written: %s", run.deaths, error.strerror)


def last(run: RunDir) -> Death | None:
    """The newest row that is whole. Raises OSError where the file cannot be read, or has more than 64 MiB."""
    try:
        lines = files.read(run.deaths, most=2**26).splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):  # torn by a kill or a power cut
            return records.build(Death, records.parse(line))
    return None


def tell_last(run: RunDir, status: Status, trainer: Process | None) -> None:
    """Log what the trainer before died of, if it died; what nobody saw is noted now. `status` is what it left."""
    if status.state in ACTIVE and trainer is not None:
        note(run, Death(status.step, status.phase, unseen(trainer), trainer.pid))
    if status.state in (*ACTIVE, RESTARTING) and (death := last(run)):
        log.warning("process %d died at step %d (%s): %s", death.pid, death.step, death.phase, death.cause)


def of(code: int, trainer: Process | None, kills_before: int | None) -> str:
    """The cause, from an exit code as `subprocess` gives it."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    if code != -signal.SIGKILL:
        return f"{name}; where it was stands in its log"
    kills = machine.memory_kills()
    if trainer and _out_of_memory(trainer):
        return f"{name} by the kernel: out of memory"
    if kills is not None and kills_before is not None and kills > kills_before:
        return f"{name}, most likely by the kernel: it ended a process here for want of memory"
    return f"{name}, by whom is not known"


def unseen(trainer: Process) -> str:
    """The cause of a death that nobody watched."""
    if trainer.boot != process.boot():
        return "the machine was started anew since: a reboot, or a power cut"
    return "SIGKILL by the kernel: out of memory" if _out_of_memory(trainer) else NOT_KNOWN


def _out_of_memory(trainer: Process) -> bool:
    return machine.was_killed_for_memory(trainer.pid, trainer.started / os.sysconf("SC_CLK_TCK"))
