"""Worker processes that load data: check that their batches fit into shared memory, wait for them, end them."""

import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from stoker.config import UserError

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SHARED_MEMORY = Path("/dev/shm")
READ_AHEAD = 2  # batches of each worker: DataLoader's prefetch_factor
LOOK, SILENCE = 1.0, 60.0  # seconds without a batch after which to look for a stop, and to report the silence
STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "paused"}  # proc(5)


class Abandoned(Exception):
    """Raised while waiting for a batch, when the run was asked to stop."""


class OutOfSharedMemory(RuntimeError):
    """A batch does not fit into /dev/shm, through which workers send it."""


_left: list[Any] = []  # iterators whose workers hang: kept, since freeing one would wait 5 s for each worker


class Awaited:
    """Iterates over a DataLoader's iterator (with `timeout=LOOK`), and reports clearly what happens to its workers.

    Raises Abandoned if `stopped()` is true while it waits for a batch.
    """

    def __init__(self, batches: Any, stopped: Callable[[], object]):
        self._batches, self._stopped, self._hangs = batches, stopped, False

    def __iter__(self) -> "Awaited":
        return self

    def __next__(self) -> Any:
        since, reports = time.monotonic(), 0
        while True:
            try:
                return next(self._batches)
            except UserError as error:  # raised in a worker: its message is the end of a traceback
                name = f"{type(error).__module__}.{type(error).__qualname__}: "
                raise type(error)(str(error).rpartition(name)[2].strip()) from error
            except (RuntimeError, EOFError, ConnectionError) as error:
                self._check(error)
            silence = time.monotonic() - since
            if silence > SILENCE * 2**reports:
                reports += 1
                _report(silence)

    def _check(self, error: Exception) -> None:
        """Raise the error that an exception of the iterator stands for; return if only no batch has come yet."""
        if str(error).startswith("Caught ") and not isinstance(error, OutOfSharedMemory):
            raise error  # raised by the data set itself
        if self._stopped():
            self._hangs = True
            _left.append(self._batches)
            raise Abandoned from None
        if not str(error).startswith("DataLoader timed out"):
            raise _as_plain_error(error) from None
        pinning = getattr(self._batches, "_pin_memory_thread", None)
        if pinning is not None and not pinning.is_alive():  # with a timeout, DataLoader does not look itself
            raise RuntimeError("DataLoader's thread that copies batches for the GPU has ended") from None

    def close(self) -> None:
        """End the workers, unless they hang. Do not leave it to the garbage collector: it may free the queue first
        through which workers are asked to end, and then waits 5 s for each."""
        if not self._hangs:
            self._batches._shutdown_workers()


@runtime_checkable
class Closing(Protocol):
    """An iterator that reads ahead until it is closed."""

    def close(self) -> None: ...


def close(batches: Iterator[Any]) -> None:
    """End the workers that read ahead for an iterator of batches, if it has any: no more batches are wanted."""
    if isinstance(batches, Closing):
        batches.close()


def _as_plain_error(error: Exception) -> Exception:
    """The error to report when a worker has ended. A message that it sent only in part can raise any error here."""
    if isinstance(error, OutOfSharedMemory):
        return RuntimeError(f"DataLoader worker: a batch does not fit into shared memory, {_room()}: start with "
                            "--num_workers 0, or with more room (docker run --shm-size=2g)")
    if isinstance(error, RuntimeError):
        return error
    return RuntimeError("DataLoader worker has ended, and what it sent cannot be read: it was killed, or crashed; if "
                        "for want of memory, --num_workers 0 needs less")


def _report(silence: float) -> None:
    """Log the state of the workers' processes, since no batch comes."""
    said = []
    for worker in multiprocessing.active_children():
        with suppress(OSError):  # it has ended meanwhile
            state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
            said.append(f"{worker.pid} is {STATES.get(state, state)}")
    log.warning("no batch for %.0f s; the processes that read data: %s; %s", silence,
                ", ".join(said) or "none is left", _room())


def _room() -> str:
    if not SHARED_MEMORY.is_dir():
        return f"there is no {SHARED_MEMORY}"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"{SHARED_MEMORY} has {usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB free"


def workers_that_fit(workers: int, dataset: Any, collate: Callable[[list[Any]], Any], items: Sequence[int]) -> int:
    """As many workers as asked for, or 0, with a warning, where /dev/shm cannot hold the batches that they read ahead.

    items    the rows of one batch; the first two are read to estimate its size
    """
    if not (workers and items and SHARED_MEMORY.is_dir()):
        return workers
    rows = [dataset[item] for item in items[:2]]
    needed = (READ_AHEAD * workers + 1) * _tensor_bytes(collate(rows)) * len(items) / len(rows)
    room = shutil.disk_usage(SHARED_MEMORY)
    if needed <= room.free:
        return workers
    _warn_once(f"--num_workers {workers}: the batches that the workers read ahead take {needed / 1e6:,.1f} MB, but "
               f"less is free in {SHARED_MEMORY}, which has {room.total / 1e6:,.0f} MB in all: the trainer reads the "
               "data itself, as with --num_workers 0 (docker run --shm-size=2g makes room)")
    return 0


def _tensor_bytes(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else ()
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
                for value in values if isinstance(value, torch.Tensor)}
    return sum(storages.values())


@lru_cache
def _warn_once(line: str) -> None:
    """Log a warning the first time only, since loaders are opened for each evaluation."""
    log.warning("%s", line)


@dataclass(frozen=True)
class Shared:
    """Collates a batch and moves it to shared memory, where the worker can still report that it does not fit. The
    DataLoader's own thread would print a traceback and drop the batch, and the trainer would wait for ever."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        try:
            for value in batch.values() if isinstance(batch, Mapping) else ():
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        except RuntimeError as error:
            if "No space left" not in str(error):
                raise
            raise OutOfSharedMemory(str(error)) from error
        return batch


def start_worker(number: int) -> None:
    """Set up a worker: it ends when the trainer ends, however that happens, and leaves signals to the trainer."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    trainer = multiprocessing.parent_process()
    if trainer is None or os.getppid() != trainer.pid:  # the trainer died before prctl
        os._exit(1)
