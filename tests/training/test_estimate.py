"""The estimate of a run: compared with arithmetic done by hand, on clocks of the tests' own."""

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stoker.daemon.journal import Journal
from stoker.daemon.table import duration, size
from stoker.monitors.speed import Speed
from stoker.training.assembly import decide, estimate
from stoker.training.assembly import session as sessions
from stoker.training.assembly.estimate import Estimate, Took
from stoker.training.assembly.length import Length
from stoker.training.core import blocks
from stoker.training.core import device as devices
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.media import Media
from stoker.training.core.muon import Muon
from stoker.training.core.plan import resolve
from toys import Regression, StopAt, Toy, new_run, planned, session, train, with_callbacks

CPU = torch.device("cpu")
SIMPLE = Estimate("cpu", parameters=1000, sample_seconds=2.0, scored_seconds={"eval": 0.5}, update_seconds=0.1,
                  sample_flops=6e9, peak_flops=10e9, kept_bytes=100, kept_bytes_per_sample=10)
MULTIPLIES = devices.multiplies_bf16
ROUNDS = {name: getattr(estimate, name) for name in ("FEWEST", "MOST")}  # as long as no test runs


@pytest.fixture(autouse=True)
def as_many_rounds_as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ROUNDS.items():
        monkeypatch.setattr(estimate, name, value)


class Matrix(Toy):
    """One matrix: forward 2 x 8 x 8 operations a sample, backward as many for the weight; inputs need no gradient."""

    name = "matrix"

    def model(self) -> nn.Module:
        return nn.Linear(self.cfg.width, self.cfg.width, bias=False)

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": model(batch["x"]).sum()})


class Clock:
    """Stands in for the module `time`. A piece of work takes `slowed` times as long by the clock on the wall as it
    computes; where `during` is given, only if it begins between these seconds of computing."""

    def __init__(self, slowed: float = 1.0, during: tuple[float, float] = (-1.0, math.inf)):
        self.wall = self.computed = 0.0
        self.slowed, self.during = slowed, during

    def work(self, seconds: float) -> None:
        self.wall += seconds * (self.slowed if self.during[0] < self.computed < self.during[1] else 1)
        self.computed += seconds

    def perf_counter(self) -> float:
        return self.wall

    def thread_time(self) -> float:
        return self.computed

    def time(self) -> float:
        return 1e9 + self.wall


class Paced(Regression):
    """Takes as long as its tests want, by their clock: seconds to read, train on and score a row, and of the samples.
    """

    clock: Clock
    read, trained, scored, shown = 0.125, 2.0, 0.5, 4.0

    def collate(self, samples: list[Any]) -> Batch:
        self.clock.work(self.read * len(samples))
        return super().collate(samples)

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        self.clock.work(self.trained * len(batch["x"]) / getattr(model, "times_as_fast", 1))
        return super().loss(model, batch, moment)

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        self.clock.work(self.scored * len(batch["x"]))
        return {"loss": Ratio(super().loss(model, batch, Moment()).terms["loss"], len(batch["x"]))}

    def samples(self, model: nn.Module) -> dict[str, Media]:
        self.clock.work(self.shown)
        return {}


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured once for a device, not for a model, is known already."""
    for name in ("peak_flops", "_update_seconds", "_saved_seconds"):
        monkeypatch.setattr(estimate, name, lambda *given: 1.0)


def paced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock, kind: type[Paced] = Paced,
          **options: Any) -> Paced:
    for module in (estimate, decide):
        monkeypatch.setattr(module, "time", clock)
    stage = type("Paced", (kind,), {"clock": clock})
    return stage(stage.Config(**{"batch_size": 4, "precision": "fp32"} | options), tmp_path)


def measured(stage: type[Toy], tmp_path: Path, **options: Any) -> Estimate:
    sitting = session(stage, new_run(tmp_path, stage), **options)
    return estimate.measure(planned(stage(sitting.job.cfg, tmp_path), precision="fp32"))


def test_operations_and_bytes_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    found = measured(Matrix, tmp_path)
    assert (found.parameters, found.sample_flops) == (64, 2 * 2 * 8 * 8)
    assert (found.kept_bytes, found.kept_bytes_per_sample) == (0, 8 * 4)  # the input, for the weight's gradient
    assert found.memory(16) == {"weights": 256, "gradients": 256, "optimizer": 512, "activations": 512,
                                "snapshot": 768}


class Shared(Matrix):
    """Computes ten rows more in each batch, whatever its size."""

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": model(torch.cat([batch["x"], torch.ones(10, self.cfg.width)])).sum()})


def test_operations_of_a_whole_batch_are_shared_by_its_samples(tmp_path: Path) -> None:
    found = measured(Shared, tmp_path, batch_size=5)
    assert (found.tried_size, found.sample_flops) == (5, 2 * 2 * 8 * 8 * (5 + 10) / 5)


def test_the_language_models_operations_are_the_usual_count(tmp_path: Path) -> None:
    """6 N + 12 L D T a token (Kaplan et al. 2020; the attention as in PaLM's appendix B), embeddings' look-up free."""
    from stoker.training.train_lm import LanguageModel

    class Small(LanguageModel):
        def dataset(self, split: str) -> Any:
            return [torch.randint(500, (33,)) for _ in range(8)]

        def model(self) -> nn.Module:
            from stoker.model.gpt import GPT

            return GPT(500, d_model=64, num_heads=2, num_layers=3, d_ff=256, max_seq_len=32)

    cfg = Small.Config(precision="fp32", max_seq_len=32)
    found = estimate.measure(planned(Small(cfg, tmp_path)))
    matrices = 3 * 12 * 64 * 64 + 500 * 64
    expected = 32 * (6 * matrices + 12 * 3 * 64 * 32)
    assert found.sample_flops == pytest.approx(expected, rel=0.05)  # attention's backward makes one product twice


def test_the_time_is_that_of_samples_updates_and_evaluations(tmp_path: Path) -> None:
    stage = Regression(session(Regression, new_run(tmp_path, Regression)).job.cfg, tmp_path)
    length = Length.of(planned(stage, max_steps=9))  # 22 rows, 8 to an update; 7 evaluated at 4, 8 and 9
    assert length == Length(9, 66.0, {"eval": 21}, evaluations=3, snapshots=6)  # at 0, 4, 8, and at epochs' ends
    kind = type("Tested", (Regression,), {"splits": lambda self: ("train", "validation", "test")})
    tested = Length.of(planned(kind(stage.cfg, tmp_path)))
    assert tested == replace(length, scored={"eval": 28}, evaluations=4)
    other = Length.of(planned(stage, eval_interval=5))  # at 5 and 9, each may be the best
    assert other == replace(length, scored={"eval": 14}, evaluations=2, snapshots=7)
    whole = replace(SIMPLE, waiting_seconds=0.25, shown_seconds=3.0, saved_seconds=0.75, start_seconds=7.0)
    assert whole.seconds(length) == pytest.approx(
        66 * 2.25 + 9 * 0.1 + 21 * 0.5 + 3 * 3.0 + 6 * 0.75 + 7.0 + estimate.FINISH_SECONDS)


@pytest.mark.parametrize("scored, shown, words", [
    (1.5, 0.0, ""),  # 30 of 94 s
    (1.7, 0.0, ", of which evaluations take 35% (less with a larger --eval_interval or --eval_max_rows)"),
    (1.0, 10.0, ", of which evaluations take 38% (less with a larger --eval_interval, --eval_max_rows or "
                "--no_samples)")])
def test_a_short_trial_that_mostly_evaluates_says_so(scored: float, shown: float, words: str) -> None:
    """30 samples are trained on for 2 s each, 20 rows are scored in 2 evaluations, and the end takes 4 s."""
    found = replace(SIMPLE, update_seconds=0.0, scored_seconds={"eval": scored}, shown_seconds=shown)
    length = Length(10, 30.0, {"eval": 20}, evaluations=2, snapshots=3)
    assert found.of_evaluations(length) == words
    seconds = duration(64 + 20 * scored + 2 * shown)
    assert found.describe(length, 4).split(";")[0] == f"Estimate: {seconds} for 10 steps{words}"


@pytest.mark.parametrize("clock, scatter, factor", [
    (Clock(), 1.0, 1.0),
    (Clock(1.25), 1.25, 1.25),
    (Clock(2.5), 2.5, 1.0),  # a neighbour that computes all the time
    (Clock(3.0, during=(15.0, 16.0)), 13 / 5, 1.0),  # one that did when a batch of 4 s was trained on, scored in 1 s
])
def test_each_part_is_measured_as_on_an_idle_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: None,
                                                     clock: Clock, scatter: float, factor: float) -> None:
    stage = paced(monkeypatch, tmp_path, clock)
    found = estimate.measure(planned(stage))
    assert found.scatter == pytest.approx(scatter) and found.busy is (scatter > estimate.BUSY)
    assert found.scored_seconds == {"eval": pytest.approx(0.625 * factor)}
    assert (found.sample_seconds, found.waiting_seconds, found.shown_seconds) == pytest.approx(
        (2.0 * factor, 0.125 * factor, 4.0 * factor))


@pytest.mark.parametrize("workers, waiting", [(0, 3.0), (1, 1.0), (2, 0.0), (4, 0.0)])
def test_loader_workers_read_while_the_model_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: None,
                                                        workers: int, waiting: float) -> None:
    monkeypatch.setattr(Paced, "read", 3.0)
    stage = paced(monkeypatch, tmp_path, Clock(1.0), num_workers=workers)
    found = estimate.measure(planned(stage))
    assert found.waiting_seconds == pytest.approx(waiting)
    assert found.scored_seconds["eval"] == pytest.approx(0.5 + max(0.0, 3 / workers - 0.5 if workers else 3.0))


def test_what_muon_computes_in_a_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: None) -> None:
    """On the matrices of the blocks, which it leaves as they are."""
    clock = Clock(1.0)
    layers, seen = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 5)]), list[Any]()
    monkeypatch.setattr(Paced, "blocks", lambda stage, model: list(layers))
    step, before = Muon.step, copy.deepcopy(layers.state_dict())

    def slow(muon: Muon) -> None:
        seen[:] = muon.param_groups[0]["params"]
        step(muon)
        clock.work(5.0)

    monkeypatch.setattr(Muon, "step", slow)
    seconds = {name: estimate.measure(planned(paced(monkeypatch, tmp_path, clock, optimizer=name))).update_seconds
               for name in ("adamw", "muon")}
    assert seconds["muon"] == pytest.approx(seconds["adamw"] + 5.0)
    assert [each.shape for each in seen] == [(4, 3), (5, 4)] and not any(each.grad is not None for each in seen)
    assert all(torch.equal(weight, before[name]) for name, weight in layers.state_dict().items())


def test_without_samples_none_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: None) -> None:
    stage = paced(monkeypatch, tmp_path, Clock(1.0), samples=False)
    assert estimate.measure(planned(stage)).shown_seconds == 0


def test_of_a_gpu_the_clock_on_the_wall_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that trains waits for it, or does not."""
    clock, waited = Clock(3.0), list[str]()
    monkeypatch.setattr(estimate, "time", clock)
    monkeypatch.setattr(estimate.devices, "wait", lambda device: waited.append(device.type))
    assert estimate.timed(lambda: clock.work(1.0), torch.device("cuda")) == (3.0, 3.0)
    assert estimate.timed(lambda: clock.work(1.0), CPU) == (3.0, 1.0) and waited == ["cuda", "cuda", "cpu", "cpu"]


def test_a_busy_machine_is_reported_and_the_estimate_is_for_an_idle_one(tmp_path: Path, rated: None,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Eighty rows are trained on at 2.125 s, four times seven scored at 0.625 s. Whether it is busy makes no difference
    but to the start, which is over."""
    told = []
    monkeypatch.setattr(estimate.blocks, "compiler_problem", lambda device: "no compiler")
    for slowed in (1.0, 2.5):
        clock = Clock(slowed)
        stage = paced(monkeypatch, tmp_path, clock, max_steps=20, eval_interval=5, snapshot_interval=5, rows=80)
        _, found, length, lines = decide.expect(planned(stage), started=1e9 - 50)
        told.append((lines, found.describe(length, 4).split(";")[0]))
        assert found.start_seconds == pytest.approx(50 + clock.wall)
        assert found.seconds(length) - found.start_seconds - length.snapshots * found.saved_seconds == pytest.approx(
            80 * 2.125 + 20 * 280 + 28 * 0.625 + 4 * 4 + estimate.FINISH_SECONDS)
    assert told[0][0] == ["no compiler, so it is not used"] and told[1][0] == [
        "torch.compile not tried, since a trial on a busy machine shows nothing; --compile uses it nevertheless",
        "The machine is busy: measurements scatter by a factor of 2.5; the estimate is for an idle machine"]
    assert told[0][1].endswith(" for 20 steps") and told[1][1].endswith(" for 20 steps on an idle machine")


class InHalf(Paced):
    """Takes another time in bf16, and notes in which precision it computed."""

    bf16_speedup = 2.0

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        model.times_as_fast = self.bf16_speedup if torch.is_autocast_enabled("cpu") else 1
        return super().loss(model, batch, moment)


@pytest.mark.parametrize("speedup, steps, precision", [(2.0, 20, "bf16"), (1.19, 20, "fp32"), (1.21, 20, "bf16"),
                                                       (2.0, 1, "fp32")])
def test_auto_is_bf16_on_a_cpu_where_a_trial_shows_that_it_pays(tmp_path: Path, rated: None, speedup: float, steps: int,
                                                               precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InHalf, "bf16_speedup", speedup)
    stage = paced(monkeypatch, tmp_path, Clock(), InHalf, max_steps=steps, compile=False)
    plan = replace(planned(stage), may_be_bf16=True)
    after, found, _, lines = decide.expect(plan, started=1e9)
    assert after.cfg.precision == stage.cfg.precision == precision and not after.may_be_bf16
    assert lines == ([] if steps == 1 else [f"Precision {precision}: bf16 was {speedup:.2f} times as fast in a trial"])
    assert found.sample_seconds == pytest.approx(2.0 / (speedup if precision == "bf16" else 1))


def test_only_a_cpu_that_multiplies_bf16_tries_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, cpu = tmp_path / "cpuinfo", torch.device("cpu")
    monkeypatch.undo()  # of what spares other tests the trial
    for line, has in (("flags\t\t: fpu avx512_bf16 avx512f", True), ("flags\t\t: fpu amx_bf16", True),
                      ("Features\t: fp asimd bf16 sve", True), ("flags\t\t: fpu avx512f svebf16x", False)):
        flags.write_text(f"processor\t: 0\n{line}\nbogomips\t: 6000\n")
        assert MULTIPLIES(cpu, flags) is has and not MULTIPLIES(torch.device("cuda"), flags)
    assert not MULTIPLIES(cpu, tmp_path / "none")
    monkeypatch.setattr(devices, "multiplies_bf16", lambda device: True)
    for asked, amp, tries in (("auto", True, True), ("auto", False, False), ("fp32", True, False),
                              ("bf16", True, False)):
        setup = resolve(Regression, Regression.Config(precision=asked, amp=amp), tmp_path)
        assert setup.may_be_bf16 is tries and setup.cfg.precision == ("bf16" if asked == "bf16" else "fp32")


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
    monkeypatch.setattr(decide, "try_compiled", lambda found, *given: replace(
        found, compile_seconds=30.0, compiled_speedup=speedup))
    cfg = Regression.Config(compile=asked)
    decided, found, _ = decide.decide_compile(SIMPLE, planned(Regression(cfg, Path())), seconds)
    assert decided is compiles
    assert found.sample_seconds == pytest.approx(2.0 / speedup if compiles else 2.0)


@pytest.mark.parametrize("before, then", [(estimate.BUSY + 0.1, 1.0), (1.0, estimate.BUSY + 0.1)])
def test_on_a_busy_machine_a_run_is_compiled_only_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch,
                                                                           before: float, then: float) -> None:
    """Seventeen times as fast, a trial said, while another program came to its end."""
    tried = []
    monkeypatch.setattr(estimate.blocks, "compiler_problem", lambda device: "")
    monkeypatch.setattr(decide, "try_compiled", lambda found, *given: tried.append(found) or replace(
        found, compile_seconds=30.0, compiled_speedup=17.34, scatter=max(before, then)))
    found = replace(SIMPLE, scatter=before)
    for asked in (None, True):
        cfg = Regression.Config(compile=asked)
        decided, result, line = decide.decide_compile(found, planned(Regression(cfg, Path())), 10_000.0)
        assert decided is bool(asked) and line.endswith("; used") is bool(asked)
        assert result.busy and result.sample_seconds == pytest.approx(2.0 / 17.34 if asked else 2.0)
    assert len(tried) == 1 + (then > 1), "no trial where it would show nothing"


@pytest.mark.parametrize("clock", [Clock(), Clock(4.0), Clock(9.0, during=(26.0, 28.0))])
def test_a_trial_of_compiling_takes_both_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Another program slows down both; and what it takes from one of them only is no computing, but shows."""
    order, stage = list[bool](), paced(monkeypatch, tmp_path, clock)
    loss = stage.loss
    monkeypatch.setattr(blocks, "shape", lambda stage, model, cfg: setattr(
        model, "times_as_fast", 1.5 if cfg.compile else 1))
    monkeypatch.setattr(stage, "loss", lambda model, *given: (
        order.append(model.times_as_fast > 1), loss(model, *given))[1])
    tried = decide.try_compiled(replace(SIMPLE, tried_size=4), planned(stage))
    assert tried.compiled_speedup == pytest.approx(1.5) and tried.busy is (clock.slowed > 1)
    assert order == [False, True] * (len(order) // 2) and len(order) >= 2 + 2 * estimate.FEWEST


def test_works_are_compared_by_computing() -> None:
    rounds = estimate.Rounds({"one": [Took(9.0, 2.0), Took(2.0, 2.0), Took(9.0, 2.0)], "other": [Took(1.0, 1.0)] * 3})
    assert rounds.ratio("one", "other") == 2.0 and rounds.scatter == pytest.approx(10 / 3)


@pytest.mark.parametrize("told, reason", [("no compiler\nTraceback", "no compiler"), ("", "RuntimeError")])
def test_a_trial_that_fails_is_logged_and_the_run_is_not_compiled(monkeypatch: pytest.MonkeyPatch, told: str,
                                                                  reason: str) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError(told)

    monkeypatch.setattr(estimate.blocks, "compiler_problem", lambda device: "")
    monkeypatch.setattr(decide, "try_compiled", fails)
    cfg = Regression.Config(compile=True)
    decided, found, line = decide.decide_compile(SIMPLE, planned(Regression(cfg, Path())), 1000.0)
    assert decided is False and found == SIMPLE and line == f"torch.compile not used: a trial failed ({reason})"


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_no_batch_is_tried_that_the_run_would_not_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       batch: int) -> None:
    cfg = Regression.Config(batch_size=batch, precision="fp32")
    stage, seen = Regression(cfg, tmp_path), list[int]()
    collate = stage.collate
    monkeypatch.setattr(stage, "collate", lambda rows: seen.append(len(rows)) or collate(rows))
    estimate.measure(planned(stage))
    assert max(seen) == batch


def test_a_longer_plan_has_a_longer_estimate(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(Regression, run)
    before, found = run.status().expected_seconds, estimate.read(run.estimate)
    train(Regression, run, resume=True, max_steps=18, epochs=100, extend_steps=9)
    then = run.status().expected_seconds
    assert before and found and then
    fixed = found.start_seconds + estimate.FINISH_SECONDS
    assert then - fixed == pytest.approx(2 * (before - fixed), rel=0.2)


def test_a_run_keeps_its_estimate_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run)
    written = estimate.read(run.estimate)
    assert written is not None and written.parameters == 280
    expected = run.status().expected_seconds
    assert expected is not None and any(line.startswith(f"Estimate: {duration(expected)} for 9 steps")
                                        for line in caplog.messages)
    train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    assert estimate.read(run.estimate) == written and run.status().expected_seconds == expected
    assert all("speed/peak_share" in row for row in Journal(run.timings).rows())


def test_bytes_as_a_person_reads_them() -> None:
    assert [size(number) for number in (0, 2.4e6, 5.55e9)] == ["0 MB", "2 MB", "5.5 GB"]


def test_the_time_that_is_left_begins_with_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven rows and the samples, until an evaluation was timed."""
    monkeypatch.setattr(estimate, "measure", lambda *given: replace(SIMPLE, shown_seconds=3.0, saved_seconds=0.75))
    trainer, _ = session(Regression, new_run(tmp_path, Regression)).prepare()
    monitor = next(each for each in trainer.callbacks if isinstance(each, Speed))
    assert monitor.eval_seconds == 7 * 0.5 + 3.0
    assert monitor.step_seconds == pytest.approx((66 * 2.0 + 9 * 0.1 + 6 * 0.75) / 9)


def test_what_a_run_took_includes_its_models_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, before = new_run(tmp_path, Regression), list[float]()
    monkeypatch.setattr(sessions, "export_models", lambda *given: before.append(run.status().busy_seconds))
    monkeypatch.setattr(sessions, "_draw", lambda run: time.sleep(0.05))
    sitting = session(Regression, run)
    with run.lock():
        sitting.train()
    assert run.status().busy_seconds >= before[0] + 0.05
