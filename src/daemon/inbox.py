"""Requests to a running trainer as files in its run's folder: `requests/snapshot`, `requests/trace`."""

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from stoker import files

log = logging.getLogger(__name__)

KNOWN = {
    "snapshot": "a snapshot after this step",
    "trace": "a profiler's trace of the next three steps",
}
SECONDS_BETWEEN_LOOKS = 1.0


def ask(folder: Path, name: str) -> None:
    """Leave a request; one that is there already is the same. Raises OSError."""
    folder.mkdir(exist_ok=True)
    (folder / name).touch()


@dataclass
class Inbox:
    """The folder as the trainer reads it. What is in it never ends a run."""

    folder: Path
    _next: float = 0.0  # when to look again, by the monotonic clock
    _found: set[str] = field(default_factory=set)  # requests that are being obeyed
    _reported: set[str] = field(default_factory=set)
    _stuck: set[str] = field(default_factory=set)  # names that cannot be removed, and are passed over

    def look(self) -> list[str]:
        """The requests there are; at most once a second, nothing in between. What means none is reported and removed,
        but hidden files, which somebody may be writing."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + SECONDS_BETWEEN_LOOKS
        try:
            names = sorted(name for name in os.listdir(self.folder) if name[0] != "." and name not in self._stuck)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._report(f"{self.folder} {files.reason(error)}: no request can be read there")
            return []
        for name in set(names) - KNOWN.keys():
            self._report(f"{self.folder.name}/{name} is no request and is removed; there are {', '.join(KNOWN)}")
            self._remove(name)
        found = [name for name in names if name in KNOWN]
        for name in found:
            log.info("%s/%s: %s", self.folder.name, name, KNOWN[name])
        self._found |= set(found)
        return found

    def clear(self) -> None:
        """Remove the requests that were found last: they are obeyed."""
        for name in self._found:
            self._remove(name)
        self._found = set()

    def _remove(self, name: str) -> None:
        path = self.folder / name
        try:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        except OSError as error:
            self._stuck.add(name)
            self._report(f"{path} cannot be removed: {error.strerror}")

    def _report(self, line: str) -> None:
        if line not in self._reported:
            self._reported.add(line)
            log.warning("%s", line)
