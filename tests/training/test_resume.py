"""A run that was interrupted is the run that was not: bit for bit, wherever it was."""

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.monitors.journal import JournalWriter
from stoker.training.assembly import receipt
from stoker.training.core import manifest
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer
from toys import (
    QUICK,
    TOYS,
    Buffers,
    Killed,
    Regression,
    StopAt,
    Toy,
    assert_same,
    new_run,
    session,
    train,
    with_callbacks,
)


def everything(run: RunDir) -> dict[str, Any]:
    """The last snapshot of a run, and its journal."""
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": load_file(last / "model.safetensors"), "state": torch.load(last / "state.pt", weights_only=True),
            "metrics": list(Journal(run.metrics).rows()), "name": last.name}


def interrupted(tmp_path: Path, stage: type[Toy], at: int, resumed: type[Toy] | None = None, **options: Any) -> RunDir:
    run = new_run(tmp_path, stage)
    trainer, ending = train(with_callbacks(stage, StopAt(at)), run, **options)
    assert (ending.state, trainer.step) == ("stopped", at)
    trainer, ending = train(with_callbacks(resumed or stage, StopAt(-1)), run, resume=True, **options)
    assert (ending.state, trainer.step) == ("finished", 9)
    return run


# 22 rows, 8 to a step: steps 1, 2, 4 and 5 lie within an epoch, 3 and 6 at its end, an evaluation is due at 4.
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_resumed_is_uninterrupted(tmp_path: Path, toy: type[Toy], at: int) -> None:
    whole = new_run(tmp_path, toy)
    train(with_callbacks(toy, StopAt(-1)), whole)
    assert_same(everything(whole), everything(interrupted(tmp_path, toy, at)))


def test_resumed_with_loader_workers(tmp_path: Path) -> None:
    """What the workers read ahead does not count, and their number does not matter."""
    whole, others = new_run(tmp_path, Buffers), set(multiprocessing.active_children())
    train(with_callbacks(Buffers, StopAt(-1)), whole, num_workers=2)
    assert_same(everything(whole), everything(interrupted(tmp_path, Buffers, 4, num_workers=2)))
    assert_same(everything(whole), everything(interrupted(tmp_path, Buffers, 4, num_workers=0)))
    assert not set(multiprocessing.active_children()) - others, "they end with the training"


def test_resumed_twice(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(-1)), whole)
    for at in (2, 7, -1):
        train(with_callbacks(Buffers, StopAt(at)), run, resume=at != 2)
    assert_same(everything(whole), everything(run))


class StopInEvaluation(Buffers):
    """A signal comes while the second batch of the evaluation of step 4 is scored."""

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        for callback in self.extra:
            if isinstance(callback, Signalling) and callback.trainer and callback.trainer.step == 4:
                callback.trainer.signals.stop = "SIGTERM"
        return super().score(model, batch)


@dataclass
class Signalling(Callback):
    order = ACT
    trainer: Trainer | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.trainer = trainer


def test_an_abandoned_evaluation_is_done_first_on_resume(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(-1)), whole)
    trainer, ending = train(with_callbacks(StopInEvaluation, Signalling()), run)
    assert (ending.state, trainer.step) == ("stopped", 4)
    assert [row["step"] for row in Journal(run.metrics).rows()] == [1, 2]  # its line is owed, with the evaluation
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    assert_same(everything(whole), everything(run))


@pytest.mark.parametrize("at", [3, 5, 8])
def test_killed_between_snapshots(tmp_path: Path, at: int) -> None:
    """Lines written after the last snapshot are cut, so each step stands in the journal once."""
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(-1)), whole)
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Buffers, Killed(at)), run)
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    assert_same(everything(whole), everything(run))


def test_early_stopping_goes_on_where_it_was(tmp_path: Path) -> None:
    """Three steps are an epoch: it is stopped in the midst of one, after an evaluation in it."""
    options: dict[str, Any] = dict(early_stopping=True, early_stop_patience=2, early_stop_min_delta=9.0,
                                   eval_interval=1, early_stop_overfit_patience=50)
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    trainer, ending = train(with_callbacks(Buffers, StopAt(-1)), whole, **options)
    assert trainer.step == 7 and ending.reason.endswith("in 2 epochs")  # the first, at step 1, is the best
    train(with_callbacks(Buffers, StopAt(5)), run, **options)
    trainer, again = train(with_callbacks(Buffers, StopAt(-1)), run, resume=True, **options)
    assert again == ending
    assert_same(everything(whole), everything(run))
    trainer, again = train(with_callbacks(Buffers, StopAt(-1)), run, resume=True, **options)
    assert again == ending and trainer.step == 7  # killed after it had stopped, it does not train on


def test_going_on_from_an_older_snapshot(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(-1)), whole)
    train(with_callbacks(Buffers, StopAt(7)), run)
    older = run.snapshots / "snapshot_step_00000004"
    sitting = session(with_callbacks(Buffers, StopAt(-1)), run, resume=True, snapshot=older)
    with run.lock():
        trainer, snapshot = sitting.prepare()
        trainer.fit(snapshot)
    assert snapshot == older
    assert_same(everything(whole), everything(run))


class OtherData(Regression):
    def made_from(self) -> dict[str, str]:
        return {"content": "other"}


def test_later_snapshots_of_a_course_that_was_left_are_set_aside(tmp_path: Path) -> None:
    """Killed after going on from step 4, it goes on from there again, not from the old step 7."""
    run = new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(7)), run)
    sitting = session(with_callbacks(Buffers, Killed(5)), run, resume=True,
                      snapshot=run.snapshots / "snapshot_step_00000004")
    with run.lock(), pytest.raises(KeyboardInterrupt):
        trainer, snapshot = sitting.prepare()
        trainer.fit(snapshot)
    newest = Snapshots(run.snapshots, {}).newest_good()
    assert newest is not None and newest.name == "snapshot_step_00000004"
    assert (run.snapshots / "abandoned_snapshot_step_00000007").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """Fewer rows make a shorter run: its config must not be settled anew before that is noticed."""
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(4)), run, max_steps=None, epochs=3)
    before = run.config_file.read_text()
    with pytest.raises(UserError, match=r"made with \(rows 22 -> 8\)"):
        train(Regression, run, resume=True, rows=8)
    assert run.config_file.read_text() == before
    _, ending = train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    assert ending.state == "finished"


def test_weights_asked_for_are_taken_also_if_the_start_was_interrupted(tmp_path: Path) -> None:
    first, run = new_run(tmp_path, Regression), new_run(tmp_path, Regression)
    train(Regression, first)
    options: dict[str, Any] = {"init_from": str(first.snapshots / "snapshot_epoch_0003")}
    run.config_file.write_text(json.dumps(options))  # as it stands before training began
    trainer, _ = train(Regression, run, resume=True, **QUICK | {"max_steps": 1, "lr": 1e-9})
    from safetensors.torch import load_file

    expected = load_file(first.snapshots / "snapshot_epoch_0003" / "model.safetensors")["0.weight"]
    torch.testing.assert_close(trainer.model[0].weight.detach(), expected, rtol=0, atol=1e-7)
    Path(options["init_from"]).rename(tmp_path / "gone")
    other = new_run(tmp_path, Regression)
    other.config_file.write_text(json.dumps(options))
    with pytest.raises(UserError, match="not found"):
        train(Regression, other, resume=True, **QUICK)


@pytest.mark.parametrize("fails", ["state_dict", "load_state_dict"])
def test_a_monitor_whose_state_fails_does_not_end_the_run(tmp_path: Path, fails: str) -> None:
    @dataclass
    class Fails(Callback):
        def state_dict(self) -> dict[str, Any]:
            if fails == "state_dict":
                raise RuntimeError("on purpose")
            return {"n": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise RuntimeError("on purpose")

    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(4), Fails()), run)
    trainer, ending = train(with_callbacks(Regression, StopAt(-1), Fails()), run, resume=True)
    assert ending.state == "finished" and trainer.switched_off == ["Fails"]


@dataclass
class AsksAtLog(Callback):
    """Asks for an evaluation in the log event of step 2: it comes after step 3, also if a stop lies between."""

    order = ACT

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.step == 2:
            trainer.ask("eval", "curious")


def test_what_is_asked_while_acting_is_done_after_the_next_step(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(-1), AsksAtLog()), whole, eval_interval=99)
    assert [row["step"] for row in Journal(whole.metrics).rows() if "eval/loss" in row] == [3, 9]
    train(with_callbacks(Buffers, StopAt(2), AsksAtLog()), run, eval_interval=99)
    train(with_callbacks(Buffers, StopAt(-1), AsksAtLog()), run, resume=True)
    assert_same(everything(whole), everything(run))


def test_other_data_are_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(4)), run)
    before = sorted(p.name for p in run.snapshots.iterdir())
    with pytest.raises(UserError, match="the data are not those of the interrupted run"):
        train(OtherData, run, resume=True)
    assert sorted(p.name for p in run.snapshots.iterdir()) == before


def test_the_state_of_an_absent_monitor_is_dropped_and_of_an_acting_one_refused(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Counts(Callback):
        order = 50

        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

    class Acts(Counts):
        order = ACT

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("it is missing")

    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(4), Counts()), run)
    train(with_callbacks(Regression, StopAt(5)), run, resume=True)
    assert "the state of Counts is dropped" in caplog.text
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(4), Acts()), run)
    with pytest.raises(UserError, match="Acts"):
        train(Regression, run, resume=True)


def test_the_receipt_lists_what_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(4)), run)
    train(with_callbacks(Regression, StopAt(5)), run, resume=True)
    assert "Receipt: same configuration, data, code, packages, device and threads" in caplog.text
    train(Regression, run, resume=True, log_interval=3, threads=2)
    assert "config.log_interval: 2 -> 3" in caplog.text and "\n  threads: 1 -> 2" in "\n" + "\n".join(caplog.messages)


class NoNewBest(StopInEvaluation):
    """The evaluation of step 4 is no better than that of step 2, so nothing is saved on its account."""

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        super().score(model, batch)
        return {"loss": Ratio(1.0, 1)}


def test_killed_after_an_owed_evaluation_was_logged(tmp_path: Path) -> None:
    """Its line stands in the journal, but the snapshot still owes it: it must not stand there twice."""
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    train(with_callbacks(NoNewBest, StopAt(-1)), whole, eval_interval=2)
    train(with_callbacks(NoNewBest, Signalling()), run, eval_interval=2)
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(NoNewBest, Killed(5)), run, resume=True)
    assert [row["step"] for row in Journal(run.metrics).rows()] == [1, 2, 4]
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(NoNewBest, Killed(5)), run, resume=True)
    train(with_callbacks(NoNewBest, StopAt(-1)), run, resume=True)
    assert list(Journal(whole.metrics).rows()) == list(Journal(run.metrics).rows())


# -- what differs ---------------------------------------------------------------------------------------------------


def files_of(run: RunDir) -> dict[str, bytes]:
    """Everything in a run's folder but its lock; of the status all but the heartbeat."""
    found = {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*")
             if path.is_file() and path != run.lock_file}
    found["status.json"] = json.dumps(json.loads(found["status.json"]) | {"heartbeat": 0}).encode()
    return found


def edit(run: RunDir, **options: Any) -> None:
    run.config_file.write_text(json.dumps(json.loads(run.config_file.read_text()) | options))


@pytest.fixture
def stopped(tmp_path: Path) -> RunDir:
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(4)), run)
    return run


@pytest.mark.parametrize("options", [
    {"seed": 43}, {"batch_size": 2}, {"batch_size": 8, "grad_accum_steps": 1}, {"lr": 0.02}, {"lr_schedule": "linear"},
    {"warmup_steps": 3}, {"width": 6}, {"precision": "bf16"}, {"eval_interval": 5}, {"weight_decay": 0.0, "seed": 0},
])
def test_a_config_edited_by_hand_is_refused(stopped: RunDir, options: dict[str, Any]) -> None:
    """By name and with both values, before a model is built; put back, the run goes on."""
    before = json.loads(stopped.config_file.read_text())
    edit(stopped, **options)
    sitting = session(Regression, stopped, resume=True)
    told = ", ".join(f"{name} {before[name]} -> {options[name]}" for name in sorted(options))
    with stopped.lock(), pytest.raises(UserError, match=re.escape(f"made with ({told}): put it back")) as refusal:
        sitting.prepare()
    assert len(refusal.value.problems) == 1
    edit(stopped, **before)
    assert train(with_callbacks(Regression, StopAt(-1)), stopped, resume=True)[1].state == "finished"


@pytest.mark.parametrize("options", [{"log_interval": 3}, {"threads": 2}, {"keep_last_n_snapshots": 1}])
def test_harmless_differences_are_listed(stopped: RunDir, caplog: pytest.LogCaptureFixture,
                                         options: dict[str, Any]) -> None:
    before = json.loads(stopped.config_file.read_text())
    edit(stopped, **options)
    assert train(with_callbacks(Regression, StopAt(-1)), stopped, resume=True)[1].state == "finished"
    assert all(f"  config.{name}: {before[name]} -> {value}" in caplog.messages for name, value in options.items())


@pytest.mark.parametrize("options, steps", [({"max_steps": 3}, 3), ({"max_steps": 90}, 90), ({"epochs": 1}, 3),
                                            ({"max_steps": 3, "epochs": 1}, 3)])
def test_a_length_edited_by_hand_is_refused(stopped: RunDir, options: dict[str, Any], steps: int) -> None:
    """Or a run of which a digit was damaged would be finished, at step 4 of 9, without a word."""
    before = json.loads(stopped.config_file.read_text())
    edit(stopped, **{"max_steps": 9, "epochs": 99} | options)
    with pytest.raises(UserError, match=f"makes a run of {steps} steps, but .* was made in one of 9: put max_") as no:
        train(Regression, stopped, resume=True)
    assert len(no.value.problems) == 1 and not list(stopped.models.iterdir())
    edit(stopped, **before)
    assert train(with_callbacks(Regression, StopAt(-1)), stopped, resume=True)[1].state == "finished"


def test_an_extended_run_is_resumed_before_its_first_new_snapshot(logged: RunDir) -> None:
    """The newest snapshot is still of the shorter plan."""
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Regression, Killed(6)), logged, resume=True, extend_steps=5, max_steps=14, epochs=99)
    newest = Snapshots(logged.snapshots, {}).newest_good()
    assert newest and manifest.read(newest)["made_by"]["config"]["max_steps"] == 9
    trainer, ending = train(with_callbacks(Regression, StopAt(-1)), logged, resume=True)
    assert (ending.state, trainer.step) == ("finished", 14)


@pytest.mark.parametrize("then, now, refused", [(False, True, True), (True, False, False)])
def test_a_run_is_never_compiled_by_an_edit(stopped: RunDir, then: bool, now: bool, refused: bool) -> None:
    """It may go on without a compiler where there is none any more; the other way round somebody changed it."""
    snapshot = stopped.snapshots / "snapshot_step_00000004"
    made_by = manifest.read(snapshot)["made_by"]
    made_by["config"]["compile"] = then
    manifest.write(snapshot, 4, manifest.read(snapshot)["files"], made_by)
    now_made_by = {**made_by, "config": {**made_by["config"], "compile": now}}
    if refused:
        with pytest.raises(UserError, match="compile False -> True"):
            receipt.compare(snapshot, now_made_by, Regression.Config, extended=False)
    else:
        assert receipt.compare(snapshot, now_made_by, Regression.Config, extended=False) == [
            "config.compile: True -> False"]


# -- a journal that was damaged -------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path: Path) -> RunDir:
    """Stopped after step 5, with rows of steps 1, 2 and 4."""
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run)
    assert [row["step"] for row in Journal(run.metrics).rows()] == [1, 2, 4]
    return run


def lose(damage: Callable[[list[str]], list[str]]) -> Callable[[RunDir], object]:
    return lambda run: run.metrics.write_text("".join(damage(run.metrics.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize("damage, line", [
    (lose(lambda lines: lines[:1]), "lost its rows of steps 2-4 (2 of 3)"),
    (lambda run: run.metrics.unlink(), "lost its rows of steps 1-4 (3 of 3)"),
    (lose(lambda lines: [lines[0], lines[1].replace('"step"', '"stfp"'), lines[2]]), "lost its row of step 2 (1 of 3)"),
    (lose(lambda lines: [re.sub(r"\.\d", ".x", lines[0], count=1), *lines[1:]]), "lost its row of step 1 (1 of 3)"),
    (lose(lambda lines: [re.sub(r"\.\d", ".0", lines[0], count=1), *lines[1:]]), "has other figures up to step 4"),
])
def test_a_damaged_journal_is_named_and_the_run_continues(logged: RunDir, caplog: pytest.LogCaptureFixture,
                                                        damage: Callable[[RunDir], object], line: str) -> None:
    """The same weights, the rows that are left, and those that come; the next resume has nothing to add."""
    damage(logged)
    train(with_callbacks(Regression, StopAt(7)), logged, resume=True)
    told = [message for message in caplog.messages if message.startswith("metrics.jsonl")]
    assert len(told) == 1 and line in told[0] and "training continues" in told[0]
    caplog.clear()
    trainer, ending = train(with_callbacks(Regression, StopAt(-1)), logged, resume=True)
    assert ending.state == "finished" and not trainer.switched_off
    assert not [message for message in caplog.messages if message.startswith("metrics.jsonl")]
    steps = [row["step"] for row in Journal(logged.metrics).rows()]
    assert steps == sorted(set(steps)) and steps[-3:] == [6, 8, 9]


def test_a_journal_as_it_was_written_gets_no_warning(logged: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """Nor one with rows that came after the snapshot, or whose snapshot is of an earlier version."""
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Regression, Killed(9)), logged, resume=True, snapshot_interval=90)
    train(with_callbacks(Regression, StopAt(7)), logged, resume=True)
    JournalWriter(logged.metrics, logged.timings).load_state_dict({})
    assert not [message for message in caplog.messages if message.startswith("metrics.jsonl")]


def test_a_finished_run_with_a_damaged_row_has_its_models(tmp_path: Path) -> None:
    """A row without its step once made every export fail."""
    run = new_run(tmp_path, Regression)
    damage = lose(lambda lines: [lines[0].replace('"step"', '"stfp"'), *lines[1:]])
    callback = type("Damage", (Callback,), {"on_save": lambda self, trainer, path: damage(run)})()
    with run.lock():
        ending = session(with_callbacks(Regression, callback), run).train()
    assert ending.state == "finished" and sorted(path.name for path in run.models.iterdir()) == ["best", "final"]


def test_snapshots_of_other_stages_and_runs_are_refused(tmp_path: Path, stopped: RunDir) -> None:
    """Copied in by hand, later than the run's own: whole, and not of this run."""
    for other, options, why in ((Buffers, {}, "of another stage"), (Regression, {"seed": 1}, "seed 1 -> 42"),
                                (Regression, {"rows": 30}, "rows 30 -> 22")):
        run = new_run(tmp_path, other)
        train(with_callbacks(other, StopAt(5)), run, **options)
        shutil.copytree(run.snapshots / "snapshot_step_00000005", stopped.snapshots / "snapshot_step_00000005")
        before = files_of(stopped)
        with pytest.raises(UserError, match=why):
            train(Regression, stopped, resume=True)
        changed = {name for name, content in files_of(stopped).items() if before.get(name) != content}
        assert changed <= {"status.json"}, "which `launch` puts back"
        shutil.rmtree(stopped.snapshots / "snapshot_step_00000005")


def test_a_snapshot_that_records_less_goes_on(stopped: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """One of an older version."""
    folder = stopped.snapshots / "snapshot_step_00000004"
    known = manifest.read(folder)
    old = {name: known["made_by"][name] for name in known["made_by"] if name not in ("stage", "data")}
    del old["config"]["spike_factor"]
    manifest.write(folder, known["step"], known["files"], old)
    assert train(with_callbacks(Regression, StopAt(-1)), stopped, resume=True)[1].state == "finished"
    assert "  stage: not recorded -> regression" in caplog.messages
