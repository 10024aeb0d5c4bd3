"""Runs a script and lets it kill itself at a chosen point: how kill_matrix.py reaches the instants inside file work.

    python -P failpoints.py '{"folder": F, "trace": T, "targets": [[PLACE, STEP, NUMBER], ...]}' SCRIPT ARGUMENT...

Before each operation on a file within `folder` (opened for writing, written, fsynced, renamed, removed ...), import,
fork and call of FUNCTIONS there is a point, and one in the middle of each write. What is after an operation is before
the next. Points belong to a place and are noted in `trace`: phase, place, operation, step. The script ends by SIGKILL
at the first target: the NUMBERth point of PLACE once training is at STEP (-1: counted from the start of the script).

The script knows nothing of this. Points are the main process's, in whichever thread; forked ones have none.
"""

import builtins
import ctypes
import io
import json
import os
import re
import runpy
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

PART = 2**15  # bytes that are written at a time, so that a long write has points within it
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PATH_OPERATIONS = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir",
                   "os.symlink": "symlink", "os.truncate": "truncate"}  # by audit event

# Where an operation belongs: place, phase, operation, path in the folder (of a rename "from > to"); the first line that
# fits counts.
PATHS = [
    ("birth of the run", "", "", r"\.run\.|home/runs"),
    ("token cache", "", "", r"home/"),
    ("hand-out of models", "", "", r"run/models"),
    ("end", "end", "", r"run/"),
    ("tidying", "start", "", r"run/snapshots"),
    ("cut of the journals", "", "", r"run/\.(metrics|timings)"),
    ("status", "", "", r"run/\.?status"),
    ("log", "", "", r"run/logs"),
    ("TensorBoard", "", "", r"run/tensorboard"),
    ("other files of the start", "start", "", r"run/|\.?lm_"),
    ("metrics", "", "", r"run/metrics"),
    ("timings", "", "", r"run/timings"),
    ("samples", "", "", r"run/samples"),
    ("alerts", "", "", r"run/alerts"),
    ("rotation", "", "", r"run/snapshots/(\.old\.|snapshot_[^/]* > .*/\.old\.)"),
    ("commit", "", "rename", r"run/snapshots/\.?snapshot_[^/]* > "),
    ("commit", "", "", r"run/snapshots(/\.aside\..*)?$"),
    ("save at step 0", "", "", r"run/snapshots/\.snapshot_step_0+(/|$)"),
    ("save", "", "", r"run/snapshots/\.snapshot_"),
    ("other files", "", "", r"run/"),
]
# Calls that are points. None: the call begins a phase.
FUNCTIONS = {
    "stoker.training.trainer:Trainer._restore": "restore",
    "stoker.training.core.snapshots:load_weights": "restore",
    "stoker.training.core.events:Events.load_state_dict": "restore",
    "stoker.training.core.snapshots:Snapshots.set_aside_after": "restore",
    "stoker.training.trainer:Trainer._loop": None,
    "stoker.training.trainer:Trainer._open_data": "start of workers",
    "stoker.training.core.step:Step._update": "training step",
    "stoker.training.core.step:Step._apply": "training step",
    "stoker.training.core.optim:update": "training step",
    "stoker.training.callbacks.ema:EMA.on_step_end": "training step",
    "stoker.training.core.evaluation:score_batch": "evaluation",
    "stoker.training.assembly.session:export_models": None,
}
PLACES = ["imports", *dict.fromkeys(place for place, *_ in PATHS),
          *dict.fromkeys(filter(None, FUNCTIONS.values()))]


class Failpoints:
    """The points of this process."""

    def __init__(self, folder: str, trace: str, targets: list[list[Any]]):
        self.folder, self.targets, self.pid = folder.rstrip("/") + "/", targets, os.getpid()
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.phase, self.step = "start", -1
        self.trainer: Callable[[], Any] = lambda: None  # a weak reference: its loaders end with it
        self.unwrapped = dict(FUNCTIONS)
        self.lock, self.dying = threading.RLock(), False

    def point(self, place: str, operation: str) -> bool:
        """Note a point; whether it is where to die."""
        if os.getpid() != self.pid or not place:
            return False
        with self.lock:  # the trace ends with the point that kills, whatever other threads still reach
            return not self.dying and self._note(place, operation)

    def _note(self, place: str, operation: str) -> bool:
        if trainer := self.trainer():
            self.step = trainer.step
        os.write(self.trace, f"{self.phase}\t{place}\t{operation}\t{self.step}\n".encode())
        for target in self.targets:
            if target[0] == place and self.step >= target[1]:
                target[2] -= 1
                if target[2] <= 0:
                    self.dying = True
                    os.write(self.trace, b"killed\n")
                    return True
        return False

    def before(self, place: str, operation: str) -> None:
        if self.point(place, operation):
            self.die()

    def die(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    # -- files ------------------------------------------------------------------------------------------------------

    def place(self, operation: str, path: str, target: str = "") -> str:
        """The place of an operation on a path; '' if it is not within the folder."""
        if not path.startswith(self.folder):
            return ""
        inside = path[len(self.folder):] + (f" > {target}" if target else "")
        return next((place for place, phase, kind, pattern in PATHS if re.match(pattern, inside)
                     and phase in ("", self.phase) and kind in ("", operation)), "")

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "import" and self.phase == "start":
            self.before("imports", "import")
        elif event == "os.fork":
            self.before("start of workers", "fork")
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and not isinstance(args[0], int):
            self.file("open", absolute(args[0]))
        elif event == "os.rename":
            self.file("rename", absolute(args[0], args[2]), absolute(args[1], args[3]))
        elif event in PATH_OPERATIONS:  # of a symbolic link the path comes second
            path = args[1] if event == "os.symlink" else args[0]
            self.file(PATH_OPERATIONS[event], absolute(path, args[-1] if isinstance(args[-1], int) else -1))

    def file(self, operation: str, path: str, target: str = "") -> None:
        if place := self.place(operation, path, target):
            self.wrap_functions()
            self.before(place, operation)

    def install(self) -> None:
        sys.addaudithook(self.audit)
        fsync, opened = os.fsync, io.open

        def synced(fd: Any) -> None:
            number = fd if isinstance(fd, int) else fd.fileno()
            self.file("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(number)

        def open_(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
                  errors: str | None = None, newline: str | None = None, closefd: bool = True,
                  opener: Any = None) -> Any:
            """The built-in one, on a raw file of ours where it is only written to."""
            if isinstance(file, int) or not set("wax") & set(mode) or "+" in mode:
                return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = Raw(self, file, mode.strip("bt"), closefd, opener)
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

        os.fsync, io.open, builtins.open = synced, open_, open_

    # -- functions --------------------------------------------------------------------------------------------------

    def wrap_functions(self) -> None:
        """Make points of those whose modules have come: asked at each operation on a file."""
        for name in list(self.unwrapped):
            module, _, path = name.partition(":")
            *outer, last = path.split(".")
            owner: Any = sys.modules.get(module)
            for part in outer:
                owner = getattr(owner, part, None)
            if function := getattr(owner, last, None):
                setattr(owner, last, self.wrapped(name, function, self.unwrapped.pop(name)))

    def wrapped(self, name: str, function: Callable[..., Any], place: str | None) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            if place is None and last == "_loop":
                self.phase, self.trainer = "training", weakref.ref(args[0])
            elif place is None:
                self.phase = "end"
            self.before(place or "", last)
            return function(*args, **options)

        last = name.rpartition(".")[2].rpartition(":")[2]
        return called


class Raw(io.FileIO):
    """A file whose writes are points; a long one is done in parts, as the system may do it too."""

    def __init__(self, points: Failpoints, *args: Any):
        super().__init__(*args)
        self.points, self.path = points, absolute(args[0])

    def write(self, content: Any) -> int:
        part = memoryview(content).cast("B")[:PART]
        place = self.points.place("write", self.path)
        self.points.before(place, "write")
        if self.points.point(place, "torn write"):
            super().write(part[:len(part) // 2])
            self.points.die()
        return super().write(part)


def absolute(path: Any, folder: int = -1) -> str:
    """The path that an operation means, by the descriptor of a folder if one is given."""
    path = os.fsdecode(path)
    return os.path.abspath(path if folder < 0 else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path))


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives an interrupted measurement
    points = Failpoints(**json.loads(sys.argv[1]))
    sys.argv[:] = sys.argv[2:]
    points.install()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        points.before("end", "exit")
        if points.phase == "end" and points.unwrapped:
            raise SystemExit(f"{Path(__file__).name}: not found, or never reached: {', '.join(points.unwrapped)}")


if __name__ == "__main__":
    main()
