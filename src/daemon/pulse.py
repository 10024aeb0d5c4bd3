"""Signs of life: what a trainer is at, when it last got on with it, and how long it may be silent there."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from stoker.daemon.rundir import Gone, RunDir

PREPARING, ESTIMATING, STARTING = "preparing", "estimating", "starting"
TRAINING, EVALUATING, SAVING, FINISHING = "training", "evaluating", "saving", "finishing"
LEARNT = (TRAINING, EVALUATING)  # phases that have a pace; the others come as they come
SECONDS_BETWEEN_WRITES = 1.0
FORGETTING = 0.9  # the share of what was usual before, when another gap is counted in


@dataclass(frozen=True)
class Patience:
    """Seconds, and times the gaps between two signs of progress seen so far, before a trainer counts as stalled."""

    unknown: float = 1800.0  # where no pace is known: data are prepared, a model is compiled, a snapshot is written
    least: float = 60.0
    times_usual: float = 20.0
    times_longest: float = 3.0


PATIENCE = Patience()


@dataclass
class _Pace:
    """The gaps of a phase, in seconds; `whole`: it was gone through once, so the longest has been met."""

    usual: float = 0.0
    longest: float = 0.0
    whole: bool = False

    def count(self, gap: float) -> None:
        self.usual = FORGETTING * self.usual + (1 - FORGETTING) * gap if self.longest else gap
        self.longest = max(self.longest, gap)


@dataclass
class Pulse:
    """Keeps phase, time of the last progress and budget in status.json, for those who look from outside.

    The code that makes progress reports it here, never a clock; it is written at most once a second. Each report also
    checks that the run's folder is still there, and raises Gone in the main thread where it is not.
    """

    run: RunDir
    patience: Patience = field(default_factory=lambda: PATIENCE)
    phase: str = PREPARING
    busy: tuple[float, float] = (0.0, 0.0)  # seconds that trainers of this run had, and since when (monotonic clock)
    _before: str = PREPARING
    _paces: dict[str, _Pace] = field(default_factory=lambda: {phase: _Pace() for phase in LEARNT})
    _figures: dict[str, Any] = field(default_factory=dict)
    _last: float = 0.0
    _written: float = 0.0
    _gone: bool = False

    def mark(self, every: float = SECONDS_BETWEEN_WRITES, **figures: Any) -> None:
        """The work has got on; `figures` are what the status says of it from now on. Written if it was not in the last
        `every` seconds."""
        self._look_for_folder()
        self._count()
        self._figures |= figures
        if self._last - self._written >= every:
            self.write()

    def enter(self, phase: str, **figures: Any) -> None:
        """Begin a phase. The phase before it is complete then, also if it is the same one."""
        if pace := self._paces.get(self.phase):
            pace.whole = True
        if phase == self.phase:
            self.mark(**figures)
            return
        self._before, self.phase, self._last = self.phase, phase, time.monotonic()
        self.write(**figures)

    def back(self, **figures: Any) -> None:
        """End a phase and return to the one before it."""
        self._count()
        self.enter(self._before, **figures)

    def _count(self) -> None:
        now = time.monotonic()
        if pace := self._paces.get(self.phase):
            pace.count(now - self._last)
        self._last = now

    def _look_for_folder(self) -> None:
        """Raises Gone, once, where the run's folder is not in its place any more."""
        if not self._gone and threading.current_thread() is threading.main_thread():
            self._gone = self.run.where_now() != self.run
            if self._gone:
                raise Gone

    @property
    def busy_seconds(self) -> float:
        """How long trainers of this run have been at work, all together, up to now."""
        before, since = self.busy
        return before + time.monotonic() - since if since else before

    @property
    def budget(self) -> float:
        """Seconds of silence that are no stall in this phase."""
        pace = self._paces.get(self.phase)
        if pace is None or not pace.whole:
            return self.patience.unknown
        return max(self.patience.least, self.patience.times_usual * pace.usual,
                   self.patience.times_longest * pace.longest)

    def write(self, **figures: Any) -> None:
        """Write the status now. On a full disk only the file's time is set, as the sign of life: those who save report
        the disk."""
        self._look_for_folder()
        if self._gone:  # what stands there now may be another run's
            return
        self._written = time.monotonic()
        self._figures |= figures
        try:
            self.run.write_status(replace(self.run.status(), phase=self.phase, budget=self.budget, **self._figures))
        except OSError:
            with suppress(OSError):
                os.utime(self.run.status_file)
