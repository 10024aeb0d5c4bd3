"""A snapshot that is named: its run is resumed from the newest, a new run continues from an older one."""

import errno
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.training.assembly import launch
from stoker.training.assembly.job import Job
from stoker.training.assembly.session import Session
from stoker.training.core import manifest
from stoker.training.core.signals import Signals
from stoker.training.core.snapshots import read_plain
from toys import Regression, StopAt, Toy, assert_same, new_run, train, with_callbacks

TOY = type("Toy", (Regression,), {"check": classmethod(lambda cls, cfg, resumed: [])})


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    """With snapshots of steps 0, 3, 4, 6 and 7, of 9; its name and place were typed."""
    run = new_run(tmp_path, TOY)
    train(with_callbacks(TOY, StopAt(7)), run, run_name=run.name, result_dir=str(tmp_path / "where it was"))
    run.write_status(replace(run.status(), state="stopped"))
    (run.path / "tokenizer.json").write_text("what the stage keeps")
    return run


@pytest.mark.parametrize("flag", ["--resume", "--checkpoint_file"])
@pytest.mark.parametrize("spelling", ["snapshot_step_00000007", "snapshot_step_7.pt",
                                      "snapshot_step_00000007/model.safetensors"])
def test_the_newest_snapshot_of_a_run_means_the_run(stopped: RunDir, flag: str, spelling: str) -> None:
    """With its data, its options and its position; nothing of it need be typed."""
    job = launch.decide(TOY, [flag, str(stopped.snapshots / spelling)])
    assert (job.run, job.snapshot, job.asks) == (stopped, stopped.snapshots / "snapshot_step_00000007", True)
    assert (job.cfg.batch_size, job.cfg.max_steps, job.cfg.seed) == (4, 9, 42)
    with pytest.raises(UserError, match="--lr 0.005 differs from the 0.01 of .* --init_from"):
        launch.decide(TOY, [flag, str(stopped.snapshots / spelling), "--lr", "0.005"])


def continued(job: Job, stage: type[Toy] = TOY) -> RunDir:
    """What `launch.start` does with such a job."""
    run = launch._new_run(job)
    sitting = Session(replace(job, stage=stage).within(run), run, Signals(lambda name: 0), threading.Event())
    with run.lock():
        trainer, snapshot = sitting.prepare()
        trainer.fit(snapshot)
    return run


@pytest.mark.parametrize("flag", ["--resume", "--checkpoint_file"])
def test_an_older_snapshot_is_continued_in_a_new_run(tmp_path: Path, stopped: RunDir, flag: str) -> None:
    """It ends as if it had never been interrupted; the run of the snapshot is left as it is, in whatever state."""
    whole, before = new_run(tmp_path, TOY), contents(stopped)
    train(TOY, whole)
    snapshot = stopped.snapshots / "snapshot_step_00000004"
    with stopped.lock():  # it may even be training meanwhile
        job = launch.decide(TOY, [flag, str(snapshot), "--yes"])
        assert job.run is None and job.forks
        run = continued(job)
    assert run.path == tmp_path / f"{stopped.name}_from_step_00000004"
    last = "snapshots/snapshot_epoch_0003"
    assert_same(read_plain(run.path / last / "state.pt"), read_plain(whole.path / last / "state.pt"))
    assert list(Journal(run.metrics).rows()) == list(Journal(whole.metrics).rows())
    assert (run.path / "tokenizer.json").read_text() == "what the stage keeps"
    inner = "snapshots/snapshot_step_00000004/model.safetensors"
    assert os.path.samefile(run.path / inner, stopped.path / inner)
    assert run.status().origin == str(snapshot) and run.status().stage == "regression"
    assert contents(stopped) == before
    assert continued(launch.decide(TOY, [flag, str(snapshot)])).name == f"{run.name}-2"


def contents(run: RunDir) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*")
            if path.is_file() and path != run.lock_file}


def test_a_new_run_from_an_older_snapshot_is_a_run_like_any(tmp_path: Path, stopped: RunDir) -> None:
    """It may have a name and a place; before it has begun and after, it is resumed by itself, also if the other is
    gone."""
    argv = ["--checkpoint_file", str(stopped.snapshots / "snapshot_step_00000004"), "--run_name", "other",
            "--result_dir", str(tmp_path / "results"), "--log_interval", "3"]
    run = launch._new_run(launch.decide(TOY, argv))
    assert run.path == tmp_path / "results" / "other"
    assert [row["step"] for row in Journal(run.metrics).rows()] == [1, 2, 4]
    assert (run.status().step, run.status().of) == (4, 9)
    with pytest.raises(UserError, match="there is a run of that name already"):
        launch.decide(TOY, argv)
    shutil.rmtree(stopped.path)
    job = launch.decide(TOY, ["--resume", "other", "--yes"])
    assert (job.run, job.cfg.log_interval, job.cfg.resume) == (run, 3, str(run.name)) and not job.forks
    trainer, ending = train(TOY, run, resume=True)
    assert (ending.state, trainer.step) == ("finished", 9)


def test_a_finished_run_is_continued_from_an_older_snapshot(stopped: RunDir) -> None:
    stopped.write_status(replace(stopped.status(), state="finished"))
    with pytest.raises(UserError, match="is finished: add --extend_steps"):
        launch.decide(TOY, ["--checkpoint_file", str(stopped.snapshots / "snapshot_step_7.pt")])
    assert launch.decide(TOY, ["--checkpoint_file", str(stopped.snapshots / "snapshot_step_4.pt")]).forks


def test_a_damaged_snapshot_is_not_continued(stopped: RunDir, tmp_path: Path) -> None:
    snapshot = stopped.snapshots / "snapshot_step_00000004"
    content = bytearray((snapshot / "state.pt").read_bytes())
    content[100] ^= 1
    (snapshot / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match="is damaged: state.pt"):
        launch._new_run(launch.decide(TOY, ["--checkpoint_file", str(snapshot)]))
    assert not list(tmp_path.glob("*_from_*")) and not list(tmp_path.glob(".*"))


def test_a_snapshot_under_another_name_is_continued_too(stopped: RunDir) -> None:
    """Such as one that was set aside: the copy has a name that is looked for. The run's curves may be gone."""
    aside = stopped.snapshots / "abandoned_snapshot_step_00000004"
    (stopped.snapshots / "snapshot_step_00000004").rename(aside)
    shutil.rmtree(stopped.tensorboard)
    run = launch._new_run(launch.decide(TOY, ["--checkpoint_file", str(aside)]))
    assert run.name == f"{stopped.name}_from_step_00000004"
    assert [path.name for path in run.snapshots.iterdir()] == ["snapshot_step_00000004"]


def test_a_copy_is_made_where_the_file_system_has_no_links(stopped: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run = launch._new_run(launch.decide(TOY, ["--checkpoint_file", str(stopped.snapshots / "snapshot_step_4.pt")]))
    manifest.verify(run.snapshots / "snapshot_step_00000004")


@pytest.mark.parametrize("named, why", [
    ("nowhere.pt", "no snapshot there"), ("run_regression/snapshots/snapshot_step_00000099", "no snapshot there"),
    ("lone", "is a snapshot, but not within a run: --init_from lone takes its weights")])
def test_a_snapshot_that_cannot_be_resumed_from(stopped: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                named: str, why: str) -> None:
    shutil.copytree(stopped.snapshots / "snapshot_step_00000004", tmp_path / "lone")
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--eval_only"]):
        with pytest.raises(UserError, match=why):
            launch.decide(TOY, ["--checkpoint_file", named, *more])
