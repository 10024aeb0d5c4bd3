"""From a command line to an exit code: what every stage's script does when it is run.

    0    finished, stopped early, or stopped by request
    1    failed after the start: the run stays, with its log
    2    a user's mistake: nothing is started, nothing is left behind
    75   stopped and can be resumed (EX_TEMPFAIL)

Nothing here imports torch until the run is about to begin, so mistakes are reported at once.
"""

import faulthandler
import importlib.util
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker import command, config, files, progress
from stoker.config import Parsed, UserError
from stoker.daemon import deaths, logs, process, pulse, records, registry, rundir
from stoker.daemon.process import Process
from stoker.daemon.rundir import Gone, RunDir, Status
from stoker.daemon.supervisor import SUPERVISOR, Supervisor
from stoker.daemon.table import duration
from stoker.environment import folder as environment
from stoker.training.assembly import fork, pages, plugins
from stoker.training.assembly.fork import LONGEST_NAME
from stoker.training.assembly.job import Job
from stoker.training.core import outside, pretrained
from stoker.training.core.ending import Ending
from stoker.training.core.options import Options, here, working_in
from stoker.training.core.signals import STOPS, Interrupted, Signals
from stoker.training.core.stage import Stage
from stoker.training.core.transcripts import Transcribing

log = logging.getLogger(__name__)

FINISHED, FAILED, REFUSED, RESUMABLE = 0, 1, 2, 75


def main(stage: type[Stage]) -> None:
    """Run a stage's script; does not return."""
    code = command.answered(lambda words: _main(stage, [*words]))
    for number in STOPS:  # all is done but Python's own end, which may take a while
        signal.signal(number, lambda *_: os._exit(code))
    sys.exit(code)


def _main(stage: type[Stage], argv: list[str]) -> int:
    outside.check_declared(stage)
    if page := pages.asked(stage, argv):
        if "--info" in argv:
            environment.restart_inside()
            logs.to_console()  # to read the data and to measure may take minutes
        print(page(), flush=True)
        return FINISHED
    only_check = "--check" in argv
    # --foreground is a flag of the wrappers: a stage's script trains in its terminal in any case
    argv = [word for word in argv if word not in ("--check", "--foreground")]
    job = decide(stage, argv)
    if not only_check:
        environment.restart_inside()
    if job.asks:
        _confirm(job)
    if only_check:
        return FINISHED
    if job.evaluated is None and job.cfg.supervise and SUPERVISOR not in os.environ:
        return _supervise(job, argv)
    if (folder := job.cfg.working_folder) and Path(folder).is_dir():
        os.chdir(folder)
    return start(job) if job.evaluated is None else _evaluate(job)


# -- which run ------------------------------------------------------------------------------------------------------


def decide(stage: type[Stage], argv: Sequence[str]) -> Job:
    """A new run, or the one to resume. Raises UserError with every mistake that can be seen before the start."""
    parsed: Parsed[Any] = pages.parse(stage, argv, lambda cfg: _problems(stage, cfg))
    cfg: Options = parsed.config
    cfg = replace(cfg, callback=plugins.absolute(cfg.callback), working_folder=cfg.working_folder or here())
    parsed = replace(parsed, config=cfg)
    if cfg.eval_only:
        return _evaluation(stage, parsed)
    if cfg.resume:
        return _resumed(stage, parsed, *_named_by_resume(stage, parsed))
    if run := _named_run(cfg):
        return _resumed(stage, parsed, run, None)
    parsed, notes = pages.resolve_config(stage, parsed)
    if problems := pretrained.part_problems(stage(parsed.config, Path())):
        raise UserError(*problems)
    return Job(stage, replace(parsed, typed=parsed.typed | {"working_folder"}), notes=tuple(notes))


def _named_run(cfg: Options) -> RunDir | None:
    """The run that --run_name names, where there is one."""
    return registry.at(_result_dir(cfg) / cfg.run_name) if cfg.run_name else None


def _problems(stage: type[Stage], cfg: Options) -> list[str]:
    """Mistakes in what the options point at. A resumed run has its own data."""
    sources = [f"--{name}" for name in ("resume", "init_from") if getattr(cfg, name)]
    if len(sources) > 1:
        return [f"{' and '.join(sources)}: --resume (--checkpoint_file) resumes a run, --init_from starts a new "
                "one from its weights; give one of them"]
    if cfg.eval_only and not sources:
        return ["--eval_only: of which weights? name a run, a snapshot or a model folder with --init_from"]
    if cfg.confusions and not issubclass(stage, Transcribing):
        return [f"--confusions: a model of stage {stage.name} writes down no texts: leave it out"]
    if problems := _run_name_problems(cfg):
        return problems
    if cfg.resume or _named_run(cfg):
        return []
    if cfg.extend_steps and not cfg.eval_only:
        return [f"--extend_steps {cfg.extend_steps} is for a run that is resumed: add --resume RUN, or leave it out"]
    if cfg.working_folder and not Path(cfg.working_folder).is_dir():
        return [f"--working_folder {cfg.working_folder}: there is no such folder"]
    problems = plugins.problems(cfg.callback)
    if cfg.skip_rows and not Path(cfg.skip_rows).exists():
        problems.append(f"--skip_rows {cfg.skip_rows}: not found; name the incident.json of a run, such as "
                        "result/RUN/incidents/step_00000500/incident.json")
    with working_in(cfg.working_folder):
        return problems + stage.check(cfg, resumed=False) + _missing_packages(cfg)


def _missing_packages(cfg: Options) -> list[str]:
    """Extras that an option needs. Where nothing is set up yet nothing is missed: the start itself asks again."""
    if cfg.use_wandb and importlib.util.find_spec("torch") and not importlib.util.find_spec("wandb"):
        return ["--use_wandb: the package wandb is not installed; install it, or leave --use_wandb out: "
                f"{sys.executable} -m pip install --editable '{rundir.PROJECT}[wandb]'"]
    return []


def _run_name_problems(cfg: Options) -> list[str]:
    if "/" in cfg.run_name or cfg.run_name.startswith("."):
        return [f"--run_name {cfg.run_name!r} must be a name, not a path; --result_dir says where"]
    if len(cfg.run_name.encode()) > LONGEST_NAME:
        return [f"--run_name is {len(cfg.run_name.encode())} bytes long: at most {LONGEST_NAME}"]
    if cfg.run_name and not _named_run(cfg) and (why := rundir.name_problem(cfg.run_name)):
        return [f"--run_name {cfg.run_name!r} {why}: choose another name"]
    if cfg.run_name and (_result_dir(cfg) / cfg.run_name).is_symlink():
        return [f"--run_name {cfg.run_name} is the link to the newest run of its kind: choose another name"]
    if cfg.run_name and (_result_dir(cfg) / cfg.run_name).exists() and not _named_run(cfg):
        return [f"--run_name {cfg.run_name}: {_result_dir(cfg) / cfg.run_name} is there, and is no run: choose another "
                "name"]
    return []


def _named_by_resume(stage: type[Stage], parsed: Parsed[Any]) -> tuple[RunDir, Path | None]:
    """The run and, if one was named, the snapshot that --resume means."""
    cfg = parsed.config
    if cfg.resume == "newest":
        dataset = cfg.dataset if "dataset" in parsed.typed else None
        return registry.newest_unfinished(stage.name, dataset, parsed.preset or None), None
    if snapshot := registry.snapshot(cfg.resume):
        run = registry.at(snapshot.parents[1])
        if run is None:
            raise UserError(f"--resume {cfg.resume} is a snapshot, but not within a run: --init_from {cfg.resume} "
                            "takes its weights")
        return run, snapshot
    if Path(cfg.resume).suffix == ".pt" or Path(cfg.resume).parent.name == "snapshots":
        raise UserError(f"--resume (--checkpoint_file) {cfg.resume}: no snapshot there; a snapshot is a folder with a "
                        "manifest.json, such as result/RUN/snapshots/snapshot_epoch_0010")
    return registry.find(cfg.resume), None


def _resumed(stage: type[Stage], parsed: Parsed[Any], run: RunDir, snapshot: Path | None) -> Job:
    """The run's own config, with the harmless differences typed now. Raises UserError for the others."""
    status, more = run.status(), parsed.config.extend_steps
    if status.stage != stage.name:
        raise UserError(f"--resume: {run.name} is a run of {status.script}, not of this script")
    forks = snapshot is not None and fork.has_newer(snapshot)
    if problems := _fork_problems(parsed.config) if forks else _resume_problems(parsed.config, run, status):
        raise UserError(*problems)
    if parsed.preset and parsed.preset != status.preset:
        raise UserError(f"--preset {parsed.preset}: {run.name} has preset {status.preset or 'none'}; leave it out")
    written = _written_config(run)  # all options once it has begun, before that the typed ones
    before: Options = config.from_json(stage.Config, {**stage.presets.get(status.preset, {}), **written},
                                       str(run.config_file))
    changed = _options_typed_now(stage, parsed, run, status, before)
    cfg = replace(before, **changed)
    if forks:
        typed = parsed.config
        cfg = replace(cfg, run_name=typed.run_name, result_dir=str(_result_dir(typed)) if typed.result_dir else "")
    if more:
        if not status.of:
            raise UserError(f"--extend_steps: {run.name} has not begun, so there is no plan to extend: leave it out")
        cfg = replace(cfg, max_steps=status.of + more)
        written.pop("epochs")  # the steps alone say how long
    with working_in(cfg.working_folder):
        problems = stage.check(cfg, resumed=True) + _missing_packages(cfg)
    allowed = changed.keys() if not run.is_made_here() else vars(cfg)
    for option, does in (("on_end", "run a command when it ends"), ("callback", "run code of its own")):
        if (value := getattr(cfg, option)) and option not in allowed:
            problems.append(f"{run.path} was made elsewhere, or by another user, and would {does}: to allow it, type "
                            f"it again, --{option} {shlex.quote(value)}; to leave it out, --{option} ''")
    if "callback" in allowed:
        problems += plugins.problems(cfg.callback)
    if problems:
        raise UserError(*problems)
    notes = (f"when this run ends, it runs this command: {cfg.on_end}",) if cfg.on_end else ()
    return Job(stage, Parsed(cfg, frozenset(written) | changed.keys(), status.preset), None if forks else run, snapshot,
               asks=bool(parsed.config.resume) and not parsed.config.yes, notes=notes)


def _resume_problems(cfg: Options, run: RunDir, status: Status) -> list[str]:
    """Why a run cannot be resumed in its own folder."""
    watching = run.supervisor()
    if holder := run.holder():
        return [f"run {run.name} is being trained already, by process {holder.pid}; "
                f"stop it first: {files.hint('stop ' + run.name)}"]
    if status.state == rundir.RESTARTING and watching and watching.pid != os.getppid():
        return [f"run {run.name} is being restarted by its supervisor, process {watching.pid}; "
                f"stop it first: {files.hint('stop ' + run.name)}"]
    if status.state == "finished" and not cfg.extend_steps:
        return [f"run {run.name} is finished: add --extend_steps N to train it for N steps more than the "
                f"{status.of:,} planned, or start a new run with its weights: --init_from {run.name}"]
    if cfg.run_name not in ("", run.name):
        return [f"--run_name {cfg.run_name}: {run.name} keeps its name; leave it out"]
    return []


def _fork_problems(cfg: Options) -> list[str]:
    """Why a new run cannot continue from a snapshot."""
    return [f"--run_name {cfg.run_name}: there is a run of that name already: --resume {cfg.run_name} resumes it, "
            "or choose another name"] if _named_run(cfg) else []


def _written_config(run: RunDir) -> dict[str, Any]:
    try:
        return dict(records.load(run.config_file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"run {run.name} cannot be resumed: {run.config_file} cannot be read ({error})") from error


def _options_typed_now(stage: type[Stage], parsed: Parsed[Any], run: RunDir, status: Status,
                       before: Any) -> dict[str, Any]:
    """The options typed now that replace the run's own. Those that would make it another run may only be repeated,
    as they were typed at its start or as its config has them. An option that names the source of a part may name
    another place with the same content. Raises UserError for any other value."""
    asked = {name: getattr(parsed.config, name) for name in parsed.typed}
    changed = {name: value for name, value in asked.items() if config.fields(stage.Config)[name][1].may_change}
    refused = [name for name, value in asked.items()
               if name not in changed and value not in (getattr(before, name), status.typed.get(name))]
    if refused:
        sources = pretrained.source_options(stage(before, run.path))
        moved = [name for name in refused if name in sources and getattr(before, name) and asked[name]
                 and (sources[name].is_judge or sources[name].train != "whole")]  # else the weights are in the snapshot
        changed |= {name: asked[name] for name in moved}
        refused = [name for name in refused if name not in moved]
    if refused:
        raise UserError(*(f"--{name} {asked[name]} differs from the {getattr(before, name)} of {run.name}: that would "
                          "be another run; leave it out, or start a new one with --init_from"
                          for name in refused))
    return changed


def _result_dir(cfg: Options) -> Path:
    return Path(cfg.result_dir).resolve() if cfg.result_dir else files.results()


def _confirm(job: Job) -> None:
    """Ask on a terminal whether to resume this run. Raises UserError where there is none to ask on."""
    run = RunDir(job.snapshot.parents[1]) if job.snapshot else job.run
    assert run
    status = run.status()
    what = f"{run.name} ({run.state()}, step {status.step} of {status.of})"
    if job.forks:
        what = f"{job.snapshot}, in a folder of its own, since {run.name} has newer snapshots"
    if not sys.stdin.isatty():
        raise UserError(f"{what}: to resume it without a terminal to ask on, add --yes")
    try:
        ending = f", and run this command when it ends: {job.cfg.on_end}" if job.cfg.on_end else ""
        answer = input(config.printable(f"Resume {what}{ending}? [Y/n] "))
    except (EOFError, KeyboardInterrupt):
        print()
        answer = "no"
    if answer.strip().lower() not in ("", "y", "yes"):
        raise UserError("not started")


def _evaluation(stage: type[Stage], parsed: Parsed[Any]) -> Job:
    """Weights and the data of the options; with --resume, both of a run, and its other options too."""
    cfg, notes = parsed.config, list[str]()
    if cfg.resume:
        run, snapshot = _named_by_resume(stage, parsed)
        before: Any = config.from_json(stage.Config, _written_config(run), str(run.config_file))
        if "dataset" in parsed.typed:  # look from here for the files that this CSV names
            before = replace(before, working_folder=here())
        cfg = replace(before, **{name: getattr(cfg, name) for name in parsed.typed})
        with working_in(cfg.working_folder):
            if problems := stage.check(cfg, resumed=True) + _missing_packages(cfg):
                raise UserError(*problems)
        weights = pretrained.held(lambda: pretrained.find(str(snapshot)) if snapshot else pretrained.of_run(run))
    else:
        weights = pretrained.held(lambda: pretrained.find(cfg.init_from, (stage.name,)))
        known = pretrained.apply_options(stage, parsed, weights)
        cfg, notes = stage.resolve_defaults(known.config, known.typed)
    return Job(stage, pretrained.apply_options(stage, replace(parsed, config=cfg), weights), evaluated=weights,
               notes=tuple(notes))


# -- the run --------------------------------------------------------------------------------------------------------


def _supervise(job: Job, argv: list[str]) -> int:
    """Start trainers in processes of their own, and watch them. All checks and questions are done by now."""
    program = [sys.executable, *["-P"] * sys.flags.safe_path, sys.argv[0]]
    argv = config.without(argv, "yes", "y", "no_yes", "no_y")

    def again(run: RunDir, begun: bool) -> list[str]:
        if job.run is None or begun:  # all that was typed is in its config
            return [*program, "--resume", str(run.path), "--yes",
                    f"--on_end={job.cfg.on_end}", f"--callback={job.cfg.callback}"]  # they were allowed
        typed = config.without(argv, "resume", "checkpoint_file")
        return [*program, *typed, "--resume", str(job.snapshot or run.path), "--yes"]

    logs.to_console()
    supervisor = Supervisor([*program, *argv, "--yes"], again)
    code = supervisor.supervise()
    if supervisor.run and job.cfg.on_end and code != REFUSED:
        _run_on_end(job.cfg.on_end, supervisor.run)
    return code


def start(job: Job) -> int:
    """Train in this process. The run's directory is made, or the old one used, and locked throughout."""
    background = os.environ.get("STOKER_BACKGROUND") == "1"
    supervisor = process.find(int(os.environ.pop(SUPERVISOR, "0")))  # of us, not of what we start
    console = os.dup(2)  # in the background standard error becomes the log, but mistakes go where we were started
    logs.to_console()
    try:
        _require_torch()
        with Signals() as signals:
            run = job.run or _new_run(job)
            signals.at_second = lambda name: _at_once(run, name)
            signals.at_continue = run.note_continued
            last = run.last_holder()
            with run.lock():
                code = _locked(job, run, signals, background, supervisor, last)
        if job.cfg.on_end and not (supervisor and os.getppid() == supervisor.pid):  # else it does, after the last one
            _run_on_end(job.cfg.on_end, run)
        return code
    except UserError as error:
        with open(console, "w") as stderr:
            config.complain(error.problems, stderr)
        return REFUSED


def _evaluate(job: Job) -> int:
    """Print the figures of weights; nothing is written."""
    logs.to_console()
    _require_torch()
    with command.importing():
        from stoker.training.assembly.eval_only import show  # torch and all: takes seconds

    try:
        show(job)
    except KeyboardInterrupt:
        return 130
    return FINISHED


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        advice = (f"and {environment.path()} is not set up: start with a script of run/, which sets it up"
                  if files.CHECKOUT else "which stoker needs: install that again, with what it depends on")
        raise UserError(f"torch is not installed for this Python ({sys.executable}), {advice}")


def _new_run(job: Job) -> RunDir:
    cfg, stage, preset = job.cfg, job.stage, job.parsed.preset
    if job.snapshot:
        return fork.create(job.snapshot, cfg)
    status = Status(stage.name, job.script, cfg.dataset, preset,
                    typed={name: getattr(cfg, name) for name in sorted(job.parsed.typed)})
    return rundir.create(_result_dir(cfg), cfg.run_name or rundir.run_name(stage.name, cfg.dataset, preset), status,
                         exact=bool(cfg.run_name))


def _locked(job: Job, run: RunDir, signals: Signals, background: bool, supervisor: Process | None,
            last: Process | None) -> int:
    """Train, and turn whatever ends the run into its last status and an exit code.

    Raises UserError only where nothing has begun: then a new run is gone, and an old one's status is as it was.
    """
    before, begun, path = run.status(), threading.Event(), run.new_log()
    try:
        logs.to_file(path, background=background)
        signals.interruptible = True
        signals.check()  # it may have come before
        run.write_status(replace(before, script=job.script, state="preparing", reason="", pid=os.getpid(),
                                 started=time.time(), eta_seconds=None, phase=pulse.PREPARING,
                                 budget=pulse.PATIENCE.unknown,
                                 supervisor=supervisor.to_json() if supervisor else None))
        deaths.tell_last(run, before, last)
        with open(path, "ab") as file, _faults(file.fileno()):
            ending = _train(job, run, signals, begun)
    except Interrupted as stop:
        return _end(run, "stopped", f"{stop} received before training began", FINISHED)
    except (Exception, Gone) as error:
        if (there := run.where_now()) != run:
            return _end_elsewhere(run, there)
        if signals.interrupted and not begun.is_set():  # an import in C has made another exception of Interrupted
            return _end(run, "stopped", f"{signals.interrupted} received before training began", FINISHED)
        if isinstance(error, UserError) and not begun.is_set():
            _undo(job, run, before, path)
            raise
        if isinstance(error, UserError):  # its message says everything
            return _end(run, "failed", "; ".join(error.problems), FAILED)
        log.exception("the run failed")
        if job.run and not begun.is_set():  # as it was: nothing of it has changed
            run.write_status(before)
            return FAILED
        return _end(run, "failed", f"{type(error).__name__}: {error}".splitlines()[0], FAILED)
    halted = ending.state == "halted"
    return _end(run, "stopped" if halted else ending.state, ending.reason, RESUMABLE if halted else FINISHED)


def _train(job: Job, run: RunDir, signals: Signals, begun: threading.Event) -> Ending:
    with signals.held(), command.importing():
        from stoker.training.assembly.session import Session  # torch and all: takes seconds

    if job.forks:
        log.info("This run continues from %s; the run of that snapshot stays as it is", job.snapshot)
    sitting = Session(job.within(run), run, signals, begun)
    with progress.heard(sitting.pulse):
        return sitting.train()


def _undo(job: Job, run: RunDir, before: Status, new_log: Path) -> None:
    """Leave everything as it was before this start. Only for the holder of the run's lock."""
    if job.run is None:
        run.remove()
    else:
        run.write_status(before)
        run.remove_log(new_log)


def _end(run: RunDir, state: str, reason: str, code: int) -> int:
    run.write_status(replace(run.status(), state=state, reason=reason, eta_seconds=None))
    log.info("%s: %s", {"finished": "Training completed"}.get(state, f"Training {state}"), reason)
    if state == "finished" and (expected := run.status().expected_seconds):
        log.info("Trained for %s in all; the estimate was %s", duration(run.status().busy_seconds), duration(expected))
    if state != "finished":
        log.info("Resume: %s", files.hint(f"resume {run.name}"))
    return code


def _end_elsewhere(run: RunDir, there: RunDir | None) -> int:
    """End a run whose folder was moved (to `there`), deleted or replaced: nothing more can be saved."""
    reason = f"{run.path} was {'moved' if there else 'deleted or replaced'} while it was trained"
    log.error("Training failed: %s", reason)
    if there:
        there.write_status(replace(there.status(), state="failed", reason=reason, eta_seconds=None))
        log.info("Resume: %s", files.hint(f"resume {there.path}"))
    return FAILED


def _run_on_end(command: str, run: RunDir) -> None:
    """Run the user's --on_end command. Where it fails, that is logged and changes nothing else."""
    try:
        status = run.status()
    except FileNotFoundError:
        status = Status("", "", "", "", state="failed", reason=f"{run.path} is not there any more")
    ran = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, env=os.environ | {
        "STOKER_RUN": str(run.path), "STOKER_STATE": status.state, "STOKER_REASON": status.reason})
    if ran.returncode:
        log.warning("--on_end %s: exit code %d", command, ran.returncode)


def _at_once(run: RunDir, name: str) -> int:
    if not run.status_file.exists():  # deleted, or moved
        return FAILED
    if run.status().state not in rundir.ACTIVE:  # it has ended by itself this moment
        return FINISHED
    _end(run, "stopped", f"second {name}: ended at once, what came after the last snapshot is lost", RESUMABLE)
    return RESUMABLE


@contextmanager
def _faults(descriptor: int) -> Iterator[None]:
    """A crash in C leaves its stacks in the log; so does SIGUSR2, also while the main thread hangs in C."""
    faulthandler.enable(descriptor)
    faulthandler.register(signal.SIGUSR2, descriptor)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.disable()
