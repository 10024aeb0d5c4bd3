"""The command `stoker`, which does what the scripts of run/ do, also where the package is installed without them.

    stoker STAGE [OPTIONS]           train in the background: {stages}, or SCRIPT.py of your own;
                                     --foreground trains in this terminal, --help lists the options
    stoker ps [RUN] [--watch]        list the runs
    stoker logs RUN [-f]             print the log of a run, or follow it
    stoker stop RUN                  save and stop
    stoker resume RUN [--yes]        resume a run from its newest snapshot
    stoker evaluate RUN [OPTIONS]    evaluate the model of a run on the run's own data
    stoker ask RUN snapshot|trace    let a run that trains take a snapshot, or trace its next steps
    stoker delete RUN                delete a run that is not running
    stoker board [RUN] [--png]       show the curves of a run, or of all, with TensorBoard
    stoker generate|transcribe|speak|see|read|replay|data ...    use trained models, look after data

RUN is the name of a run, the beginning of it, the PID of its trainer, or its folder.
"""

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stoker import files
from stoker.command import answered
from stoker.config import UserError, complain, printable
from stoker.daemon import __main__ as daemon
from stoker.daemon import registry
from stoker.daemon.rundir import SCRIPT, STAGES

INFERENCE = ("generate", "transcribe", "speak", "see", "read", "replay")
RUNS = ("ps", "stop", "ask", "delete", "logs", "board", "resume", "evaluate")
AT_ONCE = {"--help", "-h", "--info", "--explain", "--print_config"}  # pages, for which nothing is checked
FOREGROUND = "--foreground"


def main() -> int:
    return answered(_main)


def _main(words: Sequence[str]) -> int:
    stages = {path.stem.removeprefix("train_"): path for path in STAGES.glob("*_*.py") if SCRIPT.fullmatch(path.name)}
    if not words or words[0] in ("--help", "-h", "help"):
        print((__doc__ or "").format(stages=", ".join(sorted(stages))).rstrip())
        return 0
    word, *rest = words[1:] if words[0] == "start" and len(words) > 1 else words
    known = word in (*INFERENCE, *RUNS, "data")
    script = None if known else stages.get(word, Path(word).resolve())
    if script and not script.is_file():
        raise UserError(f"{word!r} is neither a command, nor a stage ({', '.join(sorted(stages))}), nor a script: "
                        "see stoker --help")
    if files.CHECKOUT:
        return _shell(files.CHECKOUT / "run", word, script, rest)
    os.environ["STOKER_SCRIPT"] = f"stoker {Path(word).name}"
    if script:
        return _train(script, rest)
    if word in ("resume", "evaluate"):
        return _again(word, rest)
    if word == "logs":
        return _logs(rest)
    if word == "board":
        return _board(rest)
    if word in (*INFERENCE, "data"):
        return _module("data" if word == "data" else f"inference.{word}", *rest)
    return daemon.call([word, *rest])


def _shell(folder: Path, word: str, script: Path | None, rest: Sequence[str]) -> int:
    """Go on as a script of run/, which sets up what is missing."""
    own = folder / (f"run_{script.name.removesuffix('.py')}.sh" if script else f"{word}.sh")
    program = [str(own)] if own.is_file() else [str(folder / "start.sh"), str(script)]
    os.execv(program[0], [*program, *rest])


def _module(name: str, *words: str) -> int:
    """Run a program of the package in this process, which it ends."""
    sys.argv[1:] = words
    runpy.run_module(f"stoker.{name}", run_name="__main__", alter_sys=True)
    return 0


def _train(script: Path, options: Sequence[str]) -> int:
    """Run the script of a stage, in the background unless something else is asked for."""
    flags = ["-P"] if script.parent == STAGES else []  # one from outside may import what lies beside it
    program = [sys.executable, *flags, str(script)]
    given = [word for word in options if word not in (FOREGROUND, "--no_yes", "--no-yes", "--")]
    if AT_ONCE & set(given):
        os.execv(program[0], [*program, *given])
    if refused := subprocess.call([*program, "--check", *given]):  # mistakes and questions belong to this terminal
        return refused
    if FOREGROUND in options or "--eval_only" in given:
        os.execv(program[0], [*program, *given, "--yes"])
    with tempfile.TemporaryFile() as output:
        trainer = subprocess.Popen([*program, *given, "--yes"], stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True,  # no terminal's end reaches it
                                   env=os.environ | {"STOKER_BACKGROUND": "1"})
        if daemon.wait_for(trainer.pid) == 0:
            return 0
        code = trainer.wait()
        output.seek(0)
        sys.stderr.write(output.read().decode(errors="replace"))
    if code not in (0, 2):
        complain([f"the run ended with exit code {code}"])
    return code


def _again(word: str, words: Sequence[str]) -> int:
    """Start the script of a run for that run."""
    if AT_ONCE & set(words):
        return _main([])
    which = next((given for given in words if not given.startswith("-")), "")
    options, run = list(words), registry.find(which)
    options.remove(which)
    place = str(registry.snapshot(which) or run.path)
    return _train(run.script(), [*["--eval_only"] * (word == "evaluate"), "--resume", place, *options])


def _logs(words: Sequence[str]) -> int:
    if AT_ONCE & set(words):
        return _main([])
    run = registry.find(next((given for given in words if not given.startswith("-")), ""))
    if not run.latest_log.is_file():
        raise UserError(f"{run.name} has no log yet")
    program, holder = ["tail", "-n", "+1"], run.holder()
    if {"-f", "--follow"} & set(words):
        program = ["tail", "-n", "20", *([f"--pid={holder.pid}", "-f"] if holder else [])]
    with subprocess.Popen([*program, "--", str(run.latest_log)], stdout=subprocess.PIPE, text=True,
                          errors="replace") as lines:
        for line in lines.stdout or ():
            print(printable(line.rstrip("\n")), flush=True)
    return 0


def _board(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="stoker board")
    parser.add_argument("run", nargs="?", default="")
    parser.add_argument("--port", type=int, default=6006, help="default: %(default)s")
    parser.add_argument("--png", action="store_true", help="draw the curves on a page instead, and print its path")
    given = parser.parse_args(words)
    if given.png:
        return _module("monitors.plots", *[given.run] * bool(given.run))
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", "--logdir", str(daemon.curves(given.run)),
                              "--host", "127.0.0.1", "--port", str(given.port)])


if __name__ == "__main__":
    sys.exit(main())
