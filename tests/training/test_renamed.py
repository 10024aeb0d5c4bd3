"""Runs and model folders from before an option had its present name: they are read as if they had it."""

from pathlib import Path
from typing import Any

import pytest

import made_speech
from stoker import config
from stoker.config import UserError
from stoker.training.assembly import receipt
from stoker.training.core import manifest, pretrained
from stoker.training.core.stage import discover

NOW = {"audio_enc": "labels", "ocr": "labels", "vision": "tokenizer"}


@pytest.fixture(params=NOW)
def stage(request: pytest.FixtureRequest) -> Any:
    return discover()[request.param]


def former(options: dict[str, Any], name: str) -> dict[str, Any]:
    """As they were written when the option was called units."""
    return {"units" if known == name else known: value for known, value in options.items()}


def test_the_former_name_is_read_in_a_command_line_and_a_file(stage: Any, tmp_path: Path) -> None:
    name, bpe = NOW[stage.name], str(tmp_path / "tokenizer.json")
    cfg = config.parse(stage.Config, stage.presets, ["--units", bpe]).config
    assert getattr(cfg, name) == bpe and "units" not in config.to_json(cfg)
    assert config.from_json(stage.Config, former(config.to_json(cfg), name), "run_config.json") == cfg
    with pytest.raises(UserError, match=f"--{name} bpe and --units chars contradict each other"):
        config.parse(stage.Config, stage.presets, [f"--{name}", "bpe", "--units", "chars"])


def test_a_snapshot_with_the_former_name_is_compared_by_the_present_one(stage: Any, tmp_path: Path) -> None:
    name = NOW[stage.name]
    options = config.to_json(stage.Config())
    now = {"stage": stage.name, "config": options, "data": {"rows": 3, name: "a" * 64}}
    old = {"stage": stage.name, "config": former(options, name), "data": {"rows": 3, "units": "a" * 64}}
    manifest.write(tmp_path, 1, {}, old)
    assert receipt.compare(tmp_path, now, stage.Config, extended=False) == []
    manifest.write(tmp_path, 1, {}, old | {"data": {"rows": 3, "units": "b" * 64}})
    with pytest.raises(UserError, match=f"not those of the interrupted run .{name} bbbbbbbb -> aaaaaaaa"):
        receipt.compare(tmp_path, now, stage.Config, extended=False)
    manifest.write(tmp_path, 1, {}, old | {"config": former(options | {"vocab_size": 300}, name)})
    with pytest.raises(UserError, match=f"vocab_size 300 -> {options['vocab_size']}"):
        receipt.compare(tmp_path, now, stage.Config, extended=False)


def test_a_model_folder_with_the_former_name_is_initialized_from(tmp_path: Path) -> None:
    stage = discover()["audio_enc"]
    cfg = stage.Config(dataset=str(made_speech.write(tmp_path / "data")), labels="bpe", vocab_size=280, num_mels=40,
                       d_model=32, num_heads=2, num_layers=1, d_ff=64)
    trained: Any = stage(cfg, tmp_path)
    trained.prepare()
    folder = tmp_path / "model"
    folder.mkdir()
    trained.export(trained.model(), folder)
    pretrained.note(folder, stage.name, 3, former(config.to_json(cfg), "labels"), {})
    found = pretrained.config_for(pretrained.find(str(folder)), stage)
    assert (found.d_model, found.num_layers, found.labels) == (32, 1, str(folder / "tokenizer.json"))
    again, _ = pretrained.opened(pretrained.find(str(folder)), stage, "cpu")
    assert again.tokenizer.fingerprint == trained.tokenizer.fingerprint
    for words, refused in ((["--labels", "bpe"], False), (["--units", "bpe"], False), (["--labels", "chars"], True)):
        parsed = config.parse(stage.Config, stage.presets, words)
        if not refused:
            assert pretrained.apply_options(stage, parsed, pretrained.find(str(folder))).config.labels == found.labels
            continue
        with pytest.raises(UserError, match="--labels chars differs from the "):
            pretrained.apply_options(stage, parsed, pretrained.find(str(folder)))
