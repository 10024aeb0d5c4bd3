"""Which run a command line means, and what becomes of one that is stopped or refused early."""

import errno
import fcntl
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from desk import SMALL
from stoker.config import Parsed, UserError
from stoker.daemon import rundir
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir, Status
from stoker.data.speech import recordings
from stoker.training.assembly import launch
from stoker.training.assembly.job import Job
from stoker.training.core import pretrained
from stoker.training.core.callback import Callback
from stoker.training.core.signals import Signals
from stoker.training.train_audio_enc import AudioEncoder
from stoker.training.train_lm import LanguageModel
from stoker.training.trainer import Trainer
from toys import QUICK, Regression, StopAt, new_run, session, train, with_callbacks


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
        job = launch.decide(LanguageModel, command[command.index(sys.argv[0]) + 1:])
        assert job.run == run and not job.asks


@pytest.mark.parametrize("argv, why", [(["--lr", "0.001"], "--lr 0.001 differs from the 0.0003"),
                                       (["--epochs", "3"], "--epochs 3 differs from the 1"),
                                       (["--preset", "tiny"], "has preset none")])
def test_what_would_be_another_run_is_refused(tmp_path: Path, text: Path, argv: list[str], why: str) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL, epochs=1)
    with pytest.raises(UserError, match=why):
        launch.decide(LanguageModel, ["--resume", run.name, *argv])


def test_harmless_options_may_be_typed_again(tmp_path: Path, text: Path) -> None:
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


def test_a_broken_config_is_reported(tmp_path: Path, text: Path) -> None:
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
    assert launch.decide(LanguageModel, command[command.index(sys.argv[0]) + 1:]).cfg.on_end == COMMAND


def test_the_command_runs_though_the_folder_is_gone(tmp_path: Path) -> None:
    launch._run_on_end(f'echo "$STOKER_STATE: $STOKER_REASON" > {tmp_path}/end', RunDir(tmp_path / "gone"))
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


def test_data_that_are_gone_are_reported_before_the_start(tmp_path: Path, text: Path) -> None:
    run = begun(tmp_path, "--dataset", "text.txt", *SMALL)
    text.unlink()
    with pytest.raises(UserError, match="there is no such file"):
        launch.decide(LanguageModel, ["--resume", run.name, "--yes"])


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
            each.path for _, each in recordings.listed(job.cfg.dataset)) or 0)
    monkeypatch.setattr(pretrained, "of_run", lambda run: pretrained.Pretrained(run.path, True, "audio_enc"))
    monkeypatch.setattr(AudioEncoder, "options_from", lambda pretrained: {})
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


def test_another_run_on_the_same_device_is_reported(tmp_path: Path) -> None:
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
