"""Progress of long preparations: a bar in a terminal, a plain line now and then in a log."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


def tracked(items: Iterable[tuple[int, T]], what: str, total: int, unit: str) -> Iterator[T]:
    """Yield the second of each pair; the first says how much of `total` it is (bytes, files: `unit`)."""
    if sys.stderr.isatty():
        yield from _bar(items, what, total, unit)
    else:
        yield from _lines(items, what, total, unit)


@contextmanager
def announced(say: Callable[[], str]) -> Iterator[None]:
    """A line now and then while the block runs, of what `say` gives. None in a terminal: for what has bars there."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            log.info("%s", say())

    telling = threading.Thread(target=tell, daemon=True)
    if not sys.stderr.isatty():
        telling.start()
    try:
        yield
    finally:
        over.set()


def _bar(items: Iterable[tuple[int, T]], what: str, total: int, unit: str) -> Iterator[T]:
    from tqdm import tqdm

    with tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False) as bar:
        for amount, item in items:
            yield item
            bar.update(amount)


def _lines(items: Iterable[tuple[int, T]], what: str, total: int, unit: str) -> Iterator[T]:
    done, start = 0, time.monotonic()
    told = start
    for amount, item in items:
        yield item
        done += amount
        if (now := time.monotonic()) - told >= SECONDS_BETWEEN_LINES:
            told = now
            left = (now - start) / max(done, 1) * (total - done)
            share = 100 * done / max(total, 1)
            log.info("%s: %.0f %% of %s %s, about %.0f s left", what, share, f"{total:,}", unit, left)
