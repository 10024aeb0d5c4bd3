"""Watches a trainer from outside: ends it where it stalls, starts another where it died. Needs nothing installed.

    exit code 0, 2 or 75     the end of the run, or of this sitting; so is a stop by SIGTERM or SIGINT to either process
    anything else            a death: noted, then a new trainer resumes from the newest snapshot, after a while
    no progress for long     the stacks of the trainer and its workers into its log (SIGUSR2), then SIGKILL: a death

Deaths without a new snapshot between them make the waits longer; one more than there are waits ends the run as failed.
So does an exit code 1 before this supervisor's first trainer has begun: that is a start that failed.
If the supervisor is killed, its trainer continues without being watched.
"""

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import IO

from stoker import files
from stoker.daemon import deaths, logs, machine, process, registry
from stoker.daemon.deaths import Death
from stoker.daemon.process import Process
from stoker.daemon.pulse import ESTIMATING, PREPARING
from stoker.daemon.rundir import ACTIVE, MANIFEST, RESTARTING, RunDir, Status
from stoker.daemon.table import duration

log = logging.getLogger(__name__)

SUPERVISOR = "STOKER_SUPERVISOR"  # in a trainer's environment: the PID of the process that watches it
FINISHED, FAILED, REFUSED, RESUMABLE = 0, 1, 2, 75  # a trainer's exit codes
SPARE = 2**21  # bytes that a trainer wants beside the next snapshot's own
STOPS = (signal.SIGTERM, signal.SIGINT)
HEARD = {*STOPS, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD}


@dataclass(frozen=True)
class Waits:
    """Seconds."""

    restarts: tuple[float, ...] = (1.0, 5.0, 30.0, 120.0)  # after the first death without progress, the second, ...
    look: float = 1.0  # from one look at the trainer to the next
    stacks: float = 1.0  # for the stacks of a process to be written


@dataclass
class Supervisor:
    """`first` is the trainer's command; `again` that of another one: for the run, and whether one has begun already."""

    first: list[str]
    again: Callable[[RunDir, bool], list[str]]
    waits: Waits = field(default_factory=Waits)
    run: RunDir | None = None
    _lock_file: IO[str] | None = None
    _child: Process | None = None
    _begun: bool = False
    _stop: str = ""  # name of the signal that asked to stop
    _in_vain: int = 0  # deaths without a new snapshot between them
    _reached: int = -1  # its step

    def supervise(self) -> int:
        """The exit code: the last trainer's, or 1 where too many died."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # they are waited for; children get them back
        command, ended = self.first, None
        while ended is None:
            kills = machine.memory_kills()
            code, stall = self._watch(command)
            ended = self._judge(code, stall, kills)
            if ended is None and self.run:
                command = self.again(self.run, self._begun)
        return ended

    # -- one trainer --------------------------------------------------------------------------------------------

    def _watch(self, command: list[str]) -> tuple[int, str]:
        """Start a trainer and wait for its end: its exit code, and of what stall it had to be killed."""
        silent, sign, stall = 0.0, 0, ""
        with self._errors() as errors, subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=errors, process_group=0, preexec_fn=_hear_again,
                env=os.environ | {SUPERVISOR: str(os.getpid())}) as child:  # a group: Ctrl-C reaches it through us only
            self._child = process.find(child.pid)
            while child.poll() is None:
                looked = time.monotonic()
                self._hear(self.waits.look, child)
                self._look_for_run()
                before, sign = sign, self._sign()
                watched = min(time.monotonic() - looked, 2 * self.waits.look)  # longer: all of us slept
                silent = silent + watched if sign == before and not process.is_paused(child.pid) else 0.0
                if not stall and (stall := self._stall(silent)):
                    _kill(child.pid, self.waits.stacks)
        self._look_for_run()  # one that died at once may have made its run after the last look
        return child.returncode, stall

    def _look_for_run(self) -> None:
        """Find the run of the trainer, and keep its lock file open for writing: that shows others that this process
        watches it."""
        if self.run is None and self._child and (found := registry.taken_by(self._child)):
            self.run, self._lock_file = found, open(found.lock_file, "a")

    def _errors(self) -> AbstractContextManager[IO[bytes] | None]:
        """Where a trainer prints why it is refused: at first to standard error, for the user who started us; a later
        one in the background into the log of the run."""
        later = self.run is not None and os.environ.get("STOKER_BACKGROUND") == "1"
        return open(self.run.latest_log, "ab") if self.run and later else nullcontext()

    def _hear(self, seconds: float, child: subprocess.Popen[bytes] | None = None) -> None:
        """Wait so long for a signal, or for a trainer's end; pass on what is meant for it."""
        heard = signal.sigtimedwait(HEARD, seconds)
        if heard is not None and heard.si_signo in STOPS:
            self._stop = signal.Signals(heard.si_signo).name
        if heard is not None and child and heard.si_signo in (*STOPS, signal.SIGUSR1):
            child.send_signal(heard.si_signo)

    def _status(self) -> Status | None:
        """The last status that this trainer wrote; None where there is none."""
        try:
            return self.run.status() if self.run and self._is_trainer(self.run) else None
        except (OSError, ValueError):  # a run that is refused takes its directory with it
            return None

    def _is_trainer(self, run: RunDir) -> bool:
        """Whether this trainer has the run's lock and has written its status. In a container the trainer before often
        had the same PID."""
        return self._child is not None and run.last_holder() == self._child and run.status().pid == self._child.pid

    def _sign(self) -> int:
        try:
            return self.run.status_file.stat().st_mtime_ns if self.run else 0
        except FileNotFoundError:
            return 0

    def _stall(self, silent: float) -> str:
        status = self._status()
        if status is None or status.state not in ACTIVE:
            return ""
        self._begun |= status.phase not in (PREPARING, ESTIMATING)
        if not 0 < status.budget < silent:
            return ""
        return (f"stalled: no progress for {duration(silent)} in phase {status.phase!r}, where "
                f"{duration(status.budget)} are the most to expect; killed, its stacks stand in its log")

    # -- after it -----------------------------------------------------------------------------------------------

    def _judge(self, code: int, stall: str, kills: int | None) -> int | None:
        """The exit code that ends the supervision; None where another trainer is to be started, after a wait here."""
        if code in (FINISHED, RESUMABLE) or (code == REFUSED and not self._in_vain):
            return code
        if self.run is None or not self.run.status_file.exists():
            return max(code, FAILED)
        with logs.also_in(self.run.latest_log.resolve()):
            if code == REFUSED:
                return self._end("failed", "could not be resumed: refused, see the end of "
                                           f"{self.run.latest_log.resolve()}")
            death = self._death(self.run, code, stall, kills)
            deaths.note(self.run, death)
            log.warning("process %d died at step %d (%s): %s", death.pid, death.step, death.phase, death.cause)
            if death.restarted:
                seconds = self.waits.restarts[self._in_vain - 1]
                self._write(RESTARTING, f"{death.cause}; another trainer in {seconds:g} s")
                self._pause(seconds)
            if self._stop or -code in STOPS:
                return self._end("stopped", f"{self._stop or signal.Signals(-code).name} received; {death.cause}")
            return None if death.restarted else self._give_up(code, death.cause)

    def _death(self, run: RunDir, code: int, stall: str, kills: int | None) -> Death:
        """What is known of it; counts it, and decides whether another trainer follows."""
        assert self._child is not None
        status, newest = run.status(), _newest_step(run)
        took_it = self._is_trainer(run)
        phase = status.phase if took_it else PREPARING
        self._begun |= phase not in (PREPARING, ESTIMATING)
        self._in_vain = 1 if newest > self._reached else self._in_vain + 1
        self._reached = max(newest, self._reached)
        reason = status.reason if took_it and code == FAILED else ""
        goes_on = not self._stop and -code not in STOPS and self._in_vain <= len(self.waits.restarts) and (
            self._begun or code != FAILED)
        return Death(status.step, phase, stall or reason or deaths.of(code, self._child, kills), self._child.pid, code,
                     goes_on)

    def _give_up(self, code: int, cause: str) -> int:
        if code == FAILED and not self._begun:
            return FAILED  # it has written the reason itself
        return self._end("failed", f"{self._in_vain} deaths without a new snapshot between them; the last: {cause}")

    def _pause(self, seconds: float) -> None:
        """So long, and on a full disk until there is room: a trainer would be refused."""
        until = time.monotonic() + seconds
        while not self._stop and ((left := until - time.monotonic()) > 0 or self._is_full()):
            self._hear(max(left, self.waits.look))

    def _is_full(self) -> bool:
        assert self.run is not None
        sizes = [sum(file.stat().st_size for file in path.parent.iterdir())
                 for path in self.run.snapshots.glob(f"snapshot_*/{MANIFEST}")]
        return shutil.disk_usage(self.run.path).free < max(sizes, default=0) + SPARE

    def _end(self, state: str, reason: str) -> int:
        assert self.run is not None
        self._write(state, reason)
        log.info("Training %s: %s", state, reason)
        log.info("Resume: %s", files.hint(f"resume {self.run.name}"))
        return FAILED if state == "failed" else RESUMABLE

    def _write(self, state: str, reason: str) -> None:
        """Raises UserError where somebody else trains the run by now."""
        assert self.run is not None
        try:
            with self.run.lock(record_holder=False):
                status = replace(self.run.status(), state=state, reason=reason, eta_seconds=None)
                self.run.write_status(status)
        except OSError as error:  # a full disk is no reason not to go on
            log.warning("%s could not be written: %s", self.run.status_file, error.strerror)


def _hear_again() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)


def _kill(pid: int, seconds: float) -> None:
    """Let a trainer and its workers write their stacks, one after another, then end it; the workers end with it."""
    for member in [process.find(member) for member in process.family(pid)]:
        if member and process.find(member.pid) == member and process.catches(member.pid, signal.SIGUSR2):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(member.pid, signal.SIGUSR2)
            time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)  # not waited for yet, so the PID is still its own


def _newest_step(run: RunDir) -> int:
    """Of the snapshots; -1 where there is none."""
    return max((manifest["step"] for _, manifest in run.manifests()), default=-1)
