"""Writes snapshots beside the training: one at a time, and again and again while the disk will not take them."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stoker import files, progress
from stoker.daemon.table import duration
from stoker.training.core.manifest import Damaged
from stoker.training.core.options import Options
from stoker.training.core.signals import Signals
from stoker.training.core.snapshots import Packed, Snapshots, pack

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two trials
AFTER_STOP = 30.0  # seconds of trouble that a run is kept waiting for that was asked to stop
LOOK = 0.2  # seconds


@dataclass
class Saver:
    """One thread, which writes one snapshot at a time. All methods are for the thread that trains.

    `emit` is called with "on_save" and the path of each snapshot that was written and verified, and with "on_trouble"
    when `trouble` changes. An error that waiting cannot mend, unlike a full disk, is raised.
    """

    snapshots: Snapshots
    cfg: Options
    signals: Signals
    emit: Callable[..., None]
    last: float = 0.0  # when the last was handed over, by the monotonic clock
    trouble: str = ""  # why the last trial failed, while it is tried again
    _since: float = 0.0  # when the trouble began
    _reported: str = ""  # the trouble of the last "on_trouble"
    _given_up: threading.Event = field(default_factory=threading.Event)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "saver"))
    _waiting: list[Packed] = field(default_factory=list)  # those under way, oldest first
    _judgements: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> best_step, judged
    _whole: list[Path] = field(default_factory=list)  # snapshots for which "on_save" was not emitted yet
    _last_whole: tuple[int, int] = -1, -1  # best_step and judged of the newest that on_save was for
    _writing: Future[None] | None = None

    @progress.during("saving")
    def begin(self, name: str, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], *, best_step: int,
              judged: int) -> None:
        """Copy a snapshot aside and start to write it. One under way is waited for; if it is in trouble, this one takes
        its place, but the best one so far still goes first.

        `keep_only` never deletes the best, nor the newest snapshot of a step up to `judged`: a later step may turn out
        to have been bad.
        """
        while self._writing:
            self._wait(LOOK, give_up=bool(self.trouble))
        self._given_up.clear()
        self._waiting = [packed for packed in self._waiting if packed.step == best_step != step]
        self._waiting.append(pack(name, step, weights, state))
        self._judgements[name] = best_step, judged
        self._writing = self._thread.submit(self._write)
        self.last = time.monotonic()

    def look(self) -> str:
        """Emit what became of the snapshot under way. Returns why training should end, or ""."""
        self._wait(0)
        minutes = self.cfg.disk_full_minutes
        return f"no snapshot could be written for {minutes:g} minutes" if self._troubled(60 * minutes) else ""

    @progress.during("saving")
    def finish(self, patient: bool) -> str:
        """Wait for the one under way; as long as it takes, but of trouble no longer than training would go on through
        if `patient`, only half a minute once a stop is asked for, else not at all. The return is why it was given up,
        if it was."""
        while self._writing and not self._troubled(self._patience() if patient else 0.0):
            self._wait(LOOK)
        self._wait(give_up=True)
        return f"the last snapshot could not be written ({self.trouble})" if self.trouble else ""

    def keep_only(self, steps: Set[int]) -> None:
        """Delete the snapshots of other steps. For callbacks, in on_save: it comes when a snapshot is whole and
        verified.

        What the run itself may need stays: the newest snapshot; the best, as of when the newest was begun; the newest
        of a step up to which all was found to be well by then. That one cannot be deleted is a warning.
        """
        best_step, judged = self._last_whole
        well = max((step for step in self.snapshots.steps() if step <= judged), default=-1)
        try:
            self.snapshots.keep_only({*steps, best_step, well})
        except OSError as error:  # the new one is whole, and that is what counts
            log.warning("an older snapshot could not be deleted: %s", error)

    def close(self) -> None:
        self._given_up.set()
        self._thread.shutdown()

    def _patience(self) -> float:
        return min(60 * self.cfg.disk_full_minutes, AFTER_STOP if self.signals.stop else math.inf)

    def _troubled(self, longer_than: float) -> bool:
        return bool(self.trouble) and time.monotonic() - self._since > longer_than

    def _wait(self, seconds: float | None = None, give_up: bool = False) -> None:
        if give_up:
            self._given_up.set()
        if self._writing and wait([self._writing], seconds).done:
            done, self._writing = self._writing, None
            done.result()
        while self._whole:
            path = self._whole.pop(0)
            self._last_whole = self._judgements.pop(path.name)
            self.emit("on_save", path)
        if self._reported != self.trouble:
            self._reported = self.trouble
            self.emit("on_trouble")

    # -- in the thread ------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """All that are waiting, until they are whole or given up."""
        pause = FIRST_WAIT
        while self._waiting:
            packed = self._waiting[0]
            try:
                path = self.snapshots.save(packed)
            except (OSError, Damaged) as error:
                passes = files.may_pass(error) or isinstance(error, Damaged)
                if not passes or not self.snapshots.folder.is_dir():  # it is gone, with what was written
                    raise
                self._note(packed, error)
                progress.mark()  # to try again and again is no stall
                if self._given_up.wait(pause):
                    return
                pause = min(2 * pause, LONGEST_WAIT)
            else:
                if self.trouble:
                    log.warning("%s is written, after %s", packed.name, duration(time.monotonic() - self._since))
                self.trouble = ""
                self._whole.append(path)
                self._waiting.pop(0)

    def _note(self, packed: Packed, error: Any) -> None:
        if not self.trouble:
            self._since = time.monotonic()
            log.error("%s could not be written: %s; it is tried again while training goes on", packed.name, error)
        self.trouble = str(error)
