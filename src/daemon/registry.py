"""All runs of this machine, and the one that is meant."""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from stoker import files
from stoker.config import UserError
from stoker.daemon.process import Process
from stoker.daemon.rundir import MANIFEST, RunDir, Status

GUIDES_NAME = re.compile(r"(?:\w+_)?(?:step_(\d+)|best)\.pt|\w+\.pt")
# A dangling link, a folder of something else, a name too long for a file.
NO_RUN = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def runs() -> list[RunDir]:
    """Every run in the project's result folder and in the machine's list, oldest first."""
    return look()[0]


def look() -> tuple[list[RunDir], dict[RunDir, str]]:
    """What `runs` returns, and a line for each other entry, which cannot be read."""
    created: dict[RunDir, float] = {}
    unreadable: dict[RunDir, str] = {}
    for folder in (files.results(), files.home() / "runs"):
        try:
            entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unreadable[RunDir(folder)] = why_not(RunDir(folder), error)
            continue
        for run in {_at(entry) for entry in entries} - created.keys():
            try:
                if status := _status(run):
                    created[run] = status.created
            except UserError as error:
                unreadable[run] = str(error)
    return sorted(created, key=lambda run: (created[run], run.name)), unreadable


def find(which: str) -> RunDir:
    """The run meant by a name, the link to the newest of a stage and data set, a unique prefix of a name, the PID of
    its trainer, or a path: its folder, or a snapshot in it. Raises UserError."""
    if not which:
        raise UserError("which run? give its name, the beginning of it, its PID or its folder; "
                        f"{files.hint('ps')} lists them")
    known, unreadable = look()
    which = as_guides_say(which)
    of_snapshot = [path.parents[1] for path in [snapshot(which)] if path]
    for path in (Path(which), files.results() / which, *of_snapshot):
        if there := at(path):
            return there
    if exact := [run for run in known if run.name == which]:
        return exact[-1]
    if which.isdecimal():
        return _of_process(int(which), known)
    for folder in dict.fromkeys(run.path.parent for run in reversed(known)):  # links in other folders than result/
        if linked := at(folder / which):
            return linked
    matching = [run for run in known if run.name.startswith(which)]
    if len(matching) == 1:
        return matching[0]
    if broken := [line for run, line in unreadable.items() if run.name == which]:
        raise UserError(*broken)
    if not matching:
        raise UserError(f"there is no run {which!r}; {files.hint('ps')} lists the {len(known)} there are, and the "
                        "folder of any other will do")
    raise UserError(f"{which!r} is the beginning of {len(matching)} runs: " + ", ".join(run.name for run in matching))


def at(path: Path) -> RunDir | None:
    """The run whose folder this is; None where it is none. Raises UserError where it cannot be read."""
    run = _at(path)
    return run if _status(run) else None


def as_guides_say(named: str) -> str:
    """What a path means that the guides have, DIR being the --checkpoint_dir of runs: DIR/step_2000.pt or
    DIR/thinker_step_2000.pt a snapshot; DIR/thinker_best.pt, DIR/thinker.pt and DIR the newest run. Any other is
    returned as it is. Raises UserError where no run in DIR has that snapshot."""
    given = Path(named)
    is_folder = os.path.isdir(named)  # False for a name that no file can have
    found = None if os.path.exists(named) else GUIDES_NAME.fullmatch(given.name)
    if not (is_folder or found and "/" in named) or at(given):
        return named
    made = _within(given.parent if found else given)
    if not made:
        return named
    if not (found and found[1]):
        return str(made[-1].path)
    folders = [run.snapshots / f"snapshot_step_{int(found[1]):08d}" for run in made]
    if there := [folder for folder in folders if os.path.isfile(folder / MANIFEST)]:
        return str(there[-1])
    raise UserError(f"{named}: no run in {given.parent} has a snapshot of step {int(found[1]):,} (any more): "
                    f"{files.hint('ps')} lists the runs; --keep_last_n_snapshots 0 keeps all snapshots")


def _within(folder: Path) -> list[RunDir]:
    """The runs in a result folder, oldest first."""
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return []
    return sorted((run for entry in entries if (run := at(entry))), key=lambda run: (run.status().created, run.name))


def snapshot(named: str) -> Path | None:
    """The snapshot meant by its folder, a file in it, the spelling `snapshot_epoch_10.pt`, or a name that the guides
    have; None if there is none."""
    given = Path(as_guides_say(named))
    kind, _, number = given.name.removesuffix(".pt").rpartition("_")
    respelled = [given.with_name(f"{kind}_{int(number):0{width}d}") for width in (4, 8)] if number.isdecimal() else []
    for path in (given, *([given.parent] if os.path.isfile(given) else []), *respelled):
        if os.path.isfile(path / MANIFEST):
            return path.resolve()
    return None


def newest_unfinished(stage: str, dataset: str | None, preset: str | None) -> RunDir:
    """The run that `--resume` without a value means. Raises UserError if there is none."""
    what = " ".join([stage, *(part for part in (dataset, preset) if part)])
    fitting = [
        run for run in runs()
        if (status := run.status()).stage == stage and status.state != "finished"
        and dataset in (None, status.dataset) and preset in (None, status.preset)
    ]
    waiting = [run for run in fitting if run.holder() is None]
    if waiting:
        return waiting[-1]
    if fitting:
        raise UserError(f"--resume: the unfinished run of {what} is being trained already: {fitting[-1].name}")
    raise UserError(f"--resume: there is no unfinished run of {what}; {files.hint('ps')} lists all runs; "
                    "leave --resume out to start a new one")


def link_newest(folder: Path, stage: str, dataset: str) -> None:
    """Let folder/<stage>_<dataset> point at the newest such run there, where one is left."""
    same = [run for run in runs() if run.path.parent == folder
            and (run.status().stage, run.status().dataset) == (stage, dataset)]
    if same:
        same[-1].announce(stage, dataset)


def newest_finished(stages: Sequence[str]) -> RunDir:
    """The newest finished run of one of these stages. Raises UserError if there is none."""
    finished = [run for run in runs() if (status := run.status()).stage in stages and status.state == "finished"]
    if not finished:
        raise UserError(f"there is no finished run of {' or '.join(stages)} to take weights from; name a run, a "
                        f"snapshot or a model folder; {files.hint('ps')} lists the runs")
    return finished[-1]


def taken_by(trainer: Process) -> RunDir | None:
    """The run that a process trains, or trained last. Start times are not compared, since a clock may be set back."""
    return next((run for run in reversed(runs()) if run.last_holder() == trainer), None)


def _of_process(pid: int, known: list[RunDir]) -> RunDir:
    """A PID means the run it trains, or watches, now; else the newest run it trained (PIDs are used again)."""
    for run in known:
        if pid in [living.pid for living in (run.holder(), run.supervisor()) if living]:
            return run
    if past := [run for run in known if run.status().pid == pid]:
        return past[-1]
    raise UserError(f"process {pid} trains no run; {files.hint('ps')} lists them")


def _at(path: Path) -> RunDir:
    return RunDir(Path(os.path.realpath(path)))  # `resolve` would fail at a link that leads to itself


def _status(run: RunDir) -> Status | None:
    """None where there is no run. Raises UserError where there is one whose status or lock cannot be read."""
    try:
        status = run.status()
        run.holder(), run.supervisor()  # they raise here if the lock cannot be read, not later
        return status
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_RUN:
            return None
        raise UserError(why_not(run, error)) from error


def why_not(run: RunDir, error: OSError | ValueError) -> str:
    """The line for a run that cannot be read: which, why, and what to do."""
    if not isinstance(error, OSError):
        return f"{run.status_file} cannot be read: it {error}; mend it, or move its folder away"
    advice = "its owner can allow it" if isinstance(error, PermissionError) else "mend it, or move its folder away"
    return f"{error.filename or run.path} cannot be read: {error.strerror}; {advice}"
