"""What the benchmarks of recognizers share: training one by the stage's own script, and evaluating one."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import rig  # noqa: F401  finds the packages of src/

from stoker import files
from stoker.daemon.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "src/training/train_audio_enc.py"


def arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """What was typed before `--`, parsed, and the options of train_audio_enc.py behind it."""
    own, options = (sys.argv[1:], []) if "--" not in sys.argv else (
        sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:])
    return parser.parse_args(own), options


def trained(folder: Path, options: list[str]) -> dict[str, float]:
    """The last evaluation of a run in this folder, which is started with the options, or resumed if it is there
    already. Ends the program where the run failed, or is one with other options or data."""
    run, record, log = RunDir(folder), folder.with_suffix(".options.json"), folder.with_suffix(".log")
    asked = {"options": options, "files": {word: files.sha256(Path(word)) for word in options if os.path.isfile(word)}}
    begun = run.status_file.exists()
    if begun and not (record.exists() and json.loads(record.read_text()) == asked):
        sys.exit(f"{folder} was trained with other options or data, or before these were recorded in {record}: name "
                 "another folder")
    record.write_text(json.dumps(asked, indent=1))
    start = ["--resume", str(folder)] if begun else ["--result_dir", str(folder.parent), "--run_name", folder.name,
                                                     *options]
    if not begun or run.status().state != "finished":
        with open(log, "a") as output:
            code = subprocess.run([sys.executable, SCRIPT, *start, "--yes"], stdout=output, stderr=output).returncode
        if code:
            sys.exit(f"{log.read_text().strip().splitlines()[-1]} (all of it: {log})")
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return next(row for row in reversed(rows) if "eval/wer" in row)


def evaluated(model: Path | str, *options: str) -> dict[str, float]:
    """The figures that evaluate.sh prints. Ends the program with its error, if there is one."""
    done = subprocess.run([ROOT / "run/evaluate.sh", model, *options, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    figures = json.loads(done.stdout)["evaluations"][0]["metrics"]
    return {name: figure["value"] for name, figure in figures.items()}
