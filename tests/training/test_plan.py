"""What a start computes is resolved once, and alike for training, --info, --eval_only and the replay of an incident."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from composed import Composed
from stoker import config, files
from stoker.config import Parsed, UserError
from stoker.daemon.rundir import RunDir
from stoker.data.loader import Order
from stoker.inference import replay
from stoker.training.assembly import decide, estimate, eval_only, pages
from stoker.training.assembly import session as sitting
from stoker.training.assembly.job import Job
from stoker.training.core import device as devices
from stoker.training.core import incident, pretrained
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.options import OF_ONE_START
from stoker.training.core.plan import resolve
from stoker.training.trainer import Trainer
from toys import QUICK, Buffers, Points, Regression, StopAt, new_run, planned, session, train, with_callbacks


class Counted(Regression):
    """Counts what is asked of it; like other stages it asks itself for its rows again and again."""

    calls: Counter[str] = Counter()

    def dataset(self, split: str) -> Points:
        self.calls[f"dataset {split}"] += 1
        return super().dataset(split)

    def splits(self) -> tuple[str, ...]:
        return "train", "validation", "test"

    def groups(self, split: str) -> Sequence[str]:
        return [str(row) for row in range(len(self.dataset(split)))]

    def order(self) -> Order:
        self.calls["order"] += 1
        return super().order()

    def evaluations(self) -> Sequence[Evaluation]:
        self.calls["evaluations"] += 1
        return super().evaluations()


def test_each_data_set_is_built_once_in_a_start(tmp_path: Path) -> None:
    """By the data check, the order, the estimate, the training, its evaluations, and the test score at the end."""
    Counted.calls.clear()
    run = new_run(tmp_path, Counted)
    with run.lock():
        assert session(Counted, run).train().state == "finished"
    assert Counted.calls == {"dataset train": 1, "dataset validation": 1, "dataset test": 1, "order": 1,
                             "evaluations": 1}


def test_a_stage_may_ask_the_one_that_it_is_derived_from_for_its_rows(tmp_path: Path) -> None:
    class Wider(Regression):
        def dataset(self, split: str) -> Points:
            points = super().dataset(split)
            return Points(points.rows, points.width + 1, points.offset)

    one, other = (Wider(Wider.Config(rows=rows), tmp_path) for rows in (5, 6))
    rows = one.dataset("train"), one.dataset("validation"), other.dataset("train")
    assert [(each.rows, each.width) for each in rows] == [(5, 9), (7, 9), (6, 9)]
    assert one.dataset("train") is rows[0] and Wider.dataset.__doc__ == Wider.__dict__["dataset"].__doc__


def incident_of(trainer: Trainer, run: RunDir) -> Path:
    batch = {"x": torch.full((2, 8), math.nan)}
    return incident.write(run.incidents, incident.Incident(3, incident.NON_FINITE, "batch x", "nan", [[0, 1]], []),
                          trainer.model, [batch])


class Noting(Buffers):
    """Notes the config that it makes its model by."""

    seen: list[dict[str, Any]] = []

    def model(self) -> nn.Module:
        self.seen.append(asdict(self.cfg))
        return super().model()


def test_training_info_evaluation_and_replay_compute_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "resolve_precision", lambda device, asked: "bf16" if asked == "auto" else asked)
    monkeypatch.setattr(replay, "of_run", lambda run: Noting)
    run, values = new_run(tmp_path, Noting), QUICK | {"threads": 0, "resume": "newest", "yes": True}
    parsed = Parsed(Noting.Config(**values), frozenset(values), "")
    trainer, _ = train(Noting, run, threads=0, yes=True)
    pages.figures(Noting, (parsed, []))
    eval_only.evaluated(Job(Noting, parsed, evaluated=pretrained.find(str(trainer.snapshots.at_step(9)))))
    recorded = config.to_json(trainer.cfg) | {"device": "cuda:99"}  # of another machine
    files.write_json(run.config_file, recorded)
    assert replay._replay(incident_of(trainer, run), "cpu") == replay.SAME
    kinds = {tuple(seen[name] for name in ("precision", "threads", *OF_ONE_START)) for seen in Noting.seen}
    assert kinds == {("bf16", torch.get_num_threads(), "", False, 0)} and len(Noting.seen) >= 5
    assert parsed.config == Noting.Config(**values), "what was typed stays as it is"


def test_a_step_with_a_frozen_part_is_done_again_with_its_weights(tmp_path: Path, source: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """They are neither in the incident nor in the snapshots, but in the folder that the newest snapshot names."""
    monkeypatch.setattr(replay, "of_run", lambda run: Composed)
    trainer, _ = train(Composed, run := new_run(tmp_path, Composed), thinker_ckpt=str(source), max_steps=2)
    assert replay._replay(incident_of(trainer, run), "cpu") == replay.SAME


@pytest.mark.parametrize("asked, expected", [("auto", "fp32"), ("bf16", "bf16")])
def test_precision_on_a_cpu(tmp_path: Path, asked: str, expected: str) -> None:
    setup = resolve(Regression, Regression.Config(precision=asked, device="cpu"), tmp_path)
    assert (setup.cfg.precision, setup.device) == (expected, torch.device("cpu")) and setup.stage.cfg is setup.cfg


def test_a_plan_is_not_changed_and_its_config_is_that_of_stage_and_run(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    trainer, _ = train(with_callbacks(Regression, StopAt(3)), run)
    assert trainer.cfg is trainer.stage.cfg
    assert config.to_json(trainer.cfg) == json.loads(run.config_file.read_text())
    plan = planned(trainer.stage)
    with pytest.raises(FrozenInstanceError):
        plan.cfg = replace(plan.cfg, compile=True)  # type: ignore[misc]


class Late(Regression):
    """Evaluates once, in the middle of the run."""

    def evaluations(self) -> Sequence[Evaluation]:
        return [replace(super().evaluations()[0], interval=self.cfg.max_steps // 2)]


def test_evaluations_may_depend_on_the_length_of_the_run(tmp_path: Path) -> None:
    plan = planned(Late(Late.Config(batch_size=11, epochs=5), tmp_path))
    assert plan.steps == 10 and plan.evaluations.intervals == {"eval": 5}


def test_smaller_micro_batches_are_another_plan_of_the_same_rows(tmp_path: Path) -> None:
    plan = planned(Regression(Regression.Config(batch_size=4, max_steps=3), tmp_path))
    small = plan.with_micro(3)
    assert [[len(part) for part in each.order.rows(0)] for each in (plan, small)] == [[4], [3, 1]]
    assert sum(small.order.rows(0), []) == sum(plan.order.rows(0), []) and small.evaluations is plan.evaluations


def test_a_sitting_that_goes_back_keeps_its_smaller_micro_batches(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    again = session(Regression, run)
    again.micro = 3
    with run.lock():
        assert again.prepare()[0].order.micro == 3


@pytest.mark.parametrize("asked", [None, True])
def test_during_a_trial_of_compiling_the_stage_has_the_options_asked_for(tmp_path: Path, asked: bool | None,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """It may pad its batches for a model that is compiled. Afterwards it has what was decided."""
    seen, stage = [], Regression(Regression.Config(compile=asked, max_steps=9), tmp_path)
    plan = planned(stage, samples=False, precision="fp32")

    def tried(found: estimate.Estimate, plan: Any) -> estimate.Estimate:
        seen.append(plan.stage.cfg.compile)
        return replace(found, compile_seconds=0.0, compiled_speedup=2.0, scatter=1.0)

    monkeypatch.setattr(estimate, "BUSY", math.inf)
    monkeypatch.setattr(decide, "LONG", 0.0)
    monkeypatch.setattr(estimate.blocks, "compiler_problem", lambda device: "")
    monkeypatch.setattr(decide, "try_compiled", tried)
    after, *_ = decide.expect(plan, started=0.0)
    assert seen == [asked] and after.cfg.compile is True is stage.cfg.compile and plan.cfg.compile is asked


def test_a_run_is_resumed_without_compiling_where_the_compiler_is_gone(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(Regression(Regression.Config(compile=True), tmp_path))
    for why in ("", "no compiler"):
        monkeypatch.setattr(estimate.blocks, "compiler_problem", lambda device: why)
        assert sitting._still_compiled(plan).cfg.compile is plan.stage.cfg.compile is (not why)


@pytest.mark.parametrize("start", ["training", "info"])
def test_no_rows_are_refused_in_a_line(tmp_path: Path, start: str) -> None:
    run, values = new_run(tmp_path, Regression), QUICK | {"rows": 0}
    parsed = Parsed(Regression.Config(**values), frozenset(values), "")
    starts = {"training": session(Regression, run, rows=0).prepare, "info": partial(pages.figures, Regression,
                                                                                   (parsed, []))}
    with run.lock(), pytest.raises(UserError, match="there are no train samples in the data"):
        starts[start]()
