"""Which run a command line means, and what becomes of one that is stopped or refused early."""

import errno
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config import Parsed, UserError
from daemon import rundir
from daemon.journal import Journal
from daemon.rundir import PROJECT, RunDir, Status
from data import speech
from desk import unless_typed
from toys import QUICK, Regression, StopAt, Toy, assert_same, new_run, session, train, with_callbacks
from training import launch, manifest, optim, pretrained
from training.callback import Callback
from training.launch import Job
from training.session import Session
from training.signals import Signals
from training.snapshots import read_plain
from training.train_audio_enc import AudioEncoder
from training.train_lm import LanguageModel
from training.trainer import Trainer

SMALL = ["--tokenizer", "bytes", "--max_steps", "9", "--epochs", "20", "--precision", "auto", "--no_compile"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(300)))
    return path


def begun(tmp_path: Path, *argv: str, **settled: Any) -> RunDir:
    """A run as it stands on disk after its start, its config settled to the run's length."""
    job = launch.decide(LanguageModel, [*argv, "--result_dir", str(tmp_path / "runs")])
    typed = {name: getattr(job.cfg, name) for name in job.parsed.typed}
    run = rundir.create(tmp_path / "runs", job.cfg.run_name or "run",
                        Status("lm", "train_lm.py", job.cfg.dataset, job.parsed.preset, "stopped", typed=typed))
    if settled:
        whole = vars(job.cfg) | settled
        run.config_file.write_text(json.dumps(whole))
    return run


def test_the_same_named_command_again_goes_on_without_asking(tmp_path: Path, text: Path) -> None:
    """Though the config was settled meanwhile: typed values may be repeated as they were typed."""
    argv = ["--dataset", "text.txt", *SMALL, "--run_name", "mine"]
    run = begun(tmp_path, *argv, max_steps=9, epochs=1, precision="fp32", log_interval=1)
    job = launch.decide(LanguageModel, [*argv, "--result_dir", str(tmp_path / "runs")])
    assert job.run == run and not job.asks
    assert (job.cfg.epochs, job.cfg.precision, job.cfg.log_interval) == (1, "fp32", 1)


@pytest.mark.parametrize("extra", [["--resume"], ["--resume=mine", "--no_yes"], ["--resume", "mine", "-y"]])
def test_a_supervisor_adds_no_option_that_contradicts(tmp_path: Path, text: Path, extra: list[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """To what was typed, whichever of its two ways it starts a trainer."""
    seen: list[list[str]] = []

    class Looks:
        run = None

        def __init__(self, command: list[str], again: Callable[[RunDir, bool], list[str]]):
            seen.extend([command, again(run, False), again(run, True)])

        def supervise(self) -> int:
            return 0

    monkeypatch.setattr(launch, "Supervisor", Looks)
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, "--run_name", "mine")
    argv = ["--result_dir", str(tmp_path / "runs"), "--supervise", *extra]
    assert launch._supervise(launch.decide(LanguageModel, argv), argv) == 0
    for command in seen:
        job = launch.decide(LanguageModel, command[3:])
        assert job.run == run and not job.asks


@pytest.mark.parametrize("argv, why", [(["--lr", "0.001"], "--lr 0.001 differs from the 0.0003"),
                                       (["--epochs", "3"], "--epochs 3 differs from the 1"),
                                       (["--preset", "tiny"], "has preset none")])
def test_what_would_be_another_run_is_refused(tmp_path: Path, text: Path, argv: list[str], why: str) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, epochs=1)
    with pytest.raises(UserError, match=why):
        launch.decide(LanguageModel, ["--resume", run.name, *argv])


def test_harmless_options_may_be_given_anew(tmp_path: Path, text: Path) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, epochs=1)
    job = launch.decide(LanguageModel, ["--resume", run.name, "--log_interval", "7", "--num_workers", "3"])
    assert job.asks and (job.cfg.log_interval, job.cfg.num_workers, job.cfg.epochs) == (7, 3, 1)


def test_a_run_that_had_not_begun_is_settled_now(tmp_path: Path, text: Path) -> None:
    """Its config holds the typed options only, so the others are still to be cut to the run's length."""
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, "--preset", "nano")
    job = launch.decide(LanguageModel, ["--resume", run.name, "--yes"])
    assert "log_interval" not in job.parsed.typed and {"dataset", "max_steps", "yes"} <= job.parsed.typed
    assert job.cfg.d_model == LanguageModel.presets["nano"]["d_model"] and job.cfg.max_steps == 9


def test_a_path_means_the_same_from_another_folder(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert launch.decide(LanguageModel, ["--resume", run.name]).cfg.dataset == str(text)
    assert launch.decide(LanguageModel, ["--resume", "--dataset", "../text.txt"]).run == run


def test_the_embedded_corpus_wins_over_a_folder_of_its_name(tmp_path: Path, text: Path) -> None:
    (tmp_path / "pydocs").mkdir()
    assert launch.decide(LanguageModel, ["--dataset", "pydocs", "--tokenizer", "bytes"]).cfg.dataset == "pydocs"


def test_a_broken_config_is_told(tmp_path: Path, text: Path) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    run.config_file.write_text("{")
    with pytest.raises(UserError, match="run_config.json cannot be read"):
        launch.decide(LanguageModel, ["--resume", run.name])


def test_a_status_that_cannot_be_read_is_reported(tmp_path: Path, text: Path) -> None:
    """However the run is named, as long as there is no snapshot to read the status from."""
    argv = ["--dataset", "text.txt", *SMALL, "--run_name", "mine"]
    run = begun(tmp_path, *argv)
    run.status_file.write_text("{")
    for again in ([*argv, "--result_dir", str(tmp_path / "runs")], ["--resume", "mine"], ["--resume", str(run.path)]):
        with pytest.raises(UserError, match="status.json cannot be read: it is not JSON"):
            launch.decide(LanguageModel, again)


def test_finished_runs_do_not_go_on(tmp_path: Path, text: Path) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    run.write_status(replace(run.status(), state="finished"))
    with pytest.raises(UserError, match="is finished"):
        launch.decide(LanguageModel, ["--resume", run.name])
    with pytest.raises(UserError, match="no unfinished run of lm"):
        launch.decide(LanguageModel, ["--resume"])


def test_a_run_s_own_config_makes_another_run_like_it(tmp_path: Path, text: Path) -> None:
    """A file with every option types every option, those of other tokenizers too."""
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    whole = launch.decide(LanguageModel, ["--dataset", "text.txt", *SMALL]).cfg
    run.config_file.write_text(json.dumps(vars(whole)))
    assert launch.decide(LanguageModel, ["--config", str(run.config_file)]).cfg == whole


def test_a_named_run_goes_on_though_what_it_began_with_is_gone(tmp_path: Path, text: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    argv = ["--dataset", "text.txt", *SMALL[2:], "--run_name", "mine", "--result_dir", str(tmp_path / "runs")]
    named = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    run = begun(tmp_path, *argv, *named)
    (tmp_path / "tokenizer.json").unlink()
    assert launch.decide(LanguageModel, [*argv, *named]).run == run
    with pytest.raises(UserError, match="is none of bpe"):
        launch.decide(LanguageModel, [*argv[:-4], *named, "--run_name", "other"])


def test_a_name_that_was_typed_is_the_run_s_name_or_none(tmp_path: Path, text: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="--run_name taken: .*/taken is there, and is no run"):
        launch.decide(LanguageModel, ["--run_name", "taken", "--result_dir", str(tmp_path), "--dataset", "text.txt"])
    status = Status("lm", "train_lm.py", "text.txt", "")
    rundir.create(tmp_path, "mine", status, exact=True)
    with pytest.raises(UserError, match="run mine was started by somebody else this moment"):
        rundir.create(tmp_path, "mine", status, exact=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "taken", "text.txt"]
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    with pytest.raises(UserError, match="run keeps its name"):
        launch.decide(LanguageModel, ["--resume", str(run.path), "--run_name", "another"])


@pytest.mark.parametrize("name, why", [("x" * 201, "201 bytes"), ("a/b", "not a path"), ("lm_text", "is the link"),
                                       ("-x", "must begin with a letter"), ("4711", "means a PID"),
                                       ("a\n", "hold only"), ("\x1b[2J", "'.x1b.2J' must begin"),
                                       ("my run", "hold only")])
def test_names_that_cannot_be(tmp_path: Path, text: Path, name: str, why: str) -> None:
    (tmp_path / "lm_text").symlink_to("nowhere")
    with pytest.raises(UserError, match=why) as caught:
        launch.decide(LanguageModel, [f"--run_name={name}", "--result_dir", str(tmp_path), "--dataset", "text.txt"])
    assert len(caught.value.problems) == 1 and caught.value.problems[0].isprintable()


def test_a_run_that_has_such_a_name_already_is_resumed_by_it(tmp_path: Path, text: Path) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    run.path.rename(run.path.with_name("my run"))
    job = launch.decide(LanguageModel, ["--run_name", "my run", "--result_dir", str(tmp_path / "runs")])
    assert job.run and job.run.name == "my run"


# -- what is run when a run ends ------------------------------------------------------------------------------------


COMMAND = "echo 'it is over' >> ends\x1b[2J"


def test_a_command_at_the_end_is_shown_before_the_run_resumes(tmp_path: Path, text: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, "--on_end", COMMAND)
    job = launch.decide(LanguageModel, ["--resume", run.name])
    assert job.cfg.on_end == COMMAND and any(COMMAND in note for note in job.notes), "in the log"
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    launch._confirm(job)
    launch._confirm(launch.decide(LanguageModel, ["--resume", run.name, "--on_end", ""]))
    assert "echo 'it is over' >> ends\\x1b[2J? [Y/n] " in asked[0] and asked[0].isprintable()
    assert asked[1].endswith("step 0 of 0)? [Y/n] ")


@pytest.mark.parametrize("how", ["moved", "another user's", "list lost"])
def test_a_command_from_elsewhere_is_run_only_where_it_is_typed_again(tmp_path: Path, text: Path, how: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, "--on_end", COMMAND)
    if how == "moved":
        run = RunDir(run.path.rename(tmp_path / "runs" / "moved"))
    elif how == "list lost":
        monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))
    else:
        monkeypatch.setattr(os, "geteuid", lambda: run.path.stat().st_uid + 1)
    again = ["--resume", str(run.path), "--yes"]
    with pytest.raises(UserError, match="would run a command when it ends") as caught:
        launch.decide(LanguageModel, again)
    assert shlex.quote(COMMAND) in caught.value.problems[0]
    assert launch.decide(LanguageModel, [*again, "--on_end", COMMAND]).cfg.on_end == COMMAND
    silent = launch.decide(LanguageModel, [*again, "--on_end", ""])
    assert silent.cfg.on_end == "" and not silent.notes
    assert launch.decide(LanguageModel, [*again, "--on_end", "true"]).cfg.on_end == "true"


def test_a_supervisor_starts_again_what_was_allowed(tmp_path: Path, text: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, "--on_end", COMMAND)
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))
    job = launch.decide(LanguageModel, ["--resume", str(run.path), "--yes", "--on_end", COMMAND])
    made: list[Any] = []

    class Watcher:
        def __init__(self, first: list[str], again: Any) -> None:
            self.run = None
            made.append(again)

        def supervise(self) -> int:
            return 0

    monkeypatch.setattr(launch, "Supervisor", Watcher)
    monkeypatch.setattr(launch.logs, "to_console", lambda: None)
    launch._supervise(job, [])
    command = made[0](run, True)
    assert launch.decide(LanguageModel, command[3:]).cfg.on_end == COMMAND


def test_the_command_runs_though_the_folder_is_gone(tmp_path: Path) -> None:
    launch._tell(f'echo "$STOKER_STATE: $STOKER_REASON" > {tmp_path}/end', RunDir(tmp_path / "gone"))
    assert (tmp_path / "end").read_text() == f"failed: {tmp_path}/gone is not there any more\n"


# -- what is lost ---------------------------------------------------------------------------------------------------


def test_a_run_whose_status_was_lost_is_resumed(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run)
    run.status_file.write_text("")
    stage = type("Toy", (Regression,), {"check": classmethod(lambda cls, cfg, resumed: [])})
    job = launch.decide(stage, ["--resume", str(run.path), "--yes"])
    assert job.run == run and run.status().step == 5 and run.status().of == 9
    trainer, ending = train(Regression, run, resume=True)
    assert ending.state == "finished" and [row["step"] for row in Journal(run.metrics).rows()] == [1, 2, 4, 6, 8, 9]
    assert json.loads(run.status_file.read_text())["step"] == 9


class Takes(Callback):
    """Takes the run's folder away within a step."""

    order = 10

    def __init__(self, run: RunDir, step: int, how: str) -> None:
        self.run, self.step, self.how = run, step, how

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            away = self.run.path.with_name("away")
            if self.how == "replaced":  # else a snapshot may be under way
                trainer.saver.finish(patient=True)
            self.run.path.rename(away)
            if self.how == "replaced":
                shutil.copytree(away, self.run.path)
            if self.how != "moved":
                shutil.rmtree(away, ignore_errors=True)


@pytest.mark.parametrize("step", [4, 5])  # one with an evaluation, a log line and a snapshot, one without
@pytest.mark.parametrize("how", ["moved", "deleted", "replaced"])
def test_a_folder_that_is_taken_away_ends_its_run_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str,
                                                              caplog: pytest.LogCaptureFixture, step: int) -> None:
    run = new_run(tmp_path, Regression)
    stage = with_callbacks(Regression, Takes(run, step, how))
    job = Job(stage, Parsed(stage.Config(**QUICK), frozenset(QUICK), ""))
    monkeypatch.setattr(launch.logs, "to_file", lambda path, background: None)
    monkeypatch.setattr(launch, "_faults", lambda descriptor: nullcontext())
    caplog.set_level(logging.INFO)
    with Signals() as signals, run.lock():
        assert launch._locked(job, run, signals, False, None, None) == launch.FAILED
    [line] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    done = "moved" if how == "moved" else "deleted or replaced"
    assert line.getMessage() == f"Training failed: {run.path} was {done} while it was trained" and not line.exc_info
    moved = RunDir(tmp_path / "away")
    if how == "moved":
        assert moved.state() == "failed" and "was moved" in moved.status().reason
        assert f"Resume: ./run/resume.sh {moved.path}" in caplog.text
        assert train(Regression, moved, resume=True)[1].state == "finished"
    elif how == "replaced":
        assert run.status().state != "failed", "what stands there by now may be somebody else's"


def test_data_that_are_gone_are_told_before_the_start(tmp_path: Path, text: Path) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    text.unlink()
    with pytest.raises(UserError, match="there is no such file"):
        launch.decide(LanguageModel, ["--resume", run.name, "--yes"])


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


# -- the folder in which a run was started --------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--resume", "run", "--yes"], ["--eval_only", "--resume", "run"],
                                  ["--eval_only", "--resume", "run", "--dataset", "../mine.csv"]])
def test_files_that_a_csv_names_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              argv: list[str]) -> None:
    """The guides' CSV names files from the folder in which the run is started, not beside itself. One that is typed for
    an evaluation names them from where that is started."""
    for folder in ("start/data", "elsewhere/data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.wav").touch()
    (tmp_path / "mine.csv").write_text("audio_path,transcription\ndata/a.wav,hello\n")
    (tmp_path / "start/data/list.csv").write_text("audio_path,transcription\ndata/a.wav,hello\n")
    monkeypatch.chdir(tmp_path / "start")
    job = launch.decide(AudioEncoder, ["--dataset", "data/list.csv"])
    typed = {name: getattr(job.cfg, name) for name in job.parsed.typed}
    assert typed["working_folder"] == str(tmp_path / "start")
    assert typed["dataset"] == str(tmp_path / "start/data/list.csv")
    status = Status("audio_enc", "train_audio_enc.py", job.cfg.dataset, "", "stopped", typed=typed)
    rundir.create(tmp_path, "run", status)

    monkeypatch.chdir(tmp_path / "elsewhere")
    found: list[str] = []
    for name in ("start", "_evaluate"):
        monkeypatch.setattr(launch, name, lambda job: found.extend(
            each.path for _, each in speech.listed(job.cfg.dataset)) or 0)
    monkeypatch.setattr(pretrained, "of_run", lambda run: pretrained.Pretrained(run.path, True, "audio_enc"))
    monkeypatch.setattr(AudioEncoder, "taken_from", lambda pretrained: {})
    where = "elsewhere" if "../mine.csv" in argv else "start"
    assert launch._main(AudioEncoder, argv) == 0 and found == [str(tmp_path / where / "data/a.wav")]


def test_the_working_folder_may_be_typed_or_gone(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    argv = ["--dataset", "text.txt", *SMALL]
    assert launch.decide(LanguageModel, argv).cfg.working_folder == str(tmp_path)
    typed = launch.decide(LanguageModel, [*argv, "--working_folder", "other"])
    assert typed.cfg.working_folder == str(tmp_path / "other")
    with pytest.raises(UserError, match="--working_folder nowhere: there is no such folder"):
        launch.decide(LanguageModel, [*argv, "--working_folder", "nowhere"])
    run = begun(tmp_path, *argv, "--working_folder", "other")
    (tmp_path / "other").rmdir()
    assert launch.decide(LanguageModel, ["--resume", run.name]).cfg.working_folder == str(tmp_path / "other")
    assert os.getcwd() == str(tmp_path)


def test_without_locks_the_process_itself_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    def none(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    run = new_run(tmp_path, Regression)
    with run.lock():
        holder = run.holder()
        assert holder is not None and holder.pid == os.getpid() and "without locks" in caplog.text
    run.lock_file.write_text(json.dumps({"pid": os.getpid(), "started": 1, "boot": "another"}))
    assert run.holder() is None


def test_another_run_on_the_same_device_is_told_of(tmp_path: Path) -> None:
    mine, other = new_run(tmp_path, Regression), new_run(tmp_path, Regression)
    mine.write_status(replace(mine.status(), device="cpu"))
    with other.lock():
        for device, lines in (("cuda:0 (x)", 0), ("cpu", 1)):
            other.write_status(replace(other.status(), device=device))
            told = session(Regression, mine)._neighbours()
            assert len(told) == lines and all(other.name in line and str(os.getpid()) in line for line in told)


def test_a_run_that_has_taken_its_time_is_stopped_and_goes_on(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    trainer, ending = train(Regression, run, max_minutes=1e-9)
    assert (ending.state, trainer.step, run.snapshots.name) == ("stopped", 1, "snapshots")
    trainer, ending = train(Regression, run, resume=True, max_minutes=0.0)
    assert (ending.state, trainer.step) == ("finished", 9)


# -- real processes -----------------------------------------------------------------------------------------------


def script(*argv: str, stderr: int = subprocess.DEVNULL, path: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-P", str(PROJECT / "src/training/train_lm.py"), *argv], text=True,
                            stderr=stderr, env=os.environ | {"PYTHONPATH": f"{path}:{PROJECT / 'src'}"})


LATE = """
import sys, time
from pathlib import Path

class Late:  # halfway through torch/__init__.py
    def find_spec(name, path=None, target=None):
        if name == "torch._C":
            Path("importing").touch()
            try:
                while not Path("go on").exists():
                    time.sleep(0.01)
            except BaseException:  # as some imports do
                pass

sys.meta_path.insert(0, Late)
"""


def test_a_stop_while_torch_is_imported(tmp_path: Path, text: Path) -> None:
    """It is answered, and obeyed when the import is over: within, it could abort the process."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    process = script("--dataset", "text.txt", *SMALL, "--result_dir", "runs", "--run_name", "early", path=str(tmp_path))
    run = RunDir(tmp_path / "runs/early")
    while not (tmp_path / "importing").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    while "SIGTERM: stopping" not in run.latest_log.read_text():
        time.sleep(0.01)
    (tmp_path / "go on").touch()
    assert process.wait(60) == 0
    assert run.state() == "stopped" and run.status().reason == "SIGTERM received before training began"
    log = run.latest_log.read_text()
    assert "SIGTERM received before training began" in log and "Device:" not in log


def test_a_refused_resume_leaves_no_trace(tmp_path: Path, text: Path) -> None:
    long = ["--max_steps", "100000"]
    process = script("--dataset", "text.txt", *unless_typed(SMALL, long), *long, "--max_seq_len", "16", "--result_dir",
                     "runs", "--run_name", "mine")
    run = RunDir(tmp_path / "runs/mine")
    while not (run.path.exists() and run.status().step):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    before = run.status(), sorted(path.name for path in (run.path / "logs").iterdir()), run.latest_log.resolve()
    text.write_text("two three four\n" * 100 + text.read_text())
    again = script("--resume", str(run.path), "--yes", stderr=subprocess.PIPE)
    told = again.communicate(timeout=30)[1]
    assert again.returncode == 2 and told.count("the data are not those of the interrupted run") == 1
    assert "Traceback" not in told and "ERROR" not in told
    after = run.status(), sorted(path.name for path in (run.path / "logs").iterdir()), run.latest_log.resolve()
    statuses = [replace(status, heartbeat=0, awake=0) for status, *_ in (before, after)]
    assert statuses[0] == statuses[1] and after[1:] == before[1:]


def test_a_refused_run_leaves_the_link_to_the_one_before(tmp_path: Path) -> None:
    first = new_run(tmp_path, Regression)
    train(Regression, first)
    other = new_run(tmp_path, Regression)
    with pytest.raises(UserError, match="is of another model"):
        sitting_with_other_shape(other, first)
    other.remove()
    assert (tmp_path / "regression_toy").resolve() == first.path


def sitting_with_other_shape(run: RunDir, first: RunDir) -> None:
    sitting = session(Regression, run, width=6, snapshot=first.snapshots / "snapshot_epoch_0003")
    with run.lock():
        trainer, snapshot = sitting.prepare()
        trainer.fit(snapshot)


def test_a_finished_run_is_extended_and_tells_its_end(tmp_path: Path, text: Path) -> None:
    """The learning rate follows the longer plan; the command that was asked for runs at each end."""
    start = ["--dataset", "text.txt", *SMALL, "--max_seq_len", "16", "--result_dir", "runs", "--run_name", "mine",
             "--log_interval", "1", "--warmup_steps", "0", "--on_end",
             'echo "$STOKER_STATE: $STOKER_REASON" >> ends; false']
    run = RunDir(tmp_path / "runs/mine")
    assert script(*start).wait(200) == 0 and run.state() == "finished"
    assert (tmp_path / "ends").read_text() == "finished: all steps done\n"
    assert "--on_end" in run.latest_log.read_text() and "exit code 1" in run.latest_log.read_text()
    assert "Trained for " in run.latest_log.read_text() and "; the estimate was " in run.latest_log.read_text()
    assert script("--resume", "runs/mine", "--yes").wait(60) == 2
    assert script("--resume", "runs/mine", "--yes", "--extend_steps", "6").wait(200) == 0
    rates = {row["step"]: row["lr"] for row in Journal(run.metrics).rows()}
    assert sorted(rates) == list(range(1, 16)) and run.status().of == 15
    assert rates[9] == pytest.approx(3e-4 * optim.rate(8, 9, warmup=0, min_ratio=0.1, schedule="cosine"))
    assert rates[10] == pytest.approx(3e-4 * optim.rate(9, 15, warmup=0, min_ratio=0.1, schedule="cosine"))
    assert "planned for 9 steps, now for 15" in run.latest_log.read_text()
    assert json.loads(run.config_file.read_text())["extend_steps"] == 0


PROGRAM = """
import sys
from pathlib import Path
from config import Parsed, UserError
from toys import QUICK, Regression, with_callbacks
from training.callback import Callback
from training.launch import Job, start

class Fails(Callback):
    order = 10
    def on_batch(self, trainer, batch):
        if trainer.step == {at}:
            raise {error}("a picture of the batch cannot be read")

stage = with_callbacks(Regression, Fails())
options = QUICK | {{"result_dir": sys.argv[1], "run_name": "mine"}}
sys.exit(start(Job(stage, Parsed(stage.Config(**options), frozenset(options), ""))))
"""


@pytest.mark.parametrize("error", ["UserError", "RuntimeError"])
def test_what_fails_in_training_leaves_the_run(tmp_path: Path, error: str) -> None:
    """Also a user's mistake that shows itself only then: hours of training are not deleted for it."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(at=4, error=error), str(tmp_path)], text=True,
                           capture_output=True, env=os.environ | {"PYTHONPATH": "src:tests"}, cwd=PROJECT)
    run = RunDir(tmp_path / "mine")
    assert ended.returncode == 1 and run.state() == "failed" and run.status().step == 4
    known = error == "UserError"  # its message says everything
    assert run.status().reason == f"{'' if known else 'RuntimeError: '}a picture of the batch cannot be read"
    lines = run.latest_log.read_text().splitlines()
    assert any("Traceback" in line for line in lines) != known and all(line.startswith("[20") for line in lines)
    assert (run.snapshots / "snapshot_epoch_0001" / "manifest.json").exists()
