"""The real script, killed and stopped at various moments and resumed: the same bits as left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from desk import unless_typed
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import PROJECT, RunDir
from stoker.training.core.snapshots import Snapshots
from toys import assert_same

STEPS = 60
OPTIONS = [
    "--tokenizer", "bytes", "--d_model", "32", "--num_heads", "2", "--num_layers", "2", "--d_ff", "64", "--max_seq_len",
    "32", "--dropout", "0.1", "--batch_size", "4", "--grad_accum_steps", "2", "--num_workers", "2", "--max_steps",
    str(STEPS), "--log_interval", "3", "--eval_interval", "7", "--snapshot_interval", "10", "--threads", "1",
    "--no_delete_snapshots_after_training",
]


def make_text(folder: Path) -> None:
    chosen = random.Random(0)
    words = "stoker keeps the fire burning all night long while you sleep".split()
    (folder / "text.txt").write_text("\n".join(" ".join(chosen.choices(words, k=8)) for _ in range(300)))


def start(folder: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", str(PROJECT / "src/training/train_lm.py"), "--dataset", str(folder / "text.txt"),
               "--result_dir", str(folder), "--run_name", name, *unless_typed(OPTIONS, options), "--yes", *options]
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "run/python")}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=environment)


def wait_for(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until a snapshot or a log line of `step` or later exists."""
    journal = Journal(folder / "metrics.jsonl")
    while process.poll() is None:
        rows = list(journal.rows())
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)


def outcome(folder: Path) -> dict[str, Any]:
    run = RunDir(folder)
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": load_file(last / "model.safetensors"), "state": torch.load(last / "state.pt", weights_only=True),
            "metrics": list(Journal(run.metrics).rows()), "model": load_file(run.models / "best" / "model.safetensors")}


@pytest.mark.slow
def test_killed_stopped_and_resumed_is_left_alone(tmp_path: Path) -> None:
    make_text(tmp_path)
    assert start(tmp_path, "alone").wait(200) == 0
    for number, step in ((signal.SIGKILL, 8), (signal.SIGTERM, 21), (signal.SIGKILL, 36), (signal.SIGINT, 49)):
        process = start(tmp_path, "troubled")
        wait_for(tmp_path / "troubled", step, process)
        process.send_signal(number)
        code = process.wait(60)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        assert RunDir(tmp_path / "troubled").state() == ("died" if number == signal.SIGKILL else "stopped")
    assert start(tmp_path, "troubled").wait(200) == 0
    assert RunDir(tmp_path / "troubled").status().step == STEPS
    assert_same(outcome(tmp_path / "alone"), outcome(tmp_path / "troubled"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Again and again some moment after the start: in the imports, a step, a save, an evaluation."""
    chosen, longer, kills = random.Random(seed), ("--max_steps", "300"), 0
    make_text(tmp_path)
    began = time.monotonic()
    assert start(tmp_path, "alone", *longer).wait(200) == 0
    whole = time.monotonic() - began
    run = RunDir(tmp_path / "troubled")
    while not run.path.exists() or run.state() != "finished":
        process = start(tmp_path, "troubled", *longer)
        try:
            assert process.wait(whole * chosen.uniform(0.1, 0.9)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills  # how many depends on the machine
    assert_same(outcome(tmp_path / "alone"), outcome(tmp_path / "troubled"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills_in_one_run(tmp_path: Path, seed: int) -> None:
    """At ten steps chosen by the seed, and up to half a second later."""
    chosen, longer = random.Random(100 + seed), ("--max_steps", "300")
    make_text(tmp_path)
    assert start(tmp_path, "alone", *longer).wait(200) == 0
    for step in sorted(chosen.sample(range(5, 280), 10)):
        process = start(tmp_path, "troubled", *longer)
        wait_for(tmp_path / "troubled", step, process)
        time.sleep(chosen.uniform(0, 0.5))
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    assert start(tmp_path, "troubled", *longer).wait(200) == 0
    assert_same(outcome(tmp_path / "alone"), outcome(tmp_path / "troubled"))
