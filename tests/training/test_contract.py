"""What a stage or a callback of the user's returns: every mistake is one line, before anything has begun."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stoker.config import Parsed, UserError
from stoker.daemon.journal import Journal
from stoker.training.assembly import estimate, launch
from stoker.training.assembly.job import Job
from stoker.training.core import contract
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.evaluation import Evaluations, evaluate
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.outside import module_from
from stoker.training.core.phases import Group, Phase
from stoker.training.core.totals import Totals
from stoker.training.trainer import Trainer
from toys import (
    QUICK,
    Regression,
    StopAt,
    Toy,
    TwoTerms,
    new_run,
    planned,
    recording_in,
    session,
    step_of,
    train,
    with_callbacks,
)

CPU = torch.device("cpu")


def with_methods(base: type[Toy] = Regression, **methods: Any) -> type[Toy]:
    return type(base.__name__, (base,), methods)


def made(stage: type[Toy], folder: Path) -> Toy:
    return stage(stage.Config(batch_size=4, max_steps=9, precision="fp32", num_workers=0), folder)


def losing(change: Callable[[Any, Batch], Any]) -> dict[str, Any]:
    """A `loss` that returns something else, made of the right sum."""
    return {"loss": lambda self, model, batch, moment: change(
        (model(batch["x"]) - batch["x"]).square().mean(1).sum(), batch)}


def returning(method: str, value: Any) -> dict[str, Any]:
    return {method: lambda self, *given: value}


MISTAKES = [
    (returning("collate", torch.zeros(4, 8)), r"stage regression: collate\(\) returned a tensor of shape \(4, 8\)"),
    (returning("collate", {}), r"collate\(\) returned {}: return a dict"),
    (returning("collate", {"rate": 16000}), r"size\(\) counts the rows .* but rate is 16000: declare size\(\)"),
    (returning("size", {}), r"stage regression: size\(\) returned {}: return numbers by unit"),
    (returning("size", 4), r"size\(\) returned 4"),
    (returning("counts", {}), r"counts\(\) returned {}: return the count of each term"),
    (returning("counts", 4), r"counts\(\) returned 4"),
    (returning("counts", {"loss": -3}), r"counts\(\) returned -3 for the term loss: a count is a whole number"),
    (returning("counts", {"loss": torch.tensor(1.5)}), r"counts\(\) returned a tensor of 1.5 for the term loss"),
    (returning("counts", {"loss": torch.ones(2)}), r"counts\(\) returned a tensor of shape \(2,\) for the term loss"),
    (returning("counts", {"loss": 0}), r"counts\(\) returned 0 for every term \(loss\)"),
    (returning("counts", {"loss": torch.tensor(0)}), r"counts\(\) returned 0 for every term \(loss\)"),
    (returning("counts", {"los": 4}), r"loss\(\) returned the terms loss, but counts\(\) returned los: return the"),
    (returning("counts", {"loss": 4, "more": 1}), r"returned the terms loss, but counts\(\) returned loss, more"),
    (returning("weights", {"los": 0.5}), r"weights\(\) has 'los', which is no term of the loss; the terms are loss\."),
    (returning("weights", {"loss": float("nan")}), r"weights\(\) has nan for the term loss: a weight is a number"),
    (returning("weights", 0.5), r"weights\(\) returned 0.5: return a dict"),
    (losing(lambda total, batch: total), r"loss\(\) returned a tensor of [\d.]+: return Loss\({"),
    (losing(lambda total, batch: None), r"loss\(\) returned None: return Loss"),
    (losing(lambda total, batch: Loss({})), r"loss\(\) returned a Loss with the terms {}"),
    (losing(lambda total, batch: Loss({"loss": total[None]})), r"returned a tensor of shape \(1,\) for the term loss"),
    (losing(lambda total, batch: Loss({"loss": 1.0})), r"returned 1.0 for the term loss: a term is a tensor"),
    (losing(lambda total, batch: Loss({"loss": total.detach()})), r"no term of the loss \(loss\) depends on weights"),
    (losing(lambda total, batch: Loss({"loss": total, "more": total})), r"loss, more, but counts\(\) returned loss:"),
    (losing(lambda total, batch: Loss({"loss": total}, {"mae": total})), r"for the figure mae: a figure is a Ratio"),
    (losing(lambda total, batch: Loss({"loss": total}, {"mae": Ratio(batch["x"][:, 0], 4)})), r"for the figure mae"),
    (losing(lambda total, batch: Loss({"loss": total}, {"loss": Ratio(total, 4)})), r"a figure loss, the name of"),
    (losing(lambda total, batch: Loss({"loss": total}, samples={"los": (batch["x"], batch["x"])})), r"samples of los"),
    (returning("score", {"acc": 0.5}), r"evaluation eval: score\(\) returned 0.5 for acc: a figure is a Ratio"),
    (returning("score", 0.5), r"evaluation eval: score\(\) returned 0.5: return a dict"),
    (returning("gather", {"x": 3}), r"evaluation eval: gather\(\) returned {'x': 3}"),
]


@pytest.mark.parametrize("methods, why", MISTAKES)
def test_a_mistake_of_a_stage_is_one_line_before_the_run(tmp_path: Path, methods: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why) as refusal:
        estimate.measure(planned(made(with_methods(**methods), tmp_path)))
    assert len(refusal.value.problems) == 1 and "\n" not in str(refusal.value)


def test_it_ends_in_exit_code_2_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.logs, "to_console", lambda: None)
    values = {**QUICK, "result_dir": str(tmp_path / "runs")}
    wrong = with_methods(**returning("weights", {"los": 0.5}))
    assert launch.start(Job(wrong, Parsed(wrong.Config(**values), frozenset(values), ""))) == 2
    assert "weights() has 'los'" in capfd.readouterr().err.splitlines()[-1] and not [*(tmp_path / "runs").glob("reg*")]


def test_the_stage_of_two_terms_in_the_documents_is_trained_and_its_mistake_is_as_there(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/extend.md").read_text()
    code = dict(re.findall(r"`(my_\w+\.py)`[^`]*```python\n(.*?)```", page, re.DOTALL))
    for name, text in {**code, "wrong.py": code["my_terms.py"].replace('{"rising": 0.5', '{"risng": 0.5')}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "series.txt").write_text("\n".join(f"{math.sin(i / 7):.6f}" for i in range(200)))
    rising, wrong = (vars(module_from(tmp_path / name))["Rising"] for name in ("my_terms.py", "wrong.py"))
    data = {"dataset": str(tmp_path / "series.txt")}
    trainer, ending = train(rising, run := new_run(tmp_path, rising), **data)
    last = list(Journal(run.metrics).rows())[-1]
    assert ending.state == "finished" and {"train/all", "train/rising", "train/loss", "lr"} <= last.keys()
    assert last["eval/loss"] == pytest.approx(last["eval/all"] + 0.5 * last["eval/rising"])
    with pytest.raises(UserError) as refusal:
        session(wrong, new_run(tmp_path / "2", wrong), **data).prepare()
    assert f"my_terms.py: {refusal.value}" in " ".join(page.split())


class Phased(Toy):
    """Two phases whose terms have different names; the weights are those of both."""

    name = "phased"

    def phases(self) -> tuple[Phase, ...]:
        return Phase("one", (Group("one.*"),)), Phase("two", (Group("two.*"),), first=3)

    def model(self) -> nn.Module:
        return nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        return {"near": len(batch["x"])} if phase == "one" else {"far": len(batch["x"])}

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"near": 0.5, "far": 2.0}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        total = (model[moment.phase](batch["x"]) - batch["x"]).square().mean(1).sum()
        return Loss({"near" if moment.phase == "one" else "far": total})


def test_weights_may_name_terms_of_any_phase(tmp_path: Path) -> None:
    estimate.measure(planned(made(Phased, tmp_path)))
    wrong = with_methods(Phased, **returning("weights", {"near": 0.5, "fra": 2.0}))
    with pytest.raises(UserError, match="'fra', which is no term of the loss; the terms are far, near"):
        estimate.measure(planned(made(wrong, tmp_path)))
    late = with_methods(Phased, counts=lambda self, batch, phase: {"near": 1} if phase == "one" else {})
    with pytest.raises(UserError, match=r"stage phased, phase two: counts\(\) returned {}"):
        estimate.measure(planned(made(late, tmp_path)))


def test_a_rare_thing_may_be_missing_in_the_batches_of_the_trial(tmp_path: Path) -> None:
    """Where the trial's few samples count nothing, the first step is computed too."""
    sizes: list[int] = []

    def counts(self: Toy, batch: Batch, phase: str) -> dict[str, int]:
        sizes.append(len(batch["x"]))
        return {"loss": int(len(batch["x"]) > contract.FEW)}

    stage = with_methods(counts=counts)(Toy.Config(batch_size=10, max_steps=9, precision="fp32"), tmp_path)
    estimate.measure(planned(stage))
    assert sizes[:2] == [8, 10]


def test_a_run_in_which_no_phase_makes_an_update_is_refused(tmp_path: Path) -> None:
    late = with_methods(phases=lambda self: (Phase("late", first=9), Phase("later", first=20)))
    stage = late(Toy.Config(max_steps=9, precision="fp32"), tmp_path)
    with pytest.raises(UserError, match=r"no phase makes an update in the 9 steps of the run \(late at step 9"):
        estimate.measure(planned(stage))
    some = with_methods(phases=lambda self: (Phase("late", first=8), Phase("later", first=20)))
    estimate.measure(planned(some(Toy.Config(max_steps=9, precision="fp32"), tmp_path)))


# -- in the steps ---------------------------------------------------------------------------------------------------


ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
PARTS = [{"x": ROWS[:4]}, {"x": ROWS[4:]}]


@pytest.mark.parametrize("methods, why", [
    (returning("counts", {}), r"counts\(\) returned {}"), (returning("counts", {"loss": 2.5}), "returned 2.5 for"),
    (returning("counts", {"los": 4}), r"but counts\(\) returned los"),
    (losing(lambda total, batch: total), "return Loss")])
def test_a_resumed_run_is_refused_at_its_first_step(tmp_path: Path, methods: dict[str, Any], why: str) -> None:
    step = step_of(made(with_methods(**methods), tmp_path))
    before = [p.clone() for p in step.model.parameters()]
    with pytest.raises(UserError, match=why):
        step.run(5, PARTS)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters()))


def test_later_steps_are_not_checked_but_for_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Regression):
        def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
            return {("loss" if batch["x"].sum() != 0 else "los"): len(batch["x"])}

    called: list[str] = []
    for name in ("check_loss", "check_counts"):
        own = getattr(contract, name)
        monkeypatch.setattr(contract, name, lambda *given, own=own, name=name, **more: (called.append(name),
                                                                                        own(*given, **more)))
    step = step_of(made(Later, tmp_path))
    step.run(0, PARTS)
    assert called == ["check_counts", "check_loss", "check_loss"]
    step.run(1, PARTS)
    assert len(called) == 3
    with pytest.raises(UserError, match=r"loss\(\) returned the terms loss, but counts\(\) returned los:"):
        step.run(2, [{"x": torch.zeros(2, 8)}])


def recording(stage: Toy, step: int, batches: list[Batch]) -> tuple[Any, Totals]:
    """A step, and the figures that it recorded."""
    figures, made_step = Totals(), step_of(stage, gradient_clip=0.0)
    made_step.record = recording_in(figures)
    made_step._checked.add("main")  # as if it were a later one
    made_step.run(step, batches)
    return made_step, figures


@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_a_term_that_counts_nothing_in_a_step_adds_nothing(tmp_path: Path, zero: Any) -> None:
    """Though its sum is not 0."""
    class Uncounted(TwoTerms):
        def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
            return {"near": len(batch["x"]), "positive": zero}

    step, figures = recording(made(Uncounted, tmp_path), 3, PARTS)
    model = step.stage.model()
    expected = (model(ROWS) - ROWS).square().mean()
    expected.backward()
    for ours, theirs in zip(step.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    means = figures.means()
    assert means["train/loss"] == pytest.approx(expected.item()) == pytest.approx(means["train/near"])
    if isinstance(zero, int):
        assert "train/positive" not in means
    else:
        assert means["train/positive"] != means["train/positive"], "NaN: only the device knows that it is absent"


def test_a_run_may_be_resumed_at_a_step_that_counts_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = step_of(made(with_methods(**returning("counts", {"loss": 0})), tmp_path))
    step.run(5, PARTS)
    assert "step 6: main update skipped: counts() is 0 for every term of the loss" in caplog.messages


@pytest.mark.parametrize("kind", [Regression, TwoTerms])
@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_a_step_that_counts_nothing_makes_no_update(tmp_path: Path, kind: type[Toy], zero: Any,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    class Sometimes(kind):  # type: ignore[misc,valid-type]
        def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
            return {term: count if batch["x"].sum() != 0 else zero for term, count in super().counts(
                batch, phase).items()}

    figures, step = Totals(), step_of(made(Sometimes, tmp_path))
    step.record = recording_in(figures)
    step.run(1, PARTS)  # so that AdamW has momentum
    before, known = [p.clone() for p in step.model.parameters()], figures.means()["train/loss"]
    empty = [{"x": torch.zeros(2, 8)}]
    step.run(2, empty)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters())) and not step.dropped
    if isinstance(zero, int):
        assert "step 3: main update skipped: counts() is 0 for every term of the loss" in caplog.messages
        assert figures.means()["train/loss"] == known
    else:
        assert figures.means()["health/empty_share"] == 1.0, "of the steps whose counts are only on the device"
    step.run(3, PARTS)
    assert not all(torch.equal(a, b) for a, b in zip(before, step.model.parameters()))


# -- the loss in the log --------------------------------------------------------------------------------------------


class Uneven(TwoTerms):
    """Batches of 4 and 2 rows, so steps of an interval count differently."""

    name = "uneven"

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"positive": 0.25}


class Logged(Callback):
    """The sums and counts of all that was trained on since the last log, added by hand, and the line itself."""

    order = ACT

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], dict[str, float]]] = []
        self.sums = torch.zeros(4, dtype=torch.float64)

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        with torch.no_grad():
            found, x = trainer.model(batch["x"]), batch["x"]
        self.sums += torch.tensor([float((found - x).square().mean(1).sum()), len(x),
                                   float((found * (x > 0)).abs().sum()), float((x > 0).sum())])

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        near, positive = float(self.sums[0] / self.sums[1]), float(self.sums[2] / self.sums[3])
        self.lines.append((metrics, {"train/near": near, "train/positive": positive,
                                     "train/loss": near + 0.25 * positive}))
        self.sums.zero_()


def test_the_loss_in_the_log_is_the_weighed_sum_of_the_terms_means(tmp_path: Path) -> None:
    """Of 22 rows a step takes 8, 8 and 6, so a mean over steps would differ."""
    logged = Logged()
    train(with_callbacks(Uneven, logged), new_run(tmp_path, Uneven), log_interval=3)
    assert len(logged.lines) == 6
    for metrics, expected in logged.lines:
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_it_is_resumed_in_the_midst_of_an_interval(tmp_path: Path) -> None:
    whole, halves = new_run(tmp_path / "1", Uneven), new_run(tmp_path / "2", Uneven)
    train(with_callbacks(Uneven, StopAt(-1)), whole, log_interval=3)
    train(with_callbacks(Uneven, StopAt(5)), halves, log_interval=3)
    train(with_callbacks(Uneven, StopAt(-1)), halves, resume=True)
    assert halves.metrics.read_text() == whole.metrics.read_text()


def test_sums_of_an_older_snapshot_have_no_parts() -> None:
    totals = Totals()
    totals.load_state_dict({"train/loss": [torch.tensor(6.0), 3]}, CPU)
    totals.add("train/loss", Ratio(2.0, 1))
    assert totals.means() == {"train/loss": 2.0}


# -- evaluations ----------------------------------------------------------------------------------------------------


def test_a_metric_that_counts_nothing_is_left_out_with_a_warning(tmp_path: Path,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    class Never(Regression):
        def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
            return {**super().score(model, batch), "never": Ratio(0.0, 0), "nan": Ratio(float("nan"), 1)}

    stage = made(Never, tmp_path)
    done = evaluate(stage, stage.model(), stage.dataset("validation"), stage.cfg, CPU, lambda: False)
    assert done and done.metrics.keys() == {"eval/loss", "eval/error", "eval/nan"}
    assert caplog.messages == ["evaluation eval: the count of never is 0 in all rows, so it is left out"]


class OnlyNear(TwoTerms):
    """Rows of validation without a positive number."""

    def dataset(self, split: str) -> Any:
        return [-torch.rand(8, generator=torch.Generator().manual_seed(i)) - 0.1 for i in range(7)]

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:  # as the last batch has
        counts = super().counts(batch, phase)
        return counts if len(batch["x"]) == 4 else {"near": counts["near"]}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss = super().loss(model, batch, moment)
        return Loss({term: loss.terms[term] for term in self.counts(batch, moment.phase)})


def test_an_absent_term_adds_nothing_to_the_loss_of_an_evaluation(tmp_path: Path) -> None:
    stage = made(OnlyNear, tmp_path)
    done = evaluate(stage, model := stage.model(), rows := stage.dataset("validation"), stage.cfg, CPU, lambda: False)
    x = torch.stack(list(rows))
    assert done and done.metrics == pytest.approx(
        dict.fromkeys(["eval/near", "eval/loss"], float((model(x) - x).square().mean().detach())), rel=1e-5)


def test_a_term_of_some_batches_is_in_the_loss_whichever_is_the_last(tmp_path: Path) -> None:
    class Some(OnlyNear):
        dataset = Toy.dataset

    stage = made(Some, tmp_path)
    done = evaluate(stage, stage.model(), stage.dataset("validation"), stage.cfg, CPU, lambda: False)
    assert done and done.metrics["eval/loss"] == pytest.approx(
        done.metrics["eval/near"] + 0.1 * 9 * done.metrics["eval/positive"])


def test_a_best_metric_that_counts_nothing_ends_the_run(tmp_path: Path) -> None:
    class Empty(Regression):
        def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
            return {"loss": Ratio(model(batch["x"]).sum(), 0)}

    stage = made(Empty, tmp_path)
    known, model = Evaluations(stage, stage.cfg), stage.model()
    with pytest.raises(UserError, match="the best metric, eval/loss, cannot be computed: the count of loss is 0"):
        known.run("validation", model, stage.cfg, CPU, lambda: False)
    (test,) = known.run("train", model, stage.cfg, CPU, lambda: False) or []
    assert test.metrics == {}


@pytest.mark.parametrize("judged, why", [({"recall": "high"}, r"judge\(\) returned 'high' for recall"),
                                         (0.5, r"judge\(\) returned 0.5: return a dict")])
def test_what_judge_returns_is_checked(tmp_path: Path, judged: Any, why: str) -> None:
    wrong = with_methods(gather=lambda self, model, batch: {"x": batch["x"]}, judge=lambda self, gathered: judged)
    stage = made(wrong, tmp_path)
    with pytest.raises(UserError, match=why):
        evaluate(stage, stage.model(), stage.dataset("validation"), stage.cfg, CPU, lambda: False)
