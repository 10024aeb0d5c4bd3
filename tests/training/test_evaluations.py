"""Several evaluations of one stage, at intervals of their own, and what is reported of them."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.monitors import plots
from stoker.training.assembly import estimate
from stoker.training.assembly.length import Length
from stoker.training.core import bootstrap, pretrained
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.evaluation import Evaluations, merged
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.snapshots import Snapshots
from stoker.training.core.totals import Totals
from stoker.training.trainer import Trainer
from toys import Points, Regression, StopAt, assert_same, new_run, planned, session, train, with_callbacks

CPU = torch.device("cpu")
SIZES: dict[str, list[int]] = {}  # of the batches that each evaluation of `Three` saw, with the step


class Three(Regression):
    """Beside the usual evaluation, one that rolls out five noisy steps of the model, in batches of two on rows of its
    own, and one of the whole set, on at most five rows."""

    name = "three"
    best = "rollout/error", "min"

    def evaluations(self) -> Sequence[Evaluation]:
        return [*super().evaluations(),
                Evaluation("rollout", self.starts, lambda rows: {"start": torch.stack(rows)}, self.roll_out,
                           groups=self.thirds, every=2, batch_size=2),
                Evaluation("far", self.dataset, self.collate, lambda model, batch: {}, self.gather_far, self.judge_far,
                           interval=3, max_rows=5)]

    def starts(self, split: str) -> Points | None:
        return Points(11, self.cfg.width, 5000) if split in self.splits() and split != "train" else None

    def thirds(self, split: str) -> list[str]:
        return [str(row % 3) for row in range(11)]

    def roll_out(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
        assert not torch.is_grad_enabled() and not model.training
        SIZES.setdefault("rollout", []).append(len(batch["start"]))
        error = rolled_out(model, batch["start"])
        return {"error": Ratio(error, torch.full((len(error),), 2))}

    def gather_far(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"made": model(batch["x"])}

    def judge_far(self, gathered: Mapping[str, Tensor]) -> dict[str, float]:
        SIZES.setdefault("far", []).append(len(gathered["made"]))
        return {"distance": float(torch.cdist(gathered["made"], gathered["made"]).amax())}


class WithTest(Three):
    def splits(self) -> tuple[str, ...]:
        return "train", "validation", "test"


def rolled_out(model: nn.Module, x: Tensor) -> Tensor:
    for _ in range(5):
        x = model(x) + 0.1 * torch.randn_like(x)
    return x.square().mean(1)


def everything(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": load_file(last / "model.safetensors"), "state": torch.load(last / "state.pt", weights_only=True),
            "metrics": list(Journal(run.metrics).rows()), "name": last.name}


def evaluated(run: RunDir) -> dict[int, dict[str, float]]:
    """The scores of each step that has any."""
    found: dict[int, dict[str, float]] = {}
    for row in Journal(run.metrics).rows():
        for name in [name for name in row if name.split("/")[0] in ("eval", "rollout", "far")]:
            found.setdefault(row["step"], {})[name] = row[name]
    return found


# -- in a run -------------------------------------------------------------------------------------------------------


def test_each_is_done_at_its_own_interval_and_the_best_is_chosen_by_the_second(tmp_path: Path) -> None:
    SIZES.clear()
    run = new_run(tmp_path, Three)
    trainer, ending = train(Three, run)  # 9 steps, --eval_interval 4
    found = evaluated(run)
    assert ending.state == "finished" and {step: sorted(scores) for step, scores in found.items()} == {
        3: ["far/distance"], 4: ["eval/error", "eval/loss"], 6: ["far/distance"],
        8: ["eval/error", "eval/loss", "rollout/error"],
        9: ["eval/error", "eval/loss", "far/distance", "rollout/error"]}
    assert SIZES["rollout"] == [2] + 2 * [2, 2, 2, 2, 2, 1] and SIZES["far"] == [5, 5, 5]  # the first is the estimate's
    assert trainer.best == min(found[8]["rollout/error"], found[9]["rollout/error"])
    assert found[trainer.best_step]["rollout/error"] == trainer.best


def test_the_figures_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    run = new_run(tmp_path, Three)
    trainer, _ = train(Three, run)
    starts, rows = Points(11, 8, 5000), Points(7, 8, 1000)
    model = trainer.model.eval()
    with torch.no_grad():
        torch.manual_seed(trainer.cfg.seed)
        errors = [rolled_out(model, torch.stack([starts[i] for i in range(first, min(first + 2, 11))]))
                  for first in range(0, 11, 2)]
        made = torch.cat([model(rows[i][None]) for i in (0, 1, 2, 4, 5)])  # 5 of 7, evenly
    farthest = max(float((one - other).norm()) for one in made for other in made)
    last = evaluated(run)[9]
    assert last["rollout/error"] == pytest.approx(sum(float(part.double().sum()) for part in errors) / 22, rel=1e-6)
    assert last["far/distance"] == pytest.approx(farthest, rel=1e-5)


@dataclass
class StopInBatch(Callback):
    """A signal comes while the third batch of the rollout after step 8 is scored."""

    order = ACT

    def on_start(self, trainer: Trainer) -> None:
        self.trainer, before = trainer, trainer.evaluations.declared

        def score(model: nn.Module, batch: Batch) -> dict[str, Ratio]:
            self.batches = getattr(self, "batches", 0) + 1
            if trainer.step == 8 and self.batches == 3:
                trainer.signals.stop = "SIGTERM"
            return dict(before[1].score(model, batch))

        trainer.evaluations.declared = (before[0], replace(before[1], score=score), before[2])


def test_a_stop_in_one_is_obeyed_and_all_of_its_step_are_done_first_on_resume(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Three), new_run(tmp_path, Three)
    train(with_callbacks(Three, StopAt(-1)), whole)
    trainer, ending = train(with_callbacks(Three, StopInBatch()), run)
    assert (ending.state, trainer.step) == ("stopped", 8) and sorted(evaluated(run)) == [3, 4, 6]
    SIZES.clear()
    train(with_callbacks(Three, StopAt(-1)), run, resume=True)
    assert SIZES["rollout"] == 2 * [2, 2, 2, 2, 2, 1] and SIZES["far"] == [5]
    assert_same(everything(whole), everything(run))


def test_what_a_callback_asks_for_out_of_turn_is_all(tmp_path: Path) -> None:
    class Ask(Callback):
        order = ACT

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 5:
                trainer.ask("eval", "curiosity")

    run = new_run(tmp_path, Three)
    train(with_callbacks(Three, Ask()), run)
    assert sorted(evaluated(run)[5]) == ["eval/error", "eval/loss", "far/distance", "rollout/error"]


def test_early_stopping_waits_for_the_evaluation_of_the_best_metric(tmp_path: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    """In a run shorter than an epoch it counts those: every 8 steps, of which the second and third are no better."""
    class Worse(Three):
        def roll_out(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
            return {"error": Ratio(torch.ones(len(batch["start"])), torch.ones(len(batch["start"])))}

    with caplog.at_level(logging.INFO):
        trainer, ending = train(Worse, new_run(tmp_path, Worse), rows=800, max_steps=40, early_stopping=True,
                                early_stop_patience=2)
    assert any("2 evaluations without improvement of rollout/error (an evaluation every 8 steps" in line
               for line in caplog.messages)
    assert (trainer.step, trainer.best_step) == (24, 8) and ending.reason.startswith("early stopping: rollout/error")


def test_one_without_enough_memory_leaves_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Hungry(Three):
        best = "eval/loss", "min"

        def roll_out(self, model: nn.Module, batch: Batch) -> dict[str, Ratio]:
            if model.training is False and getattr(self, "begun", False):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().roll_out(model, batch)

        def begin(self) -> None:
            self.begun = True

    run = new_run(tmp_path, Hungry)
    trainer, ending = train(Hungry, run)
    assert sorted(evaluated(run)[9]) == ["eval/error", "eval/loss", "far/distance"] and trainer.best_step > 0
    assert "the last evaluation ran out of memory" in ending.reason
    assert "step 8 is not evaluated (rollout): an evaluation in batches of 1 does not fit into memory" in caplog.text


@pytest.mark.parametrize("limit, left", [(3, [0, 2, 4]), (7, range(7)), (100, range(7))])
def test_rows_are_left_out_where_that_is_typed_and_the_log_says_so(tmp_path: Path, limit: int, left: Sequence[int],
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path, Regression)
    with caplog.at_level(logging.INFO):
        trainer, _ = train(Regression, run, eval_max_rows=limit)
    assert f"Evaluation eval: every 4 steps, {len(left)} of 7 rows" in caplog.messages
    rows = Points(7, 8, 1000)
    x = torch.stack([rows[row] for row in left])
    with torch.no_grad():
        expected = float((trainer.model.eval()(x) - x.cumsum(1)).square().mean())
    assert evaluated(run)[9]["eval/loss"] == pytest.approx(expected, rel=1e-6)


def test_what_is_drawn_does_not_depend_on_when(tmp_path: Path) -> None:
    """So that `--eval_only` gives the figures of the journal again."""
    stage = Three(Three.Config(batch_size=4, precision="fp32", num_workers=0), tmp_path)
    model, known = stage.model(), Evaluations(stage, stage.cfg)
    torch.manual_seed(1)
    first = known.run("validation", model, stage.cfg, CPU, lambda: False)
    after = torch.rand(1)
    torch.manual_seed(2)
    assert merged(known.run("validation", model, stage.cfg, CPU, lambda: False) or []) == merged(first or [])
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the randomness of training is left alone"


# -- what is declared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, best, why", [
    (["train"], "train/loss", "'train'"), (["eval", "eval"], "eval/loss", "occurs once"),
    (["main"], "main/loss", "'main'"), (["Eval"], "Eval/loss", "lower case"), (["a/b"], "a/loss", "lower case"),
    (["eval"], "evla/loss", "evaluates eval"), ([], "eval/loss", "evaluates nothing")])
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, names: list[str], best: str,
                                                          why: str) -> None:
    class Named(Regression):
        def evaluations(self) -> list[Evaluation]:
            return [replace(super(Named, self).evaluations()[0], name=name) for name in names]

    Named.best = best, "min"
    run = new_run(tmp_path, Named)
    with pytest.raises(UserError, match=why):
        train(Named, run)
    assert not Snapshots(run.snapshots, {}).found()


@pytest.mark.parametrize("best, every, why", [
    (("eval/loss", "down"), 1, 'the second is "min" or "max"'), (("eval/loss", "min"), 0, "every is 0 and interval 0"),
    (("eval/loss", "min"), -2, "every must be at least 1")])
def test_how_the_best_is_chosen_and_how_often_is_checked(tmp_path: Path, best: tuple[str, str], every: int,
                                                         why: str) -> None:
    class Chosen(Regression):
        def evaluations(self) -> list[Evaluation]:
            return [replace(each, every=every) for each in super().evaluations()]

    Chosen.best = best
    with pytest.raises(UserError, match=why):
        train(Chosen, new_run(tmp_path, Chosen))


def test_a_best_metric_that_is_not_computed_is_an_error(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    with pytest.raises(UserError, match="names eval/los as its best metric, but evaluation eval computes eval/loss"):
        train(type("Typo", (Regression,), {"best": ("eval/los", "min")}), run)


@pytest.mark.parametrize("interval, own", [(4, 3), (1, 7), (5, 15), (100, 6)])
def test_evaluations_to_come_are_counted(tmp_path: Path, interval: int, own: int) -> None:
    class Two(Regression):
        def evaluations(self) -> list[Evaluation]:
            usual = super().evaluations()[0]
            return [usual, replace(usual, name="own", interval=own), replace(usual, name="rare", every=3)]

    stage = Two(Two.Config(eval_interval=interval), tmp_path)
    known, steps = Evaluations(stage, stage.cfg), 50
    for step in range(steps + 1):
        assert known.times(step, steps) == sum(
            each % interval == 0 or each % own == 0 or each == steps for each in range(1, step + 1))


def test_the_estimate_counts_and_times_each(tmp_path: Path) -> None:
    stage = Three(session(Three, new_run(tmp_path, Three)).job.cfg, tmp_path)
    length = Length.of(planned(stage, max_steps=9))
    assert length.scored == {"eval": 3 * 7, "rollout": 2 * 11, "far": 3 * 5} and length.evaluations == 5
    SIZES.clear()
    found = estimate.measure(planned(stage, precision="fp32"))
    assert found.scored_seconds.keys() == length.scored.keys() and min(found.scored_seconds.values()) > 0
    assert SIZES["rollout"] == [2]
    found = replace(found, scored_seconds={"eval": 1.0, "rollout": 10.0, "far": 0.5}, shown_seconds=2.0)
    assert found.evaluation_seconds(length) == pytest.approx((21 + 220 + 7.5) / 5 + 2)


# -- reports --------------------------------------------------------------------------------------------------------


def test_the_test_score_has_all_evaluations_and_their_intervals(tmp_path: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path, WithTest)
    sitting = session(WithTest, run)
    with caplog.at_level(logging.INFO), run.lock():
        assert sitting.train().state == "finished"
    lines = [line for line in caplog.messages if line.startswith("  -> Test")]
    assert [line.split(":")[0] for line in lines] == ["  -> Test", "  -> Test, rollout", "  -> Test, far"]
    assert "(95%: " in lines[1] and "(95%: " not in lines[0] + lines[2]
    assert any(line.startswith("  -> Validation, rollout: error=") for line in caplog.messages)
    known = json.loads((run.models / "best" / "stoker.json").read_text())
    assert "rollout/error" in known["scores"] and known["scores"] == pretrained.scores(run, known["step"])
    shown = [name for panel in plots._panels(plots.read(run)) for name in panel.curves]
    assert {"rollout/error", "far/distance"} <= set(shown)


def test_intervals_are_of_groups_where_rows_have_them(tmp_path: Path) -> None:
    stage = Three(Three.Config(batch_size=4, precision="fp32", num_workers=0), tmp_path)
    model = stage.model()
    scores = (Evaluations(stage, stage.cfg).run("validation", model, stage.cfg, CPU, lambda: False) or [])[1]
    totals = scores.rates["rollout/error"].total.double().numpy()
    sums = np.array([totals[first::3].sum() for first in range(3)])
    expected = bootstrap.intervals({"rollout/error": (sums, np.array([8, 8, 6]))}, seed=7)
    assert scores.intervals(7) == expected
    assert scores.metrics["rollout/error"] == pytest.approx(totals.sum() / 22)


def test_the_groups_are_those_of_the_rows_that_are_left(tmp_path: Path) -> None:
    stage = Three(Three.Config(eval_max_rows=4, precision="fp32", num_workers=0), tmp_path)
    known = Evaluations(stage, stage.cfg)
    rows = known.rows(known.declared[1], "validation")
    assert rows and rows.groups == ["0", "2", "2", "2"]  # of rows 0, 2, 5 and 8 of 11
    assert [rows.dataset[i].tolist() for i in range(4)] == [Points(11, 8, 5000)[i].tolist() for i in (0, 2, 5, 8)]


def test_rows_of_all_splits(tmp_path: Path) -> None:
    """Those that an evaluation has: here the third has none of its own, the second none to train on."""
    stage = Three(Three.Config(batch_size=4, precision="fp32", num_workers=0, rows=22), tmp_path)
    model, known = stage.model(), Evaluations(stage, stage.cfg)
    parts = {split: merged(known.run(split, model, stage.cfg, CPU, lambda: False) or [])
             for split in ("train", "validation", "all")}
    assert parts["all"]["eval/loss"] == pytest.approx(
        (22 * parts["train"]["eval/loss"] + 7 * parts["validation"]["eval/loss"]) / 29, rel=1e-6)
    assert parts["all"]["rollout/error"] == parts["validation"]["rollout/error"]
    assert "rollout/error" not in parts["train"]
    rows = known.rows(known.declared[2], "all")
    assert rows and (len(rows.dataset), rows.total, rows.splits) == (5, 29, {"train": 22, "validation": 7})


# -- confidence -----------------------------------------------------------------------------------------------------


def interval(totals: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    return bootstrap.intervals({"rate": (totals, counts)}, seed=seed).get("rate")


def bounds(rate: float, error: float) -> Any:
    """95 % of a normal distribution; of a thousand draws a bound is known to about a tenth of the error."""
    return pytest.approx((rate - 1.96 * error, rate + 1.96 * error), abs=0.2 * error)


def test_an_interval_is_that_of_the_closed_form() -> None:
    """Of a mean by its standard error, of a ratio by the delta method (Cochran 1977, 6.3)."""
    draw = np.random.default_rng(0)
    values = draw.exponential(3.0, 4000)
    assert interval(values, np.ones(4000)) == bounds(values.mean(), values.std(ddof=1) / math.sqrt(4000))
    counts = draw.integers(1, 30, 4000)
    totals = draw.binomial(counts, 0.2)
    rate = totals.sum() / counts.sum()
    error = math.sqrt(((totals - rate * counts) ** 2).sum()) / counts.sum()
    assert interval(totals, counts) == bounds(rate, error)


def test_rows_of_a_group_count_together() -> None:
    """Groups that differ among themselves: their means alone say how far the rate is known."""
    draw = np.random.default_rng(0)
    names = [f"speaker {number // 20}" for number in range(4000)]
    values = np.repeat(draw.normal(size=200), 20) + 0.1 * draw.normal(size=4000)
    order = draw.permutation(4000)
    sums, counts = (bootstrap.by_group(each[order], [names[row] for row in order]) for each in (values, np.ones(4000)))
    means = values.reshape(200, 20).mean(1)
    assert sorted(sums) == pytest.approx(sorted(20 * means)) and set(counts) == {20}
    assert interval(sums, counts) == bounds(means.mean(), means.std(ddof=1) / math.sqrt(200))
    assert bootstrap.by_group(np.array([1, 2, 3, 4]), ["", "a", "", "a"]).tolist() == [1, 3, 6]


def test_an_interval_that_means_nothing_is_left_out() -> None:
    assert interval(np.array([1.0]), np.array([3])) is None
    assert interval(np.array([1.0, 0.0]), np.array([3, 0])) is None
    assert interval(np.array([1.0, math.nan]), np.array([3, 2])) is None
    low, high = interval(np.array([1, 0, 0]), np.array([1, 1, 0])) or (math.nan, math.nan)
    assert (low, high) == (0, 1), "draws of nothing but the third row are left out"
    values = np.random.default_rng(1).random(50)
    assert interval(values, np.ones(50), seed=3) == interval(values, np.ones(50), seed=3)


def test_sums_of_rows_are_exact() -> None:
    """Beyond the whole numbers of float32, and with scalars beside them."""
    totals = Totals()
    totals.add("wer", Ratio(torch.tensor([2**24, 1, 2]), torch.tensor([2**25, 1, 1])))
    totals.add("wer", Ratio(3, 4))
    totals.add("loss", Ratio(torch.tensor([0.5, 0.25]), torch.tensor([1, 1])))
    assert totals.means() == {"wer": (2**24 + 6) / (2**25 + 6), "loss": 0.375}
