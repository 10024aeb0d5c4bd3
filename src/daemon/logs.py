"""The log of a run: every line bears its time, also those of a traceback; no control characters."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker.config import printable

TIME = "%Y-%m-%d %H:%M:%S"


class _EveryLine(logging.Formatter):
    """Puts the time before each line of a message; warnings and errors say so."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        start = f"[{self.formatTime(record, TIME)}] {level}"
        return "\n".join(start + printable(line) for line in text.splitlines() or [""])


def to_console() -> None:
    """Log to standard error."""
    logging.captureWarnings(True)
    _add(logging.StreamHandler(sys.stderr))


def to_file(path: Path, *, background: bool) -> None:
    """Log to a file as well; in the background to the file only, with whatever else the process prints."""
    root = logging.getLogger()
    if background:
        for handler in list(root.handlers):
            root.removeHandler(handler)
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    _add(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))


@contextmanager
def also_in(path: Path) -> Iterator[None]:
    """Log to a file as well while the block runs."""
    handler = _add(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _add(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(_EveryLine())
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    return handler
