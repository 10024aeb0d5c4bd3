"""What is said beforehand: counted against arithmetic done by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from daemon.journal import Journal
from daemon.table import duration
from toys import Regression, StopAt, Toy, new_run, session, train, with_callbacks
from training import estimate
from training.estimate import Estimate, Length
from training.stage import Batch, Ratio

CPU = torch.device("cpu")
SIMPLE = Estimate("cpu", parameters=1000, sample_seconds=2.0, scored_seconds=0.5, update_seconds=0.1,
                  sample_flops=6e9, peak_flops=10e9, kept_bytes=100, kept_bytes_per_sample=10)


class Matrix(Toy):
    """One matrix: forward 2 x 8 x 8 operations a sample, backward as many for the weight; inputs need no gradient."""

    name = "matrix"

    def model(self) -> nn.Module:
        return nn.Linear(self.cfg.width, self.cfg.width, bias=False)

    def loss(self, model: Any, batch: Batch, phase: str) -> tuple[Ratio, dict[str, Ratio]]:
        return Ratio(model(batch["x"]).sum(), len(batch["x"])), {}


def measured(stage: type[Toy], tmp_path: Path, **options: Any) -> Estimate:
    sitting = session(stage, new_run(tmp_path, stage), **options)
    return estimate.measure(stage(sitting.job.cfg, tmp_path), replace(sitting.job.cfg, precision="fp32"), CPU)


def test_operations_and_bytes_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    found = measured(Matrix, tmp_path)
    assert (found.parameters, found.sample_flops) == (64, 2 * 2 * 8 * 8)
    assert (found.kept_bytes, found.kept_bytes_per_sample) == (0, 8 * 4)  # the input, for the weight's gradient
    assert found.memory(16) == {"weights": 256, "gradients": 256, "optimizer": 512, "activations": 512,
                                "snapshot": 768}


def test_the_language_models_operations_are_the_usual_count(tmp_path: Path) -> None:
    """6 N + 12 L D T a token (Kaplan et al. 2020; the attention as in PaLM's appendix B), embeddings' look-up free."""
    from training.train_lm import LanguageModel

    class Small(LanguageModel):
        def dataset(self, split: str) -> Any:
            return [torch.randint(500, (33,)) for _ in range(8)]

        def model(self) -> nn.Module:
            from model.gpt import GPT

            return GPT(500, d_model=64, num_heads=2, num_layers=3, d_ff=256, max_seq_len=32)

    cfg = Small.Config(precision="fp32", max_seq_len=32)
    found = estimate.measure(Small(cfg, tmp_path), cfg, CPU)
    matrices = 3 * 12 * 64 * 64 + 500 * 64
    expected = 32 * (6 * matrices + 12 * 3 * 64 * 32)
    assert found.sample_flops == pytest.approx(expected, rel=0.05)  # attention's backward makes one product twice


def test_the_time_is_that_of_samples_updates_and_evaluations(tmp_path: Path) -> None:
    stage = Regression(session(Regression, new_run(tmp_path, Regression)).job.cfg, tmp_path)
    length = Length.of(stage, replace(stage.cfg, max_steps=9))  # 22 rows, 8 to an update; 7 evaluated at 4, 8 and 9
    assert length == Length(9, 66.0, 21)
    assert SIMPLE.seconds(length) == pytest.approx(66 * 2.0 + 9 * 0.1 + 21 * 0.5)


def test_measuring_leaves_the_run_as_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run = new_run(tmp_path, Regression), new_run(tmp_path, Regression)
    trainer, _ = train(Regression, whole)
    monkeypatch.setattr(estimate, "measure", lambda *given: SIMPLE)
    without, _ = train(Regression, run)
    ours, theirs = trainer.model.state_dict(), without.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("asked, seconds, speedup, compiles", [
    (None, 100.0, 3.0, False),  # too short for a trial
    (None, 1000.0, 3.0, True),
    (None, 1000.0, 1.06, False),  # gains 57 s, takes 30
    (None, 10_000.0, 1.04, False),  # within what timings scatter
    (True, 100.0, 0.9, True),  # asked for
    (False, 1000.0, 3.0, False),
])
def test_a_run_is_compiled_where_it_pays(monkeypatch: pytest.MonkeyPatch, asked: bool | None, seconds: float,
                                         speedup: float, compiles: bool) -> None:
    monkeypatch.setattr(estimate.blocks, "compiler_problem", lambda device: "")
    monkeypatch.setattr(estimate, "try_compiled", lambda found, *given: replace(
        found, compile_seconds=30.0, compiled_speedup=speedup))
    cfg = Regression.Config(compile=asked)
    settled, found, _ = estimate.settle_compile(SIMPLE, Regression(cfg, Path()), cfg, CPU, seconds)
    assert settled.compile is compiles
    assert found.sample_seconds == pytest.approx(2.0 / speedup if compiles else 2.0)


@pytest.mark.parametrize("told, reason", [("no compiler\nTraceback", "no compiler"), ("", "RuntimeError")])
def test_a_trial_that_fails_is_told_and_the_run_is_not_compiled(monkeypatch: pytest.MonkeyPatch, told: str,
                                                                reason: str) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError(told)

    monkeypatch.setattr(estimate.blocks, "compiler_problem", lambda device: "")
    monkeypatch.setattr(estimate, "try_compiled", fails)
    cfg = Regression.Config(compile=True)
    settled, found, line = estimate.settle_compile(SIMPLE, Regression(cfg, Path()), cfg, CPU, 1000.0)
    assert settled.compile is False and found == SIMPLE and line == f"Not compiled: a trial failed ({reason})"


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_no_batch_is_tried_that_the_run_would_not_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       batch: int) -> None:
    cfg = Regression.Config(batch_size=batch, precision="fp32")
    stage, seen = Regression(cfg, tmp_path), list[int]()
    collate = stage.collate
    monkeypatch.setattr(stage, "collate", lambda rows: seen.append(len(rows)) or collate(rows))
    estimate.measure(stage, cfg, CPU)
    assert max(seen) == batch


def test_a_longer_plan_has_a_longer_estimate(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(Regression, run)
    before = run.status().expected_seconds
    train(Regression, run, resume=True, max_steps=18, epochs=100)
    assert before and run.status().expected_seconds == pytest.approx(2 * before, rel=0.2)


def test_a_run_keeps_its_estimate_and_tells_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run)
    written = estimate.read(run.estimate)
    assert written is not None and written.parameters == 280
    expected = run.status().expected_seconds
    assert expected is not None and any(line.startswith(f"Estimate: {duration(expected)} for 9 updates")
                                        for line in caplog.messages)
    train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    assert estimate.read(run.estimate) == written and run.status().expected_seconds == expected
    assert all("speed/peak_share" in row for row in Journal(run.timings).rows())


def test_bytes_as_a_person_reads_them() -> None:
    assert [estimate.size(number) for number in (0, 2.4e6, 5.55e9)] == ["0 MB", "2 MB", "5.5 GB"]
