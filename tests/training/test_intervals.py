"""The confidence intervals of losses, perplexity and retrieval: of every stage, without a change in any figure."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

import made_pictures
from stoker.config import UserError
from stoker.data.text.tokens import Windows
from stoker.model import contrastive, retrieval
from stoker.model.gpt import GPT
from stoker.training.core import bootstrap
from stoker.training.core.evaluation import Evaluations, Scores, evaluate
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from test_stages import OPTIONS, STAGES, data_of
from toys import Contrastive, Regression, Toy, new_run, session

CPU = torch.device("cpu")


def prepared(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A stage of ours on small data, and its model with random weights."""
    values = OPTIONS | data_of(name, folder) | dict(precision="fp32", num_workers=0, batch_size=3) | options
    stage = STAGES[name](replace(STAGES[name].Config(), **values), folder)
    stage.prepare()
    torch.manual_seed(0)
    return stage, stage.model()


def toy(stage: type[Toy], folder: Path, **options: Any) -> Any:
    return stage(stage.Config(**dict(batch_size=3, precision="fp32", num_workers=0) | options), folder)


def scored(stage: Any, model: nn.Module, split: str = "validation") -> Scores:
    [scores] = Evaluations(stage, stage.cfg).run(split, model, stage.cfg, CPU, lambda: False) or []
    return scores


# -- our stages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, more", [("lm", {}), ("audio_enc", {}), ("ocr", {}), ("ocr", {"ctc_weight": 0.0})])
def test_the_loss_of_each_row_is_that_of_an_evaluation_of_it_alone(tmp_path: Path, name: str,
                                                                  more: dict[str, Any]) -> None:
    stage, model = prepared(name, tmp_path, eval_max_rows=7, **more)
    scores = scored(stage, model)
    assert scores.rows
    alone = [evaluate(stage, model, Subset(scores.rows.dataset, [row]), stage.cfg, CPU, lambda: False)
             for row in range(len(scores.rows.dataset))]
    total, count = scores.rates["eval/loss"]
    assert (total / count).tolist() == pytest.approx([each.metrics["eval/loss"] for each in alone if each], rel=1e-4)
    assert float(total.sum() / count.sum()) == pytest.approx(scores.metrics["eval/loss"], rel=1e-5)
    low, high = scores.intervals(0)["eval/loss"]
    assert low < scores.metrics["eval/loss"] < high


@pytest.mark.parametrize("name", ["lm", "audio_enc", "ocr"])
def test_the_loss_is_the_sum_that_it_was_without_samples_to_the_last_bit(tmp_path: Path, name: str) -> None:
    stage, model = prepared(name, tmp_path)
    rows, model = stage.dataset("validation"), model.eval()
    total, count = torch.zeros(()), 0
    with torch.no_grad():
        for start in range(0, len(rows), 3):
            batch = stage.collate([rows[row] for row in range(start, min(start + 3, len(rows)))])
            total = total + stage.loss(model, batch, Moment()).terms["loss"]
            count += stage.counts(batch, "main")["loss"]
    assert scored(stage, model).metrics["eval/loss"] == float(total.double()) / count


def test_what_cannot_be_aligned_counts_in_no_draw(tmp_path: Path) -> None:
    stage, model = prepared("audio_enc", tmp_path)
    clips = [stage.dataset("validation")[row] for row in range(3)]
    clips[1] = clips[1]._replace(waveform=clips[1].waveform[:700])
    batch = stage.collate(clips)
    with torch.no_grad():
        loss = stage.score(model.eval(), batch)["loss"]
    total, count = loss.samples
    assert total[1] == count[1] == 0 and torch.isfinite(total).all()
    assert float(total.sum() / count.sum()) == pytest.approx(float(loss.total / loss.count), rel=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_each_picture_has_a_loss_and_answers_and_the_figures_keep_their_bits(tmp_path: Path, loss: str) -> None:
    stage, model = prepared("vision", tmp_path, loss=loss)
    scores, rows = scored(stage, model), stage.dataset("validation")
    pairs = [rows[row] for row in range(len(rows))]
    with torch.no_grad():
        made = [stage.gather(model.eval(), stage.collate(pairs[at:at + 3])) for at in range(0, len(pairs), 3)]
    seen, read, numbers = (torch.cat([each[name] for each in made]) for name in ("seen", "read", "numbers"))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(stage.cfg.seed))
    with torch.no_grad():
        total = sum(contrastive.LOSS_FUNCTIONS[loss](model.logits(seen[part], read[part]),
                                             contrastive.alike(*numbers[part].T[:2])) for part in order.split(3))
    expected = retrieval.figures(seen, read, numbers, at=(1, 5, 10), seed=stage.cfg.seed)
    assert scores.metrics == {"eval/loss": float(total) / len(pairs),
                              **{f"eval/{name}": value for name, value in expected.items()}}
    for part in order.split(3):
        logits = model.logits(seen[part], read[part]).masked_fill(contrastive.alike(*numbers[part].T[:2]), -torch.inf)
        own = torch.eye(len(part), dtype=torch.bool)
        each = (-(logits.log_softmax(1) + logits.log_softmax(0)).diagonal() / 2 if loss == "softmax" else
                F.softplus(logits.where(~own, -logits)).sum(1))
        torch.testing.assert_close(scores.rates["eval/loss"].total[part], each.detach())
    for name, ratio in scores.rates.items():
        assert float(ratio.total.sum() / ratio.count.sum()) == pytest.approx(scores.metrics[name], rel=1e-5)
    assert scores.intervals(0).keys() >= {"eval/loss", "eval/acc", "eval/text_recall_5", "eval/label_acc"}


def test_rows_of_a_picture_are_drawn_together(tmp_path: Path) -> None:
    """A picture that stands in two files; pictures of a group; and neither."""
    rows = ["image,text,split"]
    for row in range(30):
        made_pictures.make_picture(tmp_path / f"{row // 6}_{row}.png", seed=min(row, 28), height=16, width=16)
        rows.append(f"{row // 6}_{row}.png,caption {row % 10},{'validation' if row >= 18 else 'train'}")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    stage, model = prepared("vision", tmp_path, dataset=str(tmp_path / "data.csv"))
    groups = stage.groups("validation")
    assert groups[-1] == groups[-2] and len(set(groups)) == 11 and scored(stage, model).groups == groups
    assert scored(stage, model).intervals(0).keys() >= {"eval/image_recall_1", "eval/text_recall_5", "eval/acc"}
    stage, _ = prepared("vision", tmp_path, dataset=str(tmp_path / "data.csv"), group_by=r"(\d)_\d+")
    assert stage.groups("validation") == 6 * ["3"] + 6 * ["4"]


def test_the_rows_of_a_language_model_leave_the_bits_of_their_sum_alone() -> None:
    torch.manual_seed(0)
    model = GPT(50, d_model=16, num_heads=2, num_layers=1, d_ff=32, max_seq_len=37).eval()
    for rows in range(1, 30):
        tokens = torch.randint(50, (rows, 38))
        with torch.no_grad():
            total, each = model(tokens[:, :-1], tokens[:, 1:], by_row=True)
            assert torch.equal(total, model(tokens[:, :-1], tokens[:, 1:])) and len(each) == rows


def test_perplexity_has_the_bounds_of_the_loss(tmp_path: Path) -> None:
    stage, model = prepared("lm", tmp_path)
    scores = scored(stage, model)
    found = scores.intervals(3)
    assert found["eval/ppl"] == pytest.approx([math.exp(bound) for bound in found["eval/loss"]], rel=1e-4)
    assert found == scores.intervals(3) != scores.intervals(4)


def test_a_window_is_of_the_document_in_which_it_begins() -> None:
    windows = Windows(np.array([1, 9, 1, 1, 9, 9, 1, 1, 1]), 2)
    assert windows.documents(9) == ["0", "1", "1", "3"]


def test_windows_of_a_document_are_drawn_together(tmp_path: Path) -> None:
    lines = [f"document {number} says {number * number} " * 9 for number in range(60)]
    (tmp_path / "some.txt").write_text("<|endoftext|>".join(lines))
    stage, model = prepared("lm", tmp_path, dataset=str(tmp_path / "some.txt"))
    windows, end = stage.dataset("validation"), stage.tokenizer.end_of_text
    ids = np.array(stage.tokens["validation"][:]).tolist()
    expected = [str(ids[:start].count(end)) for start in range(0, len(windows) * 32, 32)]
    scores = scored(stage, model)
    assert scores.groups == expected and 1 < len(set(expected)) < len(expected) / 2
    assert scores.intervals(0) != scores._replace(rows=None).intervals(0)


# -- stages of others -----------------------------------------------------------------------------------------------


class Squares(Regression):
    """Names what its loss is of each sample."""

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        error = (model(batch["x"]) - batch["x"].cumsum(1)).square().mean(1)
        return Loss({"loss": error.sum()}, samples={"loss": (error.detach(), torch.ones(len(error)))})


class TwoTerms(Regression):
    """One term counts samples, the other the numbers that are positive; the second weighs 0.3 at the end."""

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        return {"near": len(batch["x"]), "positive": (batch["x"] > 0).sum()}

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"positive": 0.3 * moment.step / moment.steps}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        made, x = model(batch["x"]), batch["x"]
        near, positive = (made - x).square().mean(1), (made * (x > 0)).abs().sum(1)
        return Loss({"near": near.sum(), "positive": positive.sum()}, samples={
            "near": (near, torch.ones(len(x))), "positive": (positive, (x > 0).sum(1))})

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"eval/root": math.sqrt(means["eval/near"])} if "eval/near" in means else {}


def test_a_stage_that_names_samples_has_an_interval_and_another_has_none(tmp_path: Path) -> None:
    stage = toy(Squares, tmp_path)
    model = stage.model()
    scores, plain = scored(stage, model), scored(toy(Regression, tmp_path), model)
    assert scores.metrics["eval/loss"] == plain.metrics["eval/loss"] and plain.intervals(0) == {}
    assert scores.intervals(0).keys() == {"eval/loss"}


def test_a_loss_of_several_terms_is_weighed_in_each_draw(tmp_path: Path) -> None:
    """Drawn here one row after another, each draw a ratio of sums for each term."""
    stage = toy(TwoTerms, tmp_path, rows=40)
    scores = scored(stage, stage.model(), "train")
    found, draw = scores.intervals(0), np.random.default_rng(1)
    near, positive = ([value.double().numpy() for value in scores.rates[f"eval/{term}"]]
                      for term in ("near", "positive"))
    losses, roots = [], []
    for _ in range(4000):
        rows = draw.integers(40, size=40)
        means = [float(np.sum(total[rows]) / np.sum(count[rows])) for total, count in (near, positive)]
        losses.append(means[0] + 0.3 * means[1])
        roots.append(math.sqrt(means[0]))
    assert found.keys() == {"eval/near", "eval/positive", "eval/loss", "eval/root"}
    for name, drawn in (("eval/loss", losses), ("eval/root", roots)):
        assert found[name] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.2 * np.std(drawn))
    assert scores.metrics["eval/loss"] == pytest.approx(np.mean(losses), abs=0.2 * np.std(losses))


class Recall(Contrastive):
    """A figure of the whole set, known by its rows."""

    best = "eval/recall", "max"

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        return {}

    def gather(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        return {side: F.normalize(model[side](x), dim=1) for side, x in (("left", batch["x"]), ("right", -batch["x"]))}

    def judge(self, gathered: Mapping[str, Tensor]) -> dict[str, float | Ratio]:
        right = (gathered["left"] @ gathered["right"].T).argmax(1) == torch.arange(len(gathered["left"]))
        return {"recall": Sampled(float(right.float().mean()), 1, (right, torch.ones(len(right)))), "rows": len(right)}


def test_the_interval_of_recall_is_that_of_a_binomial(tmp_path: Path) -> None:
    stage = toy(Recall, tmp_path, rows=600, width=4, batch_size=600)
    torch.manual_seed(0)
    model = stage.model()
    model["left"].bias.data = model["right"].bias.data = torch.zeros(8)
    model["left"].weight.data = torch.eye(8, 4)
    model["right"].weight.data = -torch.eye(8, 4) + 0.1 * torch.randn(8, 4)
    scores = scored(stage, model, "train")
    rate = scores.metrics["eval/recall"]
    assert 0.1 < rate < 0.9 and scores.metrics["eval/rows"] == 600
    error = math.sqrt(rate * (1 - rate) / 600)
    assert scores.intervals(0) == {"eval/recall": pytest.approx((rate - 1.96 * error, rate + 1.96 * error),
                                                                abs=0.25 * error)}


def test_samples_that_are_not_one_for_each_row_are_an_error(tmp_path: Path) -> None:
    class Short(Recall):
        def judge(self, gathered: Mapping[str, Tensor]) -> dict[str, float | Ratio]:
            return {"recall": Sampled(0.5, 1, (torch.ones(3), torch.ones(5)))}

    stage = toy(Short, tmp_path)
    with pytest.raises(UserError, match="eval/recall has totals of 3 samples and counts of 5, but 7 rows"):
        scored(stage, stage.model())


# -- what means nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, known", [(1, False), (2, True)])
def test_one_row_has_no_interval(tmp_path: Path, rows: int, known: bool) -> None:
    stage = toy(Squares, tmp_path, eval_max_rows=rows)
    found = scored(stage, stage.model()).intervals(0)
    assert bool(found) == known and not any(math.isnan(bound) for bounds in found.values() for bound in bounds)


def test_the_same_rows_are_drawn_for_all_rates() -> None:
    values = np.random.default_rng(0).integers(0, 9, 30)
    found = bootstrap.intervals({"one": (values, np.ones(30)), "other": (-values, np.ones(30))},
                                lambda rates: {"sum": rates["one"] + rates["other"]})
    assert found["sum"] == (0, 0) and found["one"][0] < found["one"][1]


def test_an_infinite_perplexity_has_no_interval_and_the_loss_has() -> None:
    found = bootstrap.intervals({"loss": (np.array([800.0, 900.0]), np.ones(2))}, lambda rates: {"ppl": math.inf})
    assert found == {"loss": (800, 900)} and bootstrap.intervals({}, lambda rates: {}) == {}


def test_a_draw_that_counts_nothing_is_left_out_of_one_rate_alone() -> None:
    rows = np.arange(20.0)
    rare = np.where(rows < 2, 1, 0)
    found = bootstrap.intervals({"all": (rows, np.ones(20)), "rare": (rows * rare, rare)},
                                lambda rates: {"sum": rates["all"] + rates["rare"]})
    assert found["rare"] == (0, 1) and found["all"] == bootstrap.intervals({"all": (rows, np.ones(20))})["all"]
    assert found["all"][0] < found["sum"][0] < found["sum"][1] < found["all"][1] + 1


# -- where they are shown -------------------------------------------------------------------------------------------


def test_the_test_score_of_a_run_shows_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class WithTest(Squares):
        def splits(self) -> tuple[str, ...]:
            return "train", "validation", "test"

    run = new_run(tmp_path, WithTest)
    sitting = session(WithTest, run)
    with caplog.at_level(logging.INFO), run.lock():
        assert sitting.train().state == "finished"
    [line] = [line for line in caplog.messages if line.startswith("  -> Test")]
    assert " loss=" in line and " (95%: " in line


# -- whether they hold what they promise ----------------------------------------------------------------------------


def test_the_true_rate_lies_in_19_of_20_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 data sets of 80 rows with uneven counts; and of 300 of 40 groups, with the rows of a group alike."""
    monkeypatch.setattr(bootstrap, "DRAWS", 250)
    draw = np.random.default_rng(0)

    def covered(groups: int, rows: int, spread: float) -> float:
        hits = 0
        for _ in range(300):
            level = np.repeat(2 + spread * draw.normal(size=groups), rows)
            counts = draw.integers(1, 20, groups * rows)
            totals = counts * level + draw.normal(size=groups * rows) * np.sqrt(counts)
            names = [str(row // rows) for row in range(groups * rows)]
            sums = tuple(bootstrap.by_group(values, names) for values in (totals, counts))
            low, high = bootstrap.intervals({"rate": (sums[0], sums[1])})["rate"]
            hits += low <= 2 <= high
        return hits / 300

    assert 0.91 <= covered(80, 1, 1.0) <= 0.98
    assert 0.90 <= covered(40, 4, 0.5) <= 0.98
