"""All runs of this machine, and the one that is meant."""

from collections.abc import Iterator
from pathlib import Path

import files
from config import UserError
from daemon.rundir import MANIFEST, RunDir, Status


def runs() -> list[RunDir]:
    """Every run in the project's result folder and in the machine's list, oldest first."""
    created = {run: status.created for run in _candidates() if (status := _status(run)) is not None}
    return sorted(created, key=lambda run: (created[run], run.name))


def find(which: str) -> RunDir:
    """The run meant by a name, a unique prefix of one, the PID of its trainer, or a path: its folder, or a snapshot in
    it. Raises UserError."""
    if not which:
        raise UserError("which run? give its name, the beginning of it, its PID or its folder; ./run/ps.sh lists them")
    known = runs()
    of_snapshot = [path.parents[1] for path in [snapshot(which)] if path]
    for path in (Path(which), files.results() / which, *of_snapshot):
        if _status(there := RunDir(path.resolve())) is not None:
            return there
    if exact := [run for run in known if run.name == which]:
        return exact[-1]
    if which.isdecimal():
        return _of_process(int(which), known)
    matching = [run for run in known if run.name.startswith(which)]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise UserError(f"there is no run {which!r}; ./run/ps.sh lists the {len(known)} there are, and the folder of "
                        "any other will do")
    raise UserError(f"{which!r} is the beginning of {len(matching)} runs: " + ", ".join(run.name for run in matching))


def snapshot(named: str) -> Path | None:
    """The snapshot meant by its folder, a file in it, or the spelling `snapshot_epoch_10.pt`; None if there is none."""
    given = Path(named)
    kind, _, number = given.name.removesuffix(".pt").rpartition("_")
    respelled = [given.with_name(f"{kind}_{int(number):0{width}d}") for width in (4, 8)] if number.isdecimal() else []
    for path in (given, *([given.parent] if given.is_file() else []), *respelled):
        if (path / MANIFEST).is_file():
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
    raise UserError(f"--resume: there is no unfinished run of {what}; ./run/ps.sh lists all runs; "
                    "leave --resume out to start a new one")


def newest_finished(stage: str) -> RunDir:
    """The run whose weights another begins with where none is named. Raises UserError if there is none."""
    finished = [run for run in runs() if (status := run.status()).stage == stage and status.state == "finished"]
    if not finished:
        raise UserError(f"there is no finished run of {stage} to take weights from; name a run, a snapshot or a model "
                        "folder; ./run/ps.sh lists the runs")
    return finished[-1]


def taken_by(pid: int, since: float) -> RunDir | None:
    """The run that a process has made or taken since then."""
    for run in reversed(runs()):
        status = _status(run)
        if status and status.pid == pid and max(status.created, status.started) >= since:
            return run
    return None


def _of_process(pid: int, known: list[RunDir]) -> RunDir:
    """A PID means the run it trains, or watches, now; else the newest run it trained (PIDs are used again)."""
    for run in known:
        if pid in [living.pid for living in (run.holder(), run.supervisor()) if living]:
            return run
    if past := [run for run in known if run.status().pid == pid]:
        return past[-1]
    raise UserError(f"process {pid} trains no run; ./run/ps.sh lists them")


def _candidates() -> Iterator[RunDir]:
    for folder in (files.results(), files.home() / "runs"):
        if folder.is_dir():
            yield from (RunDir(path.resolve()) for path in folder.iterdir() if not path.name.startswith("."))


def _status(run: RunDir) -> Status | None:
    try:
        return run.status()
    except (OSError, ValueError, TypeError):  # a dangling link, a folder of something else, another version's run
        return None
