"""Snapshots: whole or not there, verified, rotated, and never able to run code."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stoker import files
from stoker.config import UserError
from stoker.daemon import registry
from stoker.daemon.rundir import RunDir
from stoker.training.core import manifest, pretrained, snapshots
from stoker.training.core.figures import Ratio
from stoker.training.core.manifest import Damaged, _digest
from stoker.training.core.snapshots import Snapshots
from toys import Buffers, Regression, StopAt, assert_same, new_run, session, train, with_callbacks


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Stopped at step 5, with snapshots of steps 0, 3, 4 and 5."""
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run)
    return run


def kept(run: RunDir) -> list[str]:
    return [path.name for path in Snapshots(run.snapshots, {}).found()]


def test_names_and_content(run: RunDir) -> None:
    """The format is fixed: these names and keys are what older runs have on disk."""
    assert kept(run) == ["snapshot_step_00000000", "snapshot_epoch_0001", "snapshot_step_00000004",
                         "snapshot_step_00000005"]
    folder = run.snapshots / "snapshot_epoch_0001"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "model.safetensors", "state.pt"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 3
    assert manifest["files"]["state.pt"]["sha256"] == files.sha256(folder / "state.pt")
    assert {"config", "code", "packages", "device", "threads"} <= manifest["made_by"].keys()
    state = torch.load(folder / "state.pt", weights_only=True)
    assert {"step", "steps", "best", "best_step", "owed", "ledger", "micro", "optimizers", "rng",
            "callbacks"} <= state.keys()


def test_when_snapshots_are_taken(tmp_path: Path) -> None:
    """At step 0, each fourth step, each epoch's end and each new best (every one here, at 2, 4, 6, 8); once each."""
    run = new_run(tmp_path, Regression)
    train(Regression, run, eval_interval=2)
    steps = [manifest.step_of(path) for path in Snapshots(run.snapshots, {}).found()]
    assert steps == [0, 2, 3, 4, 6, 8, 9]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)  # the manifest ends in a newline, which nobody misses


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, make_folder])
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "manifest.json"])
def test_a_damaged_snapshot_is_named_and_not_used(run: RunDir, caplog: pytest.LogCaptureFixture, damage: Any,
                                                  file: str) -> None:
    newest = run.snapshots / "snapshot_step_00000005"
    damage(newest / file)
    with pytest.raises(Damaged, match=file.split(".")[0]):
        manifest.verify(newest)
    assert Snapshots(run.snapshots, {}).newest_good() == run.snapshots / "snapshot_step_00000004"
    if file != "manifest.json":
        assert "snapshot_step_00000005 is damaged" in caplog.text and file in caplog.text


def test_none_whole_is_refused(run: RunDir) -> None:
    for name in kept(run):
        flip(run.snapshots / name / "model.safetensors")
    with pytest.raises(UserError, match="none of the 4 snapshots"):
        train(Regression, run, resume=True)


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_snapshot_with_code_in_it_is_refused_and_the_code_not_run(run: RunDir, tmp_path: Path) -> None:
    """Also when whoever put it there made the checksums fit."""
    folder, proof = run.snapshots / "snapshot_step_00000005", tmp_path / "ran"
    torch.save({"step": Payload(proof)}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {"size": (folder / "state.pt").stat().st_size,
                                     "sha256": files.sha256(folder / "state.pt")}
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))
    with pytest.raises(UserError, match="it was not run"):
        train(Regression, run, resume=True)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()  # it would have


def test_another_shape_is_refused(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"0\.weight is \(16, 8\) there and \(16, 6\) here"):
        snapshots.load_weights(run.snapshots / "snapshot_step_00000005", nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)))


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """The evaluation of step 2 stays the best, since nothing is learned after it."""
    run = new_run(tmp_path, Regression)
    trainer, _ = train(Regression, run, keep_last_n_snapshots=2, snapshot_interval=1, eval_interval=2, lr=1e-9,
                       max_steps=8, rows=64)
    newest = [f"snapshot_step_{step:08d}" if step < 8 else "snapshot_epoch_0001" for step in (7, 8)]
    best = f"snapshot_step_{trainer.best_step:08d}" if trainer.best_step < 8 else "snapshot_epoch_0001"
    assert kept(run) == sorted({best, *newest}, key=lambda name: ("epoch" in name, name))


def test_a_snapshot_that_another_program_reads_is_deleted_later(run: RunDir) -> None:
    kept = Snapshots(run.snapshots, {})
    first, *_, last = kept.found()
    weights = pretrained.find(str(first))
    choices = iter([replace(weights, folder=run.path / "deleted meanwhile"), weights])
    assert pretrained.held(lambda: next(choices)).folder == first
    kept.keep_only(set())
    assert kept.found() == [first, last]
    os.close(manifest._held.pop())  # as when that program ends
    kept.keep_only(set())
    assert kept.found() == [last]


def test_zero_keeps_all(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(Regression, run, keep_last_n_snapshots=0, snapshot_interval=1)
    assert len(kept(run)) == 10


def test_a_save_that_fails_leaves_the_older_ones(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept(run)

    def full(*given: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space"):
        packed = snapshots.pack("snapshot_step_00000006", 6, {}, {})
        Snapshots(run.snapshots, {}).save(packed)
    assert kept(run) == before


def test_what_is_not_on_disk_as_written_is_never_committed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that changes a bit: the new snapshot is refused, and the older ones stay."""
    before, write = kept(run), files.write

    def bad_disk(path: Path, content: Any, **options: Any) -> None:
        write(path, content, **options)
        if path.name == "state.pt":
            flip(path)

    monkeypatch.setattr(files, "write", bad_disk)
    with pytest.raises(Damaged, match="state.pt has other content"):
        packed = snapshots.pack("snapshot_step_00000006", 6, {"w": torch.ones(3)}, {})
        Snapshots(run.snapshots, {}).save(packed)
    assert kept(run) == before


def test_what_a_kill_left_half_done_is_tidied(run: RunDir) -> None:
    """A half-written one goes; one moved aside while its successor was not yet in place comes back."""
    half = run.snapshots / ".snapshot_step_00000006"
    half.mkdir()
    os.replace(run.snapshots / "snapshot_step_00000004", run.snapshots / ".aside.snapshot_step_00000004")
    os.replace(run.snapshots / "snapshot_step_00000000", run.snapshots / ".old.snapshot_step_00000000")
    Snapshots(run.snapshots, {}).tidy()
    assert kept(run) == ["snapshot_epoch_0001", "snapshot_step_00000004", "snapshot_step_00000005"]
    assert not list(run.snapshots.glob(".*"))


def test_a_run_that_goes_on_tidies_first(run: RunDir) -> None:
    (run.snapshots / ".snapshot_step_00000006").mkdir()
    (run.snapshots / ".DS_Store").touch()  # not ours
    train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    assert [path.name for path in run.snapshots.glob(".*")] == [".DS_Store"]


def test_tied_weights_are_kept_once_and_tied_again(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model, other = Tied(), Tied()
    packed = snapshots.pack("snapshot_step_00000001", 1, model.state_dict(), {})
    path = Snapshots(tmp_path, {}).save(packed)
    snapshots.load_weights(path, other)
    assert torch.equal(other.b.weight, model.a.weight) and other.b.weight is other.a.weight


@pytest.mark.parametrize("spelling", ["snapshot_epoch_0001", "snapshot_epoch_0001/model.safetensors",
                                      "snapshot_epoch_1.pt", "snapshot_step_5.pt"])
def test_spellings_of_checkpoint_file(run: RunDir, spelling: str) -> None:
    expected = "snapshot_step_00000005" if "step" in spelling else "snapshot_epoch_0001"
    assert registry.snapshot(str(run.snapshots / spelling)) == run.snapshots / expected
    assert registry.snapshot(str(run.snapshots / "snapshot_epoch_9.pt")) is None


def test_a_finished_run_keeps_the_newest_snapshot_and_the_best(tmp_path: Path) -> None:
    class FirstIsBest(Buffers):
        scored = 0

        def score(self, model: Any, batch: Any) -> dict[str, Ratio]:
            self.scored += 1
            return {"loss": Ratio(float(self.scored), 1)}

    run = new_run(tmp_path, Buffers)
    sitting = session(FirstIsBest, run, keep_last_n_snapshots=3, delete_snapshots_after_training=True)
    with run.lock():
        ending = sitting.train()
    assert ending.state == "finished" and kept(run) == ["snapshot_step_00000004", "snapshot_epoch_0003"]
    best = torch.load(run.models / "best" / "model.pt", weights_only=True)
    assert_same(best, load_file(run.snapshots / "snapshot_step_00000004" / "model.safetensors"))
