"""Signals of a run: acknowledged within a second, obeyed between steps.

Python runs its handlers between bytecodes only, so a long operation in C would keep the user waiting for any
sign of life. The kernel's signal is therefore written to a pipe as well (`signal.set_wakeup_fd`), and a thread
reads it there: it answers in the log at once and notes the request, which the trainer obeys when it can.

    SIGTERM, SIGINT     stop after the step in hand, with a snapshot; a second one ends the process at once
    SIGUSR1             a snapshot after the step in hand
    SIGCONT             going on after a pause, which was no stall
    SIGHUP              ignored: a run outlives its terminal
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

log = logging.getLogger(__name__)

STOPS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A stop that came while there was nothing to save yet."""


class Signals:
    """A context manager that holds what the signals asked for. To be entered by the main thread.

    stop            name of the signal that asked to stop, or ''
    take_save()     whether a snapshot was asked for since the last call
    at_second       called, from the thread, before a second stop ends the process; returns its exit code
    at_continue     called, from the thread, when the process goes on after a pause
    interruptible   while True, a stop raises Interrupted in the main thread
    interrupted     name of the signal that did
    """

    def __init__(self, at_second: Callable[[str], int] = lambda name: 75):
        self.stop = ""
        self.at_second = at_second
        self.at_continue: Callable[[], None] = lambda: None
        self.interruptible = False
        self.interrupted = ""
        self._held = False
        self._save = threading.Event()
        self._before: dict[signal.Signals, object] = {}

    def take_save(self) -> bool:
        if not self._save.is_set():  # clearing what was not seen would lose a signal that comes in between
            return False
        self._save.clear()
        return True

    def check(self) -> None:
        """Raise Interrupted for a stop that came, but was held, or whose exception got lost."""
        if self.stop and self.interruptible:
            raise Interrupted(self.stop)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For imports of C++: raised in the midst of one, Interrupted is swallowed, or aborts the process. It is raised
        when the block is done."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @contextmanager
    def children_spared(self) -> Iterator[None]:
        """Keep Ctrl-C, which a terminal sends to all processes of its group, from those that are started in the block,
        and from what these start: if it ended a compiler, the step that is still to be done would fail.

        A child inherits the set of signals that its parent's thread blocks. The thread that listens here gets the
        signal instead.
        """
        listening = bool(self._before)
        if listening:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            if listening:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __enter__(self) -> "Signals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in (*STOPS, signal.SIGUSR1, signal.SIGCONT):
            self._before[number] = signal.signal(number, self._on_signal)
        self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.write(self._writer, b"\0")  # no signal has number 0: it ends the thread
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, sooner or later; the thread has seen the signal already."""
        if self.interruptible and not self._held and number in STOPS:
            self.interrupted = signal.Signals(number).name
            raise Interrupted(self.interrupted)

    def _listen(self) -> None:
        while (number := os.read(self._reader, 1)[0]) != 0:
            if number == signal.SIGUSR1:
                log.info("SIGUSR1: a snapshot after this step")
                self._save.set()
            elif number == signal.SIGCONT:
                self.at_continue()
            elif number in STOPS:
                self._stop(signal.Signals(number).name)

    def _stop(self, name: str) -> None:
        if self.stop:
            log.warning("second %s: ending at once", name)
            os._exit(self.at_second(name))
        self.stop = name
        log.info("%s: %s", name, "stopping" if self.interruptible else
                 "finishing this step, then saving and stopping; once more to end at once")
