"""Snapshots that are written while training goes on, and what becomes of them when the disk will not take them."""

import errno
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stoker import files
from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.training.core import saver, snapshots
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.manifest import Damaged
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Ending, Trainer
from toys import Buffers, Regression, StopAt, assert_same, new_run, session, train, with_callbacks


def outcome(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": load_file(last / "model.safetensors"), "state": torch.load(last / "state.pt", weights_only=True),
            "metrics": list(Journal(run.metrics).rows())}


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, Any]:
    run = new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(-1)), run, rows=100)  # one epoch: saved at steps 0, 4, 8 and 9
    return outcome(run)


@dataclass
class Disk(Callback):
    """A disk that is full, or slow, for the files whose path holds `where`, from one step of the trainer to another."""

    order = ACT
    first: int
    last: int
    where: str = ""
    error: int = errno.ENOSPC
    slow: bool = False
    refused: int = 0
    troubles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.at, self.free, self.shown = -1, threading.Event(), [""]
        self.write, self.append = files.write, files.append

    def install(self, patch: pytest.MonkeyPatch) -> "Disk":
        patch.setattr(files, "write", lambda path, *given, **more: (self.look(path), self.write(path, *given, **more)))
        patch.setattr(files, "append", lambda path, *given, **more: (self.look(path),
                                                                     self.append(path, *given, **more)))
        patch.setattr(saver, "FIRST_WAIT", 0.005)
        patch.setattr(saver, "LONGEST_WAIT", 0.005)
        return self

    def look(self, path: Path) -> None:
        if self.where in str(path) and self.first <= self.at < self.last:
            if self.slow:
                assert self.free.wait(20), "it waits for the disk"
            else:
                self.refused += 1
                raise OSError(self.error, "refused on purpose", str(path))

    def on_step_start(self, trainer: Trainer) -> None:
        self.shown.append(RunDir(trainer.snapshots.folder.parent).status().reason)
        if trainer.step < self.first and trainer.saver._writing:
            trainer.saver._writing.result()  # what was begun before is on disk before it fills

    def on_step_end(self, trainer: Trainer) -> None:
        self.at = trainer.step
        if self.at >= self.last:
            self.free.set()
        elif self.at >= self.first and not self.slow:
            time.sleep(0.02)  # for the saver to try meanwhile

    def on_trouble(self, trainer: Trainer) -> None:
        self.troubles += (trainer.saver.trouble,)


def trained(run: RunDir, *callbacks: Callback, **options: Any) -> tuple[Trainer, Ending]:
    return train(with_callbacks(Buffers, StopAt(-1), *callbacks), run, **{"rows": 100} | options)


def test_training_goes_on_while_a_snapshot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      alone: dict[str, Any]) -> None:
    """The disk takes nothing of the snapshot of step 4 before step 6 is done: and it is nevertheless that of step 4."""
    run, disk = new_run(tmp_path, Buffers), Disk(4, 6, "snapshots/.snapshot", slow=True).install(monkeypatch)
    _, ending = trained(run, disk)
    assert ending.state == "finished"
    assert_same(outcome(run), alone)
    for path in (tmp_path / "run_buffers" / "snapshots").iterdir():
        other = run.snapshots / path.name
        assert_same(torch.load(path / "state.pt", weights_only=True), torch.load(other / "state.pt", weights_only=True))
        assert_same(load_file(path / "model.safetensors"), load_file(other / "model.safetensors"))


@pytest.mark.parametrize("where", ["", "snapshots/", "metrics.jsonl", "timings.jsonl", "status.json", "alerts"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_when_space_returns_it_is_the_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str,
                                                      error: int, alone: dict[str, Any]) -> None:
    run, disk = new_run(tmp_path, Buffers), Disk(2, 7, where, error).install(monkeypatch)
    trainer, ending = trained(run, disk)
    assert (ending.state, trainer.switched_off) == ("finished", [])
    assert disk.refused or where == "alerts"
    assert_same(outcome(run), alone)
    assert [row["step"] for row in Journal(run.timings).rows()] == [row["step"] for row in alone["metrics"]]
    if where in ("", "snapshots/"):
        assert "refused on purpose" in disk.troubles[0] and disk.troubles[-1] == ""
        assert any("no snapshot can be written" in shown for shown in disk.shown) and not disk.shown[-1]


def test_the_newest_and_the_best_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, disk = new_run(tmp_path, Buffers), Disk(2, 7, "snapshots/").install(monkeypatch)
    trained(run, disk, snapshot_interval=1)
    steps = [int(path.name[-2:]) for path in Snapshots(run.snapshots, {}).found()]
    assert steps[:3] == [0, 1, 4] and steps[3] in (6, 7), "the evaluation's, and where it was tried last or the next"
    assert not list(run.snapshots.glob(".*"))


@pytest.mark.parametrize("stop", [False, True])
def test_it_ends_when_the_disk_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[str, Any],
                                          stop: bool) -> None:
    """With the last good snapshot, from which it goes on when there is room: also rows of the journal come back."""
    run, disk = new_run(tmp_path, Buffers), Disk(6, 99).install(monkeypatch)
    monkeypatch.setattr(saver, "AFTER_STOP", 0.1)
    _, ending = train(with_callbacks(Buffers, StopAt(7 if stop else -1), disk), run, rows=100,
                      disk_full_minutes=60.0 if stop else 0.1 / 60)
    assert ending.state == "halted" and "(" in ending.reason and "refused on purpose" in ending.reason
    assert "make room, and resume" in ending.reason and not list(run.snapshots.glob(".*/manifest.json"))
    assert [path.name for path in Snapshots(run.snapshots, {}).found()][-1] == "snapshot_step_00000004"
    disk.last = 0
    trained(run, resume=True)
    assert_same(outcome(run), alone)


@pytest.mark.parametrize("last", [5, 99])
def test_rows_that_a_snapshot_keeps_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int,
                                                     alone: dict[str, Any]) -> None:
    """Those of steps 2 and 4 are in the snapshot of step 5, and in the journal if there was room at the end."""
    run, disk = new_run(tmp_path, Buffers), Disk(2, last, ".jsonl").install(monkeypatch)
    train(with_callbacks(Buffers, StopAt(5), disk), run, rows=100)
    assert [row["step"] for row in Journal(run.metrics).rows()] == ([1, 2, 4] if last == 5 else [1])
    disk.last = 0
    trained(run, resume=True)
    assert_same(outcome(run), alone)


def test_before_the_first_step_it_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, disk = new_run(tmp_path, Buffers), Disk(-1, 99, "snapshots/").install(monkeypatch)
    trainer, ending = trained(run, disk)
    assert (ending.state, trainer.step) == ("halted", 0)


@pytest.mark.parametrize("error", [errno.EFBIG, errno.EROFS])
def test_what_will_not_pass_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    run, disk = new_run(tmp_path, Buffers), Disk(4, 99, "snapshots/", error).install(monkeypatch)
    with pytest.raises(OSError, match="refused on purpose"):
        trained(run, disk)
    assert disk.refused == 1


def test_a_snapshot_that_is_gone_with_its_folder_is_not_tried_again(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the run's folder is moved in the midst of it."""
    def gone(self: Snapshots, *_: object, **__: object) -> None:
        shutil.rmtree(self.folder)
        raise Damaged("it is missing")

    monkeypatch.setattr(Snapshots, "save", gone)
    with pytest.raises(Damaged, match="it is missing"):
        train(Regression, new_run(tmp_path, Regression))


def test_room_is_looked_for_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true size: not a byte is written where it would not do."""
    kept = Snapshots(tmp_path, {})
    packed = snapshots.pack("snapshot_step_00000001", 1, {"w": torch.ones(1000)}, {"step": 1, "m": torch.ones(500)})
    path = kept.save(packed)
    on_disk = sum((path / name).stat().st_size for name in packed.content)
    assert packed.size == on_disk > 6000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=on_disk + snapshots.SPARE - 1))
    again = snapshots.Packed("snapshot_step_00000002", 2, packed.content)
    with pytest.raises(OSError, match=f"a snapshot takes {on_disk:,} bytes") as caught:
        kept.save(again)
    assert caught.value.errno == errno.ENOSPC and [path.name for path in tmp_path.iterdir()] == [path.name]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=on_disk + snapshots.SPARE))
    kept.save(again)


def test_a_start_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run that goes on, by the size of the snapshot it has."""
    run, usage = new_run(tmp_path, Buffers), shutil.disk_usage(tmp_path)
    train(with_callbacks(Buffers, StopAt(5)), run)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=snapshots.SPARE))
    last = Snapshots(run.snapshots, {}).found()[-1]
    size = sum((last / name).stat().st_size for name in ("model.safetensors", "state.pt"))
    with pytest.raises(UserError, match=f"a snapshot takes {size:,} bytes, 1,048,576 are free in .*: make room"):
        train(Buffers, run, resume=True)
    with pytest.raises(UserError, match="make room, or choose another --result_dir"):
        train(Buffers, new_run(tmp_path, Buffers))


def test_what_was_packed_does_not_change_with_the_model(tmp_path: Path) -> None:
    weights, state = {"w": torch.ones(3)}, {"m": torch.ones(3), "list": [1]}
    packed = snapshots.pack("snapshot_step_00000001", 1, weights, state)
    weights["w"].zero_(), state["m"].zero_(), state["list"].clear()  # type: ignore[attr-defined]
    path = Snapshots(tmp_path, {}).save(packed)
    assert_same(load_file(path / "model.safetensors"), {"w": torch.ones(3)})
    assert_same(torch.load(path / "state.pt", weights_only=True), {"m": torch.ones(3), "list": [1]})


def test_an_error_in_training_does_not_spoil_a_snapshot_under_way(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Fall(Callback):
        order = ACT

        def on_step_start(self, trainer: Trainer) -> None:
            if trainer.step == 5:
                threading.Timer(0.2, disk.free.set).start()
                raise RuntimeError("fallen")

    run, disk = new_run(tmp_path, Buffers), Disk(4, 99, "snapshots/.snapshot", slow=True).install(monkeypatch)
    with pytest.raises(RuntimeError, match="fallen"):
        trained(run, disk, Fall())
    assert Snapshots(run.snapshots, {}).newest_good() == run.snapshots / "snapshot_step_00000004"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saver")]


def test_a_model_that_cannot_be_handed_out_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halted and resumable; when it goes on nothing is trained again."""
    class Full(Regression):
        full = True

        def export(self, model: torch.nn.Module, folder: Path) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().export(model, folder)

    run = new_run(tmp_path, Full)
    with run.lock():
        ending = session(Full, run).train()
    assert ending.state == "halted" and "the model could not be written" in ending.reason
    monkeypatch.setattr(Full, "full", False)
    before = outcome(run)
    with run.lock():
        assert session(Full, run, resume=True).train().state == "finished"
    assert_same(outcome(run), before)
    assert (run.models / "final" / "model.pt").exists()
