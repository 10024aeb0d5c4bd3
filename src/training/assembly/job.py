"""What a start is to do, once everything typed was understood."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stoker.config import Parsed
from stoker.daemon import rundir
from stoker.daemon.rundir import RunDir
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import Stage


@dataclass(frozen=True)
class Job:
    """What is to be done: the config, and the run that is resumed (None: a new one)."""

    stage: type[Stage]
    parsed: Parsed[Any]
    run: RunDir | None = None
    snapshot: Path | None = None  # to resume from; without a run: in a new one, which continues from it
    evaluated: Pretrained | None = None  # what is only evaluated
    asks: bool = False  # whether to ask on the terminal first
    notes: tuple[str, ...] = ()  # lines for the log: options that differ from their defaults
    script: str = field(default_factory=lambda: rundir.script_of(sys.argv[0]))  # which starts it, for its status

    @property
    def cfg(self) -> Any:
        return self.parsed.config

    @property
    def forks(self) -> bool:
        """Whether a new run is to continue from another run's snapshot."""
        return self.snapshot is not None and self.run is None

    def within(self, run: RunDir) -> "Job":
        """The same in the run that was made for it: one that continues from a snapshot holds a copy of it."""
        return replace(self, run=run, snapshot=None) if self.forks else self
