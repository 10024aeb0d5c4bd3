"""What the scripts in run/ ask about runs and do to them: list, find, wait for the start, ask, stop, delete."""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from stoker import files
from stoker.command import answered
from stoker.config import UserError, complain, printable
from stoker.daemon import inbox, process, registry
from stoker.daemon.journal import plain
from stoker.daemon.process import Process
from stoker.daemon.rundir import RunDir
from stoker.daemon.table import row, table

SECONDS_BETWEEN_LOOKS = 0.2


def main() -> int:
    return answered(call)


def call(words: Sequence[str]) -> int:
    given = _parser().parse_args(words)
    try:
        return int(given.call(given))
    except PermissionError as error:
        raise UserError(f"{error.strerror}: that belongs to another user") from error


def _parser() -> "_Parser":
    parser = _Parser(prog="stoker", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ps = commands.add_parser("ps", help="one line a run")
    ps.add_argument("run", nargs="?", default="", help="only this run")
    ps.add_argument("--json", action="store_true", help="one JSON object a run and line")
    ps.add_argument("--watch", action="store_true", help="again every two seconds, until Ctrl-C")
    ps.set_defaults(call=lambda given: _ps(given.run, given.json, given.watch))

    stop = commands.add_parser("stop", help="save and stop")
    stop.add_argument("run", help="name, beginning of a name, PID or folder of a run")
    stop.add_argument("--seconds", type=float, default=300, help="how long to wait for it (default: 300)")
    stop.set_defaults(call=lambda given: _stop(given.run, given.seconds))

    ask = commands.add_parser("ask", help="ask a running trainer for something")
    ask.add_argument("run", help="name, beginning of a name, PID or folder of a run")
    ask.add_argument("what", choices=tuple(inbox.KNOWN))
    ask.set_defaults(call=lambda given: _ask(given.run, given.what))

    delete = commands.add_parser("delete", help="delete a run that is not running")
    delete.add_argument("run")
    delete.add_argument("--yes", "-y", action="store_true", help="do not ask")
    delete.set_defaults(call=lambda given: _delete(given.run, given.yes))

    fact = commands.add_parser("print", help="print one thing that a run's files or status say")
    fact.add_argument("run")
    fact.add_argument("what", choices=("name", "script", "log", "pid", "folder", "resume"))
    fact.set_defaults(call=lambda given: _print(given.run, given.what))

    board = commands.add_parser("board", help="print a folder with the curves of a run, or of all, for TensorBoard")
    board.add_argument("run", nargs="?", default="")
    board.set_defaults(call=lambda given: print(curves(given.run)) or 0)

    wait = commands.add_parser("wait", help="wait until a run just started trains or has ended")
    wait.add_argument("pid", type=int)
    wait.set_defaults(call=lambda given: wait_for(given.pid))
    return parser


class _Parser(argparse.ArgumentParser):
    """Prints a mistake in one line, without the usage, as our other programs do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


# -- ps -----------------------------------------------------------------------------------------------------------


def _ps(which: str, as_json: bool, watch: bool) -> int:
    while True:
        runs, broken = ([registry.find(which)], {}) if which else registry.look()
        unreadable = [*broken.values()]
        rows = list(_rows(runs, unreadable))
        page = "".join(json.dumps(plain(row)) + "\n" for row in rows) if as_json else table(rows) + "\n"
        if watch and sys.stdout.isatty():
            print("\033[H\033[2J", end="")  # home, clear
        print(page, end="", flush=True)
        complain(unreadable)
        if not watch:
            return 0
        time.sleep(2)


def _rows(runs: list[RunDir], unreadable: list[str]) -> Iterator[dict[str, Any]]:
    for run in runs:
        try:
            yield row(run)
        except FileNotFoundError:  # deleted since it was found
            pass
        except (OSError, ValueError) as error:
            unreadable.append(registry.why_not(run, error))


# -- stop ---------------------------------------------------------------------------------------------------------


def _stop(which: str, seconds: float) -> int:
    run = registry.find(which)
    doubts = {found: run.doubt(found) for found in (run.supervisor(), run.holder()) if found}
    ours = [found for found, doubt in doubts.items() if not doubt]
    if doubts and not ours and (run.holder() or run.supervisor()):  # else they have ended by themselves this moment
        raise UserError(f"{run.name} was not stopped: {[*doubts.values()][-1]}")
    if not ours:
        _say(f"{run.name} is not running: {run.state()}")
        return 0
    for found in ours:
        if process.is_paused(found.pid):
            _say(f"{run.name} is paused; it continues, to save and stop")
            os.kill(found.pid, signal.SIGCONT)
    with suppress(ProcessLookupError):  # it has ended by itself this moment
        os.kill(ours[0].pid, signal.SIGTERM)  # a supervisor passes it on to its trainer, and starts no other
    if not _until(lambda: all(process.find(found.pid) != found for found in ours), seconds):  # its memory is free
        pid = ours[-1].pid
        raise UserError(f"process {pid} of {run.name} has not stopped in {seconds:g} s: wait, or end it with "
                        f"kill -9 {pid}; then what came after its last snapshot is lost")
    status = run.status()
    _say(f"{run.name}: {run.state()} at step {status.step} of {status.of or '?'}: {status.reason}")
    if status.state != "finished":
        _say(f"Resume: {files.hint('resume ' + run.name)}")
    return 0


def _until(holds: "object", seconds: float) -> bool:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return True


# -- ask ----------------------------------------------------------------------------------------------------------


def _ask(which: str, what: str) -> int:
    run = registry.find(which)
    if not (run.holder() or run.supervisor()):
        raise UserError(f"{run.name} is not running ({run.state()}), so nobody would obey: resume it first: "
                        f"./run/resume.sh {run.name}")
    try:
        inbox.ask(run.requests, what)
    except OSError as error:
        raise UserError(f"{run.requests / what} cannot be written: {error.strerror}") from error
    _say(f"{run.name} was asked for {inbox.KNOWN[what]}; its log shows when it is done: ./run/logs.sh {run.name} -f")
    return 0


# -- delete -------------------------------------------------------------------------------------------------------


def _delete(which: str, sure: bool) -> int:
    run = registry.find(which)
    if problem := _not_deletable(run, [Path(which), files.results() / which]):
        raise UserError(f"nothing was deleted: {problem}")
    if not sure and not _yes(f"Delete {run.path} ({run.state()}, step {run.status().step})? [y/N] "):
        raise UserError("nothing was deleted")
    status = run.status()
    with run.lock():  # whoever does not hold it never deletes a run
        run.remove()
    registry.link_newest(run.path.parent, status.stage, status.dataset)
    _say(f"Deleted {run.path}")
    return 0


def _not_deletable(run: RunDir, named: list[Path]) -> str:
    """Why a run must not be deleted, or ''. `named`: the folders that were meant by its name."""
    if registry.snapshot(str(named[0])) or registry.as_guides_say(str(named[0])) != str(named[0]):
        return f"{named[0]} is not the folder of a run: delete.sh deletes whole runs, such as {run.path}"
    links = [path for path in named if path.is_symlink() and os.path.realpath(path) == str(run.path)]
    if elsewhere := [link for link in links if link.parent.resolve() != run.path.parent]:
        return f"{elsewhere[0]} is a link to {run.path}, which is elsewhere: name that folder if you mean it"
    if lacking := [file.name for file in (run.lock_file, run.config_file) if not file.is_file() or file.is_symlink()]:
        return f"{run.path} has no {lacking[0]}, so it may not be a run: delete it by hand if you are sure"
    if watching := run.supervisor():
        return (f"run {run.name} is watched by process {watching.pid}, which starts it again; stop it first: "
                f"{files.hint('stop ' + run.name)}")
    return ""


def _yes(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError("to delete without a terminal to ask on, add --yes")
    try:
        return input(printable(question)).strip().lower() in ("y", "yes")
    except EOFError:
        return False


# -- print --------------------------------------------------------------------------------------------------------


def _print(which: str, what: str) -> int:
    """Print one fact for a script, with its control characters; `pid` only if that process exists here."""
    run = registry.find(which)
    holder = run.holder()
    print({"name": run.name, "script": run.script() if what == "script" else "", "log": run.latest_log,
           "pid": holder.pid if holder and process.find(holder.pid) == holder else "", "folder": run.path,
           "resume": registry.snapshot(which) or run.path}[what])
    return 0


def curves(which: str) -> Path:
    """A folder with the curves of a run, or of all. TensorBoard calls a run by its folder's name: hence a folder of
    links. Runs of one name are called by their paths."""
    runs = [registry.find(which)] if which else registry.runs()
    names = Counter(run.name for run in runs)
    folder = files.home() / "board" / (runs[0].name if which else "all runs")
    with files.locked(folder.with_name(".lock")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for run in runs:
            link = folder / (run.name if names[run.name] == 1 else str(run.path).lstrip("/"))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(run.tensorboard)
    return folder


# -- wait ---------------------------------------------------------------------------------------------------------


def wait_for(pid: int) -> int:
    """Show the log of what the new process starts until its first step is done (0) or it has ended (1)."""
    started = process.find(pid)
    run: RunDir | None = None
    log, shown = Path(), 0
    try:
        while True:
            alive = started is not None and process.find(pid) == started
            try:
                run = run or (_run_of(started) if started else None)
                if run is not None:
                    if log != (newest := run.latest_log.resolve()):  # a supervisor has started another trainer
                        log, shown = newest, 0
                    shown = _show(log, shown)
                    if alive and run.state() == "training":
                        _show(log, shown)  # what came between the two looks
                        return _summary(run)
            except FileNotFoundError:  # a run that is refused takes its directory with it
                run = None
            if not alive:
                return 1
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        print(f"\nNot waiting any longer; process {pid} goes on in the background: {files.hint('ps')}",
              file=sys.stderr)
        return 0


def _run_of(started: Process) -> RunDir | None:
    """The run that this process, or one that it supervises, has just made or taken."""
    for run in reversed(registry.runs()):
        holder, watching = run.holder(), run.supervisor()
        if holder and started in (holder, watching):
            if holder.pid == run.status().pid and run.latest_log.exists():
                return run  # of a run that goes on, the status is old until its new log is there
    return None


def _show(log: Path, shown: int) -> int:
    """Print what was added to a log since the last look; returns how much was shown."""
    with open(log, "rb") as file:
        file.seek(shown)
        whole, newline, _ = file.read().rpartition(b"\n")
    _say(*(whole + newline).decode(errors="replace").splitlines())
    return shown + len(whole + newline)


def _summary(run: RunDir) -> int:
    watching = run.supervisor()
    _say("",
         f"Run     {run.name}",
         f"PID     {run.status().pid}{f' (supervisor {watching.pid})' if watching else ''}",
         f"Log     {run.latest_log.resolve()}",
         "",
         f"Follow  {files.hint(f'logs {run.name} -f')}",
         f"Check   {files.hint('ps')}",
         f"Stop    {files.hint('stop ' + run.name)}",
         f"View    {files.hint('board ' + run.name)}")
    return 0


def _say(*lines: str) -> None:
    """Print lines for people."""
    print(*map(printable, lines), sep="\n", end="\n" if lines else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
