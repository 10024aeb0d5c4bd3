"""The measurement that kills a training at chosen instants: a short one, and that it sees what differs."""

import json
import re
import subprocess
import sys
from pathlib import Path

from stoker.daemon.rundir import PROJECT, RunDir

KILLS = 3


def measure(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROJECT / "benchmarks/kill_matrix.py"), "--kills", str(KILLS), "--seed",
                           "3", "--folder", str(folder)], capture_output=True, text=True)


def test_three_kills_change_nothing_and_what_differs_is_named(tmp_path: Path) -> None:
    done = measure(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\S.*?) {2,}(\d*) {2,}(\d+) {2,}", done.stdout, re.MULTILINE)
    points, kills = ({place: int(row[i] or 0) for place, *row in rows} for i in (0, 1))
    assert kills.pop("all") == KILLS == sum(kills.values()) and kills["birth of the run"] == 1
    assert all(points[place] for place in ("save", "commit", "rotation", "metrics", "training step", "evaluation"))
    assert done.stdout.splitlines()[-1] == f"seed 3000: {KILLS} kills, same"

    run = RunDir(tmp_path / "lm_seed_3/course_00/killed/run")
    *before, last = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(before) + json.dumps({**json.loads(last), "train/loss": 0.0}) + "\n")
    (run.snapshots / ".snapshot_step_00000055").mkdir()
    again = measure(tmp_path)  # nothing is left to be trained
    assert again.returncode == 1, again.stdout + again.stderr
    assert (f"seed 3000: {KILLS} kills, 2 DIFFERENCES\n    left behind: run/snapshots/.snapshot_step_00000055\n"
            in again.stdout)
    assert re.search(r"^    /metrics\[\d+\]/train/loss: \d\.\d+ alone, 0.0 killed$", again.stdout, re.MULTILINE)
