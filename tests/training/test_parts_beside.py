"""Parts a copy of whose source lies beside the weights: the source may go, or change."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import toys
from composed import Composed, folder_of, last, resumed, saved, thinker, trained
from fake_hub import MODEL, cached_model, serving_model
from stoker.config import Parsed, UserError
from stoker.daemon.rundir import RunDir
from stoker.training.assembly import eval_only, fork
from stoker.training.assembly.job import Job
from stoker.training.core import copied, pretrained
from stoker.training.core.parts import Lora, Part
from toys import StopAt, assert_same, new_run, session, train

STAGE = trained(train="frozen", export="beside")


def copy_in(folder: Path) -> Path:
    return folder / copied.FOLDER / "thinker"


def begun(folder: Path, source: Path | str, stage: type[Composed] = STAGE) -> RunDir:
    train(toys.with_callbacks(stage, StopAt(4)), run := new_run(folder, stage), thinker_ckpt=str(source))
    return run


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": Lora(2)}])
def test_a_run_needs_its_source_no_more(tmp_path: Path, source: Path, how: dict[str, Any]) -> None:
    stage = trained(**how, export="beside")
    expected = train(stage, new_run(tmp_path / "whole", stage), thinker_ckpt=str(source))[0]
    run = begun(tmp_path, source, stage)
    assert_same(load_file(copy_in(run.path) / "model.safetensors"), thinker())
    assert not {name for name in saved(run) if name.startswith("thinker.layers") and "lora" not in name}
    shutil.rmtree(source)
    assert_same(resumed(stage, run).model.state_dict(), expected.model.state_dict())


def test_the_copy_is_there_from_the_beginning(tmp_path: Path, source: Path) -> None:
    seen = []

    class Look(toys.Recorder):
        def on_step_start(self, trainer: Any) -> None:
            seen.append(copy_in(run.path).is_dir())

    stage = toys.with_callbacks(STAGE, Look())
    run = new_run(tmp_path, stage)
    hidden = copy_in(run.path).with_name(".thinker")
    hidden.mkdir(parents=True)  # a kill left it
    (hidden / "half.safetensors").write_bytes(b"half")
    train(stage, run, thinker_ckpt=str(source), max_steps=1)
    assert seen == [True] and sorted(path.name for path in copy_in(run.path).iterdir()) == [
        "config.json", "model.safetensors"] and not hidden.exists()


def test_files_that_may_be_written_in_place_are_copied_others_are_linked(tmp_path: Path, source: Path) -> None:
    copied = begun(tmp_path / "1", source)
    with open(source / "model.safetensors", "r+b") as file:  # as another program may
        file.seek(-40, 2)
        file.write(bytes(40))
    trainer = resumed(STAGE, copied)
    assert_same(trainer.model.thinker.state_dict(), thinker())
    ours = folder_of(tmp_path / "ours", thinker())
    pretrained.note(ours, "composed", 3, {}, {})
    linked = begun(tmp_path / "2", ours)
    assert os.path.samefile(ours / "model.safetensors", copy_in(linked.path) / "model.safetensors")
    assert not os.path.samefile(source / "model.safetensors", copy_in(copied.path) / "model.safetensors")


def test_another_copy_is_refused(tmp_path: Path, source: Path) -> None:
    run = begun(tmp_path, source)
    folder_of(copy_in(run.path), {name: t + 1 for name, t in thinker().items()})
    with run.lock():
        session(STAGE, run, resume=True).prepare()  # by the source itself
        shutil.rmtree(source)
        with pytest.raises(UserError, match="part thinker: .*source is gone; bring back the weights"):
            session(STAGE, run, resume=True).prepare()


def test_a_model_folder_is_whole_wherever_it_is(tmp_path: Path, source: Path) -> None:
    run = new_run(tmp_path, STAGE)
    sitting = session(STAGE, run, thinker_ckpt=str(source), eval_interval=3)
    with run.lock():
        assert sitting.train().state == "finished"
    expected = pretrained.opened(pretrained.find(str(last(run))), STAGE, "cpu")[1]
    moved = Path(shutil.copytree(run.models / "final", tmp_path / "moved"))
    run.remove()
    shutil.rmtree(source)
    weights = pretrained.find(str(moved))
    made, model = pretrained.opened(weights, STAGE, "cpu")
    assert_same(model.state_dict(), expected.state_dict())
    assert load_file(moved / "model.safetensors").keys() == {"head.weight", "head.bias"}
    [done] = eval_only.evaluated(Job(STAGE, Parsed(sitting.job.cfg, frozenset(), ""), evaluated=weights))
    assert done.metrics["eval/loss"] > 0
    (copy_in(moved) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="moved is not as it was written: model.safetensors is missing"):
        pretrained.opened(pretrained.find(str(moved)), STAGE, "cpu")


def test_a_run_from_an_older_snapshot_has_the_copy_too(tmp_path: Path, source: Path) -> None:
    run = begun(tmp_path, source)
    shutil.rmtree(source)
    other = fork.create(last(run), session(STAGE, run, resume=True).job.cfg)
    run.remove()
    assert resumed(STAGE, other).step == 9


def test_the_copy_is_used_before_anything_is_downloaded(tmp_path: Path, source: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    cached_model(tmp_path / "cache", source)
    run = begun(tmp_path, f"hf://{MODEL}")
    blobs = tmp_path / "cache" / f"models--{MODEL.replace('/', '--')}" / "blobs"
    linked = {path.stat().st_ino for path in blobs.iterdir()}
    assert {path.stat().st_ino for path in copy_in(run.path).iterdir()} == linked
    shutil.rmtree(tmp_path / "cache")
    with serving_model(source) as (address, requests):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert_same(resumed(STAGE, run).model.thinker.state_dict(), thinker())
        assert requests == []


def test_what_belongs_to_a_snapshot_goes_along(tmp_path: Path, source: Path) -> None:
    """Its weights and manifest, its run's tokenizer; not its optimizer. What it is stays known."""
    whole = trained(train="whole")
    other = begun(tmp_path / "other", source, whole)
    (other.path / "tokenizer.json").write_text("{}")
    stage = trained(train="frozen", export="beside", prefix="thinker.")
    run = begun(tmp_path, last(other), stage)
    assert sorted(path.name for path in copy_in(run.path).iterdir()) == [
        "manifest.json", "model.safetensors", "tokenizer.json"]
    expected = {n.removeprefix("thinker."): t for n, t in saved(other).items() if n.startswith("thinker.")}
    other.remove()
    assert_same(resumed(stage, run).model.thinker.state_dict(), expected)
    found = pretrained.find(str(copy_in(run.path)))
    assert found.is_snapshot and found.run is None and found.stage == "composed"


def test_a_part_that_is_trained_whole_has_no_copy_beside() -> None:
    with pytest.raises(ValueError, match="export it as a copy"):
        Part("thinker", export="beside")
