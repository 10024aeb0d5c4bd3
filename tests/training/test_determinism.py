"""A stage may declare that operators have no deterministic form on a device: it trains, and resumes to rounding."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.config import Parsed, UserError
from stoker.daemon.journal import Journal
from stoker.training.assembly import eval_only, pages
from stoker.training.core import device as devices
from stoker.training.core import manifest, pretrained
from stoker.training.core.snapshots import Snapshots
from toys import QUICK, Layer, Regression, new_run, session, train

REFUSED = "does not have a deterministic implementation"
WHY = "max_unpool1d has no deterministic form on cpu"


@pytest.fixture(autouse=True)
def strict_afterwards() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(True)


class Unpool(nn.Module):
    """torch has no deterministic form of it, on any device: places may repeat."""

    def forward(self, x: Tensor) -> Tensor:
        values, places = F.max_pool1d(x[None], 2, return_indices=True)
        return F.max_unpool1d(values, places, 2)[0]


class Silent(Regression):
    name = "silent"

    def model(self) -> nn.Module:
        return nn.Sequential(Layer(self.cfg.width, 16), Unpool(), Layer(16, self.cfg.width))


class Elsewhere(Silent):
    name = "elsewhere"
    nondeterministic = {"cuda": "max_unpool1d"}


class Declared(Silent):
    name = "declared"
    nondeterministic = {"cpu": "max_unpool1d", "cuda": "max_unpool1d"}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith("Determinism:")]


@pytest.mark.parametrize("stage", [Silent, Elsewhere])
def test_without_a_declaration_for_the_device_it_is_refused(tmp_path: Path, stage: type[Silent],
                                                           caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError, match=REFUSED):
        train(stage, new_run(tmp_path, stage))
    assert not lines(caplog)


def test_with_it_torch_warns_and_launch_and_receipt_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = new_run(tmp_path, Declared)
    with pytest.warns(UserWarning, match=REFUSED):
        _, ending = train(Declared, run)
    assert ending.state == "finished"
    assert lines(caplog) == [f"Determinism: {WHY}; a resumed run is the uninterrupted one to rounding, not bit for bit"]
    assert manifest.read(Snapshots(run.snapshots, {}).found()[-1])["made_by"]["to_rounding"] == WHY


def test_the_next_run_of_the_process_is_strict_again(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=REFUSED):
        train(Declared, new_run(tmp_path, Declared))
    other = new_run(tmp_path, Regression)
    train(Regression, other)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert "to_rounding" not in manifest.read(Snapshots(other.snapshots, {}).found()[-1])["made_by"]


@pytest.mark.parametrize("stage, says", [(Regression, "bit for bit"), (Elsewhere, None),
                                         (Declared, f"to rounding: {WHY}")])
def test_info_says_what_a_resume_is(stage: type[Regression], says: str | None) -> None:
    parsed = Parsed(stage.Config(**QUICK), frozenset(QUICK), "")
    if says is None:
        with pytest.raises(RuntimeError, match=REFUSED):
            pages.figures(stage, (parsed, []))
    elif "rounding" in says:
        with pytest.warns(UserWarning, match=REFUSED):
            page = pages.figures(stage, (parsed, []))
        assert page.splitlines()[-1] == f"a resume is      {says}"
    else:
        assert pages.figures(stage, (parsed, [])).splitlines()[-1] == f"a resume is      {says}"


def test_an_evaluation_runs_as_well(tmp_path: Path) -> None:
    class Loadable(Declared):
        def load(self, model: nn.Module, folder: Path) -> None:
            model.load_state_dict(torch.load(folder / "model.pt"))

    run = new_run(tmp_path, Loadable)
    with pytest.warns(UserWarning, match=REFUSED):
        trainer, _ = train(Loadable, run)
    last = [row for row in Journal(run.metrics).rows() if "eval/loss" in row][-1]
    job = session(Loadable, run).job
    job = replace(job, evaluated=pretrained.find(str(Snapshots(run.snapshots, {}).found()[-1])))
    torch.use_deterministic_algorithms(True)
    job.cfg.split = "validation"
    with pytest.warns(UserWarning, match=REFUSED):
        [scores] = eval_only.evaluated(job)
    assert scores.metrics["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)


def test_a_kind_of_device_that_there_is_not_is_a_mistake(tmp_path: Path) -> None:
    wrong: Any = type("Wrong", (Regression,), {"nondeterministic": {"gpu": "max_unpool1d"}})
    with pytest.raises(UserError, match="nondeterministic on gpu: the kinds of device are cpu, cuda and mps"):
        train(wrong, new_run(tmp_path, wrong))
    assert devices.to_rounding(torch.device("cuda", 0), Elsewhere.nondeterministic).endswith("form on cuda")
