"""A run's directory: the names of its files, its lock, its status. Nobody else spells them.

    result/<stage>_<dataset>_<preset>_<YYYYMMDD-HHMMSS>/
        run_config.json  status.json  run.lock  metrics.jsonl  timings.jsonl  alerts.jsonl  deaths.jsonl
        logs/train_<start>.log  logs/latest.log  snapshots/  models/  tensorboard/  samples/  incidents/
        requests/  trace_step_<N>.json  plots.png  wandb/
    result/<stage>_<dataset>     link to the newest such run

Holding the kernel's lock on run.lock *is* being the trainer: it ends with the process, however that ends.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from stoker import files
from stoker.config import UserError
from stoker.daemon import process, records
from stoker.daemon.process import Process

log = logging.getLogger(__name__)

PROJECT = files.PACKAGE.parent
MANIFEST = "manifest.json"  # of a snapshot: written last, so a folder that has one is whole
ACTIVE = ("preparing", "training", "evaluating")
RESTARTING = "restarting"  # its trainer died, its supervisor will start another
SECONDS_TO_LOCK = 2.0
NAME = re.compile(r"\w[\w.+=@,-]*")
STAGES = files.PACKAGE / "training"  # where the scripts of our own stages are
SCRIPT = re.compile(r"(train|sft)_\w+\.py")


@dataclass(frozen=True)
class Status:
    """What `ps.sh` shows of a run. `state` as written; see RunDir.state for what became of it since."""

    stage: str
    script: str  # by its name where it is one of ours, else its path; see script_of
    dataset: str
    preset: str
    state: str = "preparing"
    reason: str = ""
    pid: int = 0
    created: float = 0.0
    started: float = 0.0  # when the process of now, or the last, took it up
    heartbeat: float = 0.0  # the last sign of progress
    awake: float = 0.0  # the same by the clock that stands still while the machine sleeps (CLOCK_MONOTONIC)
    phase: str = ""  # what it is at; see daemon.pulse
    budget: float = 0.0  # seconds without a sign of progress that are usual there (0: not known)
    supervisor: dict[str, Any] | None = None  # the process that watches the trainer, if one does
    busy_seconds: float = 0.0  # that trainers of this run have lived, all together
    step: int = 0
    of: int = 0
    loss: float | None = None
    best: float | None = None
    best_metric: str = ""  # the metric of which `best` is the best value: "wer"
    best_mode: str = ""  # "min" or "max"
    speed: str = ""
    eta_seconds: float | None = None
    device: str = ""
    expected_seconds: float | None = None  # of the whole run, as estimated before it began
    switched_off: list[str] = field(default_factory=list)
    typed: dict[str, Any] = field(default_factory=dict)  # the options given at the start, before any was adjusted
    origin: str = ""  # the snapshot of another run that this one continues from


class Gone(BaseException):
    """The folder of a run is not in its place any more while it is trained. No Exception, so that the guard
    around monitors does not take it for the failure of one."""


@dataclass(frozen=True)
class RunDir:
    path: Path  # without links in it

    @property
    def name(self) -> str:
        return self.path.name

    config_file = property(lambda self: self.path / "run_config.json")
    estimate = property(lambda self: self.path / "estimate.json")
    status_file = property(lambda self: self.path / "status.json")
    lock_file = property(lambda self: self.path / "run.lock")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    timings = property(lambda self: self.path / "timings.jsonl")
    alerts = property(lambda self: self.path / "alerts.jsonl")
    deaths = property(lambda self: self.path / "deaths.jsonl")
    snapshots = property(lambda self: self.path / "snapshots")
    models = property(lambda self: self.path / "models")
    tensorboard = property(lambda self: self.path / "tensorboard")
    samples = property(lambda self: self.path / "samples")
    incidents = property(lambda self: self.path / "incidents")
    requests = property(lambda self: self.path / "requests")
    plots = property(lambda self: self.path / "plots.png")
    latest_log = property(lambda self: self.path / "logs" / "latest.log")

    # -- status -----------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """As written last; if a power cut has destroyed it, rebuilt from the config and the newest snapshot.
        Raises OSError or ValueError where there is no readable status of this version."""
        try:
            return records.read(self.status_file, Status)
        except (FileNotFoundError, ValueError):
            if rebuilt := self._rebuilt_status():
                return rebuilt
            raise

    def _rebuilt_status(self) -> Status | None:
        """None where there is no snapshot, or no config."""
        try:
            path, newest = max(self.manifests(), key=lambda found: int(found[1]["step"]))
            config, made_by = records.load(self.config_file), newest["made_by"]
            return records.build(Status, {
                "stage": made_by["stage"], "script": made_by.get("script", f"train_{made_by['stage']}.py"),
                "dataset": config["dataset"], "preset": "", "state": "training", "step": newest["step"],
                "of": made_by["config"]["max_steps"],
                "reason": f"{self.status_file.name} was lost, as in a power cut: this is what {path.parent.name} says",
                "created": self.config_file.stat().st_mtime, "heartbeat": path.stat().st_mtime,
                "device": made_by["device"]})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Path and content of each snapshot's manifest that can be read. They are not verified."""
        for path in self.snapshots.glob(f"snapshot_*/{MANIFEST}"):
            with suppress(OSError, ValueError):  # damaged: a resume from it reports that
                manifest = records.load(path)
                if isinstance(manifest, dict) and isinstance(manifest.get("step"), int):
                    yield path, manifest

    def write_status(self, status: Status) -> None:
        """Replace the status, so that a reader sees the old one or the new one, never half of one. Synced where the
        state changes, so that a power cut does not lose how a run ended."""
        now = replace(status, heartbeat=time.time(), awake=time.monotonic())
        content = json.dumps(asdict(now), indent=2) + "\n"
        try:
            files.write(self.status_file, content, sync=now.state != self._written_state())
        except OSError as error:
            if not (files.may_pass(error) and self.status_file.exists()):
                raise
            files.overwrite(self.status_file, content)  # on a full disk there is no room for a second file

    def _written_state(self) -> str:
        try:
            return records.read(self.status_file, Status).state
        except (OSError, ValueError):
            return ""

    def state(self) -> str:
        """The state now: "died", "paused" and "stalled" are never written, they are seen from outside."""
        status, holder = self.status(), self.holder()
        if holder is None and status.state in ACTIVE:
            status = self.status()  # it may have ended between the two looks
            return "died" if status.state in ACTIVE else status.state
        if holder is None:
            return "died" if status.state == RESTARTING and not self.supervisor() else status.state
        if process.is_paused(holder.pid):
            return "paused"
        stalled = status.state in ACTIVE and 0 < status.budget < self.silent_seconds(status)
        return "stalled" if stalled else status.state

    def silent_seconds(self, status: Status) -> float:
        """Since the last sign of progress of a living trainer; neither sleep nor a pause counts.

        The status file's own time is that of a sign which a full disk did not take; the lock's, of the last SIGCONT.
        """
        touched: float = max(path.stat().st_mtime for path in (self.status_file, self.lock_file))
        return max(0.0, min(time.monotonic() - status.awake, time.time() - touched))

    def note_continued(self) -> None:
        """The trainer goes on after a pause: its silence counts from now."""
        with suppress(OSError):
            os.utime(self.lock_file)

    def supervisor(self) -> Process | None:
        """The process that watches the trainer of now, or of last, if it lives."""
        noted = self.status().supervisor
        watching = records.build(Process, noted) if noted else None
        return watching if watching and process.find(watching.pid) == watching else None

    def doubt(self, found: Process) -> str:
        """Why a process must not be signalled as the trainer or the supervisor of this run; '' where it may be.

        The files alone prove nothing: they may have been written in another container, whose PIDs mean other processes
        here, or by somebody who wants a process of yours to end. A trainer and a supervisor both have the lock file
        open for writing, and belong to the owner of the folder.
        """
        if process.find(found.pid) != found:
            return (f"its files name process {found.pid}, which does not exist here: stop it in the container, or "
                    "on the machine, where it was started")
        if process.owner(found.pid) != self.path.stat().st_uid:
            return (f"its files name process {found.pid}, which is not of the user who owns {self.path}: see "
                    f"ps -p {found.pid}")
        if not process.writes(found.pid, self.lock_file):
            return (f"its files name process {found.pid}, which does not hold {self.lock_file}, so it is another "
                    f"program: see ps -p {found.pid}")
        return ""

    # -- lock -------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, *, record_holder: bool = True) -> Iterator[None]:
        """Be the one trainer of this run while the block runs. Without `record_holder` the lock file still names the
        last trainer: a supervisor writes the status of one that died. Raises UserError if somebody else trains it."""
        with open(str(self.lock_file), "a+") as file:
            self._acquire(file)
            try:
                if record_holder:
                    file.truncate(0)
                    file.write(json.dumps(process.me().to_json()))
                    file.flush()
                _closed_in_children.append(file)
                yield
            finally:
                if file in _closed_in_children:
                    _closed_in_children.remove(file)

    def _acquire(self, file: IO[str]) -> None:
        """`ps.sh` holds the lock for an instant when it looks: hence the patience."""
        deadline = time.monotonic() + SECONDS_TO_LOCK
        while not self._try_lock_or_warn(file):
            if time.monotonic() > deadline:
                holder = self.holder()
                raise UserError(f"run {self.name} is being trained already, by process "
                                f"{holder.pid if holder else '?'}; stop it first: {files.hint('stop ' + self.name)}")
            time.sleep(0.05)

    def _try_lock_or_warn(self, file: IO[str]) -> bool:
        try:
            return _try_lock(file, fcntl.LOCK_EX)
        except _NoLocks:
            log.warning("%s is on a file system without locks: see to it that nobody else trains this run", self.path)
            return True

    def holder(self) -> Process | None:
        """The process that trains this run now. Raises OSError where its lock cannot be read."""
        try:
            with files.opened(self.lock_file) as file:
                if _try_lock(file, fcntl.LOCK_SH):
                    return None
        except FileNotFoundError:
            return None
        except _NoLocks:  # then what is written there must do: that process, if it lives
            written = self.last_holder()
            return written if written and process.find(written.pid) == written else None
        return self.last_holder()

    def where_now(self) -> "RunDir | None":
        """Where the folder of this run is now, for the process that holds its lock: here, or where it was moved; None
        if the folder or its lock file was deleted or replaced."""
        for file in _closed_in_children:
            if file.name == str(self.lock_file) and not _is_still(file, self.lock_file):
                there = RunDir(Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).parent)
                return there if _is_still(file, there.lock_file) else None
        return self

    def last_holder(self) -> Process | None:
        """The process that trains this run now, or did last, alive or not. Raises OSError as `holder` does."""
        try:
            return records.read(self.lock_file, Process)
        except (FileNotFoundError, ValueError):  # no run yet, or its lock taken this very moment
            return None

    # -- files ------------------------------------------------------------------------------------------------------

    def new_log(self) -> Path:
        """A new log for this start of the run; logs/latest.log points at it."""
        folder = self.path / "logs"
        folder.mkdir(exist_ok=True)
        log = _unused(folder, f"train_{time.strftime('%Y%m%d-%H%M%S')}", ".log")
        log.touch(exist_ok=False)
        _link(folder / "latest.log", log.name)
        return log

    def remove_log(self, log: Path) -> None:
        """Take back a log; logs/latest.log points at the one before."""
        log.unlink()
        if before := sorted(log.parent.glob("train_*.log")):
            _link(self.latest_log, before[-1].name)

    def announce(self, stage: str, dataset: str) -> None:
        """Let result/<stage>_<dataset> point at this run, unless it points at a newer one, or a run was given that very
        name. In another --result_dir (--checkpoint_dir) training.log points at its log, as the guides have it."""
        link = self.path.parent / f"{stage}_{slug(dataset)}"
        if link.is_symlink() or not link.exists():
            with suppress(OSError, ValueError, RuntimeError):  # no link yet, or one to nothing, or to itself
                if RunDir(link.resolve(strict=True)).status().created > self.status().created:
                    return
            _link(link, self.name)
        elif link != self.path:
            log.warning("%s is a run of that name, so no link of that name can point at this run", link)
        guides = self.path.parent / "training.log"
        if self.path.parent != files.results() and (guides.is_symlink() or not guides.exists()):
            _link(guides, f"{self.name}/logs/latest.log")

    @property
    def _entry(self) -> Path:
        """The link in the machine's list. The digits keep runs of one name in two result folders apart."""
        return files.home() / "runs" / f"{self.name}-{hashlib.sha256(bytes(self.path)).hexdigest()[:8]}"

    def list_here(self) -> None:
        """Note the run in the machine's list, so that it is found whatever its --result_dir."""
        self._entry.parent.mkdir(parents=True, exist_ok=True)
        _link(self._entry, str(self.path))

    def is_made_here(self) -> bool:
        """Whether this user made the run, on this machine, in the folder where it is now."""
        return os.path.realpath(self._entry) == str(self.path) and self.path.stat().st_uid == os.geteuid()

    def script(self) -> Path:
        """The script that trains this run. Raises UserError where its status names none that may be started.

        One from outside the package is started only for a run that this user made here: anybody may have written the
        status of another, with a program of theirs in it.
        """
        named = self.status().script
        if SCRIPT.fullmatch(named) and (STAGES / named).is_file():
            return STAGES / named
        start = files.hint(f"start SCRIPT --resume {self.name}")
        if not Path(named).is_absolute():
            raise UserError(f"{self.status_file} names {named!r} as its script, which is neither a script of "
                            f"{STAGES} nor a path: correct it, or name the script yourself: {start}")
        if not self.is_made_here():
            raise UserError(f"{self.path} was made elsewhere, or by another user, and its script {named} is not one of "
                            f"{STAGES}: if you trust a script, name it yourself: {start}")
        if not Path(named).is_file():
            raise UserError(f"the script of {self.name} is not found: {named}; where it is now, name it: {start}")
        return Path(named)

    def remove(self) -> None:
        """Delete the run and every link to it, or into it."""
        here = os.path.realpath(self.path)
        for link in [*self.path.parent.glob("*"), *(files.home() / "runs").glob("*")]:
            if link.is_symlink() and Path(os.path.realpath(link)).is_relative_to(here):
                link.unlink()
        shutil.rmtree(self.path)


def create(result_dir: Path, name: str, status: Status, *, exact: bool = False,
           fill: Callable[["RunDir"], None] = lambda run: None) -> RunDir:
    """Make the directory of a new run, with status and config, under `name` or, unless `exact`, if that is taken, the
    like of it; `fill` writes whatever else it begins with.

    It gets its name last, so no run is ever met without its status. Raises UserError if it cannot be written; then
    nothing is left of it.
    """
    hidden = RunDir(result_dir / f".{name}.{uuid.uuid4().hex}.stoker-tmp")
    try:
        result_dir.mkdir(parents=True, exist_ok=True)
        for folder in ("logs", "snapshots", "models", "tensorboard", "samples", "incidents", "requests"):
            (hidden.path / folder).mkdir(parents=True)
        files.write_json(hidden.config_file, status.typed)
        hidden.lock_file.touch()
        fill(hidden)
        hidden.write_status(replace(status, created=time.time(), pid=os.getpid()))
        run = RunDir(_named(hidden.path, name, exact).resolve())
    except BaseException as error:
        shutil.rmtree(hidden.path, ignore_errors=True)
        if not isinstance(error, OSError):  # a stop that came just now
            raise
        raise _unwritable(f"--result_dir {result_dir}", error) from error
    try:
        run.list_here()
    except OSError as error:
        run.remove()
        raise _unwritable(f"STOKER_HOME {files.home()}", error) from error
    return run


def script_of(program: str) -> str:
    """A stage's script as a status names it: one of ours by its name, since the checkout may be moved, any other by its
    absolute path."""
    path = Path(program).resolve()
    return path.name if path.parent == STAGES else str(path)


def _unwritable(what: str, error: OSError) -> UserError:
    return UserError(f"{what}: no run can be written there: {error.strerror}; name another folder")


def run_name(stage: str, dataset: str, preset: str) -> str:
    return "_".join(part for part in (stage, slug(dataset), preset, time.strftime("%Y%m%d-%H%M%S")) if part)


def name_problem(name: str) -> str:
    """Why a run cannot have this name, or ''. Every command of run/ finds a run by a name that is allowed: none takes
    it for an option, a PID, a path or several words, and no terminal takes it for a command."""
    if name.isdigit() or name == "newest":
        return "means a PID" if name.isdigit() else "means the newest run"
    return "" if NAME.fullmatch(name) else ("must begin with a letter, a digit or '_', and hold only these and any of "
                                            ". + = @ , -")


def slug(dataset: str) -> str:
    """The name of a run's data, as part of the run's name: a path's last part without its ending."""
    base = Path(dataset).name
    stem = Path(base).stem if "/" in dataset or Path(base).suffix in (".txt", ".md", ".csv", ".json") else base
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "data"


def _named(hidden: Path, name: str, exact: bool) -> Path:
    """Rename a folder to a name not taken yet: two starts at the same time get two. Raises UserError where it must be
    this one."""
    while True:
        path = _unused(hidden.parent, name)
        if exact and path.name != name:
            raise UserError(f"run {name} was started by somebody else this moment: start again, to go on with it")
        try:
            return hidden.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another start was faster
                raise


def _unused(folder: Path, stem: str, ending: str = "") -> Path:
    path, number = folder / f"{stem}{ending}", 2
    while os.path.lexists(path):
        path, number = folder / f"{stem}-{number}{ending}", number + 1
    return path


def _link(link: Path, target: str) -> None:
    """Point a symbolic link at `target`, replacing an older one in one move."""
    hidden = files.hidden(link)
    hidden.unlink(missing_ok=True)
    hidden.symlink_to(target)
    hidden.replace(link)


# -- the kernel's lock ----------------------------------------------------------------------------------------------

_closed_in_children: list[IO[str]] = []


def _close_inherited() -> None:
    """A forked child closes the lock's descriptor. Unlocking it there would free the parent's lock."""
    for file in _closed_in_children:
        file.close()
    _closed_in_children.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _is_still(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a network file system that does not answer this time
        return True


class _NoLocks(Exception):
    """The file system has no working locks (some network file systems)."""


def _try_lock(file: IO[Any], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise _NoLocks from error
        raise
