"""Weights out of the Hugging Face hub: as parts, and as what a run begins with. No test leaves this machine."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from composed import Composed, folder_of, last, resumed, saved, thinker, trained
from fake_hub import COMMIT, MODEL, cached_model, serving_model
from stoker.config import UserError
from stoker.data.sources import hub
from stoker.training.assembly import launch, pages
from stoker.training.core import pretrained
from stoker.training.core.parts import Lora
from stoker.training.core.stage import discover
from test_stages import data_of, stage_with
from toys import StopAt, assert_same, new_run, session, train

LATER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in (*hub.OFFLINE, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    return tmp_path / "cache"


def changed() -> dict[str, torch.Tensor]:
    return {name: t + 1 for name, t in thinker().items()}


@pytest.mark.parametrize("named", [f"hf://{MODEL}", f"HF://{MODEL}", f"{MODEL}@main", f"hf://{MODEL}@{COMMIT}"])
def test_a_part_out_of_the_hub_is_recorded_with_its_commit(tmp_path: Path, cache: Path, source: Path, named: str,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    cached_model(cache, source)
    with caplog.at_level(logging.INFO):
        trainer, _ = train(Composed, run := new_run(tmp_path, Composed), thinker_ckpt=named, max_steps=2)
    assert_same(trainer.model.thinker.state_dict(), thinker())
    made_by = json.loads((last(run) / "manifest.json").read_text())["made_by"]
    assert made_by["parts"]["thinker"]["path"] == f"hf://{MODEL}@{COMMIT}"
    assert any(f"Part thinker: frozen, from hf://{MODEL}@{COMMIT}, SHA-256" in line for line in caplog.messages)


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": Lora(2)}])
def test_a_run_is_resumed_with_its_commit_though_the_branch_has_moved(tmp_path: Path, cache: Path, source: Path,
                                                                      how: dict[str, Any]) -> None:
    stage, named = trained(**how), {"thinker_ckpt": f"hf://{MODEL}"}
    cached_model(cache, source)
    train(toys.with_callbacks(stage, StopAt(4)), run := new_run(tmp_path, stage), **named)
    cached_model(cache, folder_of(tmp_path / "later", changed()), commit=LATER)
    trainer = resumed(stage, run)
    assert trainer.step == 9
    base = {n: t for n, t in trainer.model.thinker.state_dict().items() if n.startswith("layers") and "lora" not in n}
    assert_same(base, {n: t for n, t in thinker().items() if n.startswith("layers")})
    [weights] = (cache / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT).glob("*.safetensors")
    weights.unlink()
    with run.lock(), pytest.raises(UserError, match=f"part thinker: hf://{MODEL}@{COMMIT}: the Hugging Face hub .* "
                                                    "cannot be reached .*; bring back the weights with"):
        session(stage, run, resume=True, max_steps=12).prepare()


def test_other_content_under_the_same_commit_is_refused(tmp_path: Path, cache: Path, source: Path) -> None:
    found = cached_model(cache, source)
    train(toys.with_callbacks(Composed, StopAt(4)), run := new_run(tmp_path, Composed), thinker_ckpt=f"hf://{MODEL}")
    (found / "model.safetensors").unlink()
    shutil.copy(folder_of(tmp_path / "other", changed()) / "model.safetensors", found)
    with run.lock(), pytest.raises(UserError, match=f"hf://{MODEL}@{COMMIT} has other weights than before"):
        session(Composed, run, resume=True).prepare()


def test_what_is_gone_from_the_cache_is_downloaded_again(tmp_path: Path, cache: Path, source: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_model(source) as (address, requests):
        monkeypatch.setenv("HF_ENDPOINT", address)
        train(toys.with_callbacks(Composed, StopAt(4)), run := new_run(tmp_path, Composed), thinker_ckpt=f"hf://{MODEL}")
        assert any("model.safetensors" in request for request in requests)
        shutil.rmtree(cache)
        assert resumed(Composed, run).step == 9
    assert saved(run).keys() == {"head.weight", "head.bias"}


def test_a_model_folder_of_ours_may_lie_there(cache: Path, tmp_path: Path, source: Path) -> None:
    pretrained.note(source, "composed", 3, {"width": 8, "hidden": 16}, {})
    cached_model(cache, source)
    found = pretrained.find(f"hf://{MODEL}")
    assert (found.stage, found.step, str(found)) == ("composed", 3, f"hf://{MODEL}@{COMMIT}, step 3")


# -- what asks the hub, and what does not -----------------------------------------------------------------------------


def test_a_command_line_is_checked_without_a_download(cache: Path, source: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"part thinker: hf://{MODEL}@main: .*cannot be reached .*has no copy"):
        launch.decide(Composed, ["--thinker_ckpt", f"hf://{MODEL}"])
    with pytest.raises(UserError, match="part thinker: hf://some: a repository of the Hugging Face hub is written"):
        launch.decide(Composed, ["--thinker_ckpt", "hf://some"])
    with serving_model(source) as (address, requests):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert launch.decide(Composed, ["--thinker_ckpt", f"hf://{MODEL}"]).cfg.thinker_ckpt == f"hf://{MODEL}"
        assert len(requests) == 1 and not cache.exists()


def test_info_and_help_do_not_ask_the_hub(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_model(source) as (address, requests):
        monkeypatch.setenv("HF_ENDPOINT", address)
        argv = ["--thinker_ckpt", f"hf://{MODEL}"]
        for words in (["--help"], ["--print_config"]):
            page = pages.asked(Composed, [*words, *argv])
            assert page and page()
        page = pages.asked(Composed, ["--info", *argv, "--device", "cpu", "--max_steps", "2"])
        assert page
        with pytest.raises(UserError, match=f"part thinker: hf://{MODEL}@main is not in .* yet: the start of a run"):
            page()
        of_gpt = pages.asked(discover()["lm"], ["--info", "--init_from", f"hf://{MODEL}"])
        assert of_gpt
        with pytest.raises(UserError, match=f"^hf://{MODEL}@main is not in .* yet: the start of a run downloads it"):
            of_gpt()
        cached_model(cache, source)
        assert "parameters" in page()
        assert requests == []


def test_a_run_begins_with_a_gpt_of_the_hub(tmp_path: Path, cache: Path) -> None:
    """And is resumed when the cache is gone: neither weights nor tokenizer are needed any more."""
    lm, values = discover()["lm"], data_of("lm", tmp_path) | {"max_steps": 1}
    first = session(lm, new_run(tmp_path / "1", lm), **values)
    with first.run.lock():
        assert first.train().state == "finished"
    (first.run.models / "final" / "stoker.json").unlink()
    cached_model(cache, first.run.models / "final")
    job = launch.decide(lm, ["--init_from", f"hf://{MODEL}", "--dataset", values["dataset"]])
    assert (job.cfg.d_model, job.cfg.num_layers) == (values["d_model"], values["num_layers"])
    begun = {**values, "tokenizer": job.cfg.tokenizer, "init_from": f"hf://{MODEL}", "lr": 1e-9, "max_steps": 3}
    trainer, _ = train(stage_with(lm, StopAt(2)), run := new_run(tmp_path / "2", lm), **begun)
    assert trainer.step == 2
    expected = pretrained.opened(pretrained.of_run(first.run), lm, "cpu")[1]
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    made_by = json.loads((last(run) / "manifest.json").read_text())["made_by"]
    assert made_by["begun_with"]["path"] == f"hf://{MODEL}@{COMMIT}"
    shutil.rmtree(cache)
    assert resumed(lm, run).step == 3
