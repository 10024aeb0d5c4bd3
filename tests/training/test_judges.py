"""Networks for evaluation alone, and model folders of models with parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import toys
from composed import LORA, Judged, folder_of, last, saved, thinker, trained
from stoker.config import Parsed, UserError
from stoker.daemon.rundir import RunDir
from stoker.training.assembly import eval_only
from stoker.training.assembly.job import Job
from stoker.training.core import pretrained
from stoker.training.core.parts import Lora
from stoker.training.core.stage import Stage
from toys import StopAt, assert_same, new_run, session, train

# -- judges ---------------------------------------------------------------------------------------------------------


def test_a_judge_is_for_evaluation_alone(tmp_path: Path, source: Path, judge: Path) -> None:
    run, other = new_run(tmp_path / "1", Judged), new_run(tmp_path / "2", Judged)
    trainer, _ = train(Judged, run, thinker_ckpt=str(source), judge_ckpt=str(judge))
    without, _ = train(Judged, other, thinker_ckpt=str(source))
    assert_same(saved(run), saved(other))
    assert_same(trainer.model.state_dict(), without.model.state_dict())
    rows = torch.stack([toys.Points(7, 8, 1000)[i] for i in range(7)]).double()
    expected = float((rows @ torch.arange(8.0).double() + 0.5).mean())
    found = [json.loads(line).get("eval/opinion") for line in run.metrics.read_text().splitlines()]
    assert [value for value in found if value] == pytest.approx([expected] * len([v for v in found if v]), rel=1e-5)
    assert not any(p.requires_grad for p in trainer.stage.judges["judge"].parameters())
    assert not trainer.stage.judges["judge"].training


def test_weights_alone_are_evaluated_with_their_parts_and_the_judge(tmp_path: Path, source: Path, judge: Path) -> None:
    run = new_run(tmp_path, Judged)
    trainer, _ = train(Judged, run, thinker_ckpt=str(source), judge_ckpt=str(judge))
    weights = pretrained.find(str(last(run)))
    [done] = eval_only.evaluated(Job(Judged, Parsed(trainer.cfg, frozenset(), ""), evaluated=weights))
    journal = json.loads(run.metrics.read_text().splitlines()[-1])
    assert done.metrics == {name: journal[name] for name in done.metrics} and "eval/opinion" in done.metrics


def test_another_judge_is_refused(tmp_path: Path, source: Path, judge: Path) -> None:
    stage = toys.with_callbacks(Judged, StopAt(4))
    train(stage, run := new_run(tmp_path, Judged), thinker_ckpt=str(source), judge_ckpt=str(judge))
    folder_of(judge, {"weight": torch.ones(1, 8), "bias": torch.tensor([0.5])})
    with run.lock(), pytest.raises(UserError, match="part judge: .* has other weights than before"):
        session(Judged, run, resume=True).prepare()


# -- model folders --------------------------------------------------------------------------------------------------


def finished(stage: type[Stage], run: RunDir, **options: Any) -> None:
    sitting = session(stage, run, **options)
    with run.lock():
        assert sitting.train().state == "finished"


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": Lora(2)}, {"train": "whole"}])
def test_a_model_folder_with_a_copy_needs_no_source(tmp_path: Path, source: Path, how: dict[str, Any]) -> None:
    stage = trained(**how)
    finished(stage, run := new_run(tmp_path, stage), thinker_ckpt=str(source), eval_interval=3)
    snapshot_of = pretrained.opened(pretrained.find(str(last(run))), stage, "cpu")[1]
    shutil.rmtree(source)
    made, model = pretrained.opened(pretrained.find(str(run.models / "final")), stage, "cpu")
    assert not any("lora" in name for name in model.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), snapshot_of(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": Lora(2)}])
def test_a_model_folder_with_a_reference(tmp_path: Path, source: Path, how: dict[str, Any]) -> None:
    stage = trained(**how, export="reference")
    finished(stage, run := new_run(tmp_path, stage), thinker_ckpt=str(source))
    final = run.models / "final"
    noted = json.loads((final / "stoker.json").read_text())["parts"]["thinker"]
    assert (noted["path"], len(noted["sha256"])) == (str(source), 64)
    assert not any(name.startswith("thinker.layers.0.w") for name in load_file(final / "model.safetensors"))
    x = torch.randn(5, 8)
    expected = pretrained.opened(pretrained.find(str(last(run))), stage, "cpu")[1](x)
    assert torch.equal(pretrained.opened(pretrained.find(str(final)), stage, "cpu")[1](x), expected)
    weights = thinker()
    weights["norm.bias"] += 1
    folder_of(source, weights)
    with pytest.raises(UserError, match="part thinker: .* has other weights than before"):
        pretrained.opened(pretrained.find(str(final)), stage, "cpu")


def test_weights_trained_beside_another_part_do_not_begin_a_run(tmp_path: Path, source: Path) -> None:
    finished(LORA, run := new_run(tmp_path / "1", LORA), thinker_ckpt=str(source))
    more = train(LORA, new_run(tmp_path / "2", LORA), snapshot=last(run), thinker_ckpt=str(source), max_steps=1)[0]
    assert more.step == 1
    weights = thinker()
    weights["norm.bias"] += 1
    other = folder_of(tmp_path / "other", weights)
    with pytest.raises(UserError, match="was trained with other weights of part thinker than"):
        train(LORA, new_run(tmp_path / "3", LORA), snapshot=last(run), thinker_ckpt=str(other))
    whole = trained(train="whole")
    with pytest.raises(UserError, match="was trained with other weights of part thinker than"):
        train(whole, new_run(tmp_path / "5", whole), snapshot=last(run), thinker_ckpt=str(other))
    with pytest.raises(UserError, match="holds part thinker with its adapters merged"):
        train(LORA, new_run(tmp_path / "4", LORA), init_from=str(run.models / "final"), thinker_ckpt=str(source))
