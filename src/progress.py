"""Progress: a bar in a terminal, a plain line now and then in a log, and a mark for those who wait for a sign of life.

    mark             the work has got on: a batch, a part of a file
    during           a phase of its own
    heard            a listener that is called at both
    tracked          marks, and shows, what is done item by item
    announced        shows, and marks where it changes, what others do meanwhile
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class Listener(Protocol):
    """Is called when the work has got on, when it enters a phase, and when it is back in the phase before."""

    def mark(self) -> None: ...
    def enter(self, phase: str) -> None: ...
    def back(self) -> None: ...


_listeners: list[Listener] = []
os.register_at_fork(after_in_child=_listeners.clear)  # a child's progress is not its parent's


def mark() -> None:
    """The work has got on. Cheap: to be called as often as it does."""
    for listener in _listeners:
        listener.mark()


@contextmanager
def during(phase: str) -> Iterator[None]:
    """What is done in the block is a phase of its own; also a decorator. An error leaves it as it is."""
    for listener in _listeners:
        listener.enter(phase)
    yield
    for listener in _listeners:
        listener.back()


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Call a listener at all marks and phases in the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tracked(items: Iterable[tuple[int, T]], what: str, total: int, unit: str) -> Iterator[T]:
    """Yield the second of each pair; the first says how much of `total` it is (bytes, files: `unit`)."""
    for item in (_bar if sys.stderr.isatty() else _lines)(items, what, total, unit):
        yield item
        mark()


@contextmanager
def announced(say: Callable[[], str]) -> Iterator[None]:
    """A line now and then while the block runs, of what `say` gives. None in a terminal: for what has bars there."""
    over = threading.Event()

    def tell() -> None:
        said = ""
        while not over.wait(SECONDS_BETWEEN_LINES):
            before, said = said, say()
            if said != before:
                mark()
            if not sys.stderr.isatty():
                log.info("%s", said)

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        yield
    finally:
        over.set()
        telling.join()  # it marks no more


def _bar(items: Iterable[tuple[int, T]], what: str, total: int, unit: str) -> Iterator[T]:
    from tqdm import tqdm

    with tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False) as bar:
        for amount, item in items:
            yield item
            bar.update(amount)


def _lines(items: Iterable[tuple[int, T]], what: str, total: int, unit: str) -> Iterator[T]:
    done, start = 0, time.monotonic()
    last = start
    for amount, item in items:
        yield item
        done += amount
        if (now := time.monotonic()) - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / max(done, 1) * (total - done)
            share = 100 * done / max(total, 1)
            log.info("%s: %.0f %% of %s %s, about %.0f s left", what, share, f"{total:,}", unit, left)
