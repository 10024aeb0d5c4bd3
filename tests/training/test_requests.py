"""Requests that arrive as files: from the command to what the trainer does."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stoker.daemon import __main__ as commands
from stoker.daemon import inbox
from stoker.daemon.inbox import Inbox
from stoker.daemon.rundir import PROJECT
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer
from toys import Buffers, StopAt, new_run, train, with_callbacks


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "SECONDS_BETWEEN_LOOKS", 0.0)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["daemon", *words])
    return commands.main()


@dataclass
class During(Callback):
    """Does something at the end of a step."""

    order = ACT
    step: int
    do: Callable[[], object]

    @property
    def key(self) -> str:
        return f"During {self.step}"

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            self.do()


def test_a_snapshot_and_a_trace_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str],
                                           caplog: pytest.LogCaptureFixture) -> None:
    """By the command, while it trains; the weights are those of a run that nobody asked for anything."""
    caplog.set_level("INFO")
    run, alone = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    codes: list[int] = []

    def ask(what: str) -> Callable[[], None]:
        return lambda: codes.append(command(monkeypatch, "ask", str(run.path), what))

    options: dict[str, Any] = dict(rows=100, snapshot_interval=0)
    trainer, _ = train(with_callbacks(Buffers, During(2, ask("snapshot")), During(3, ask("trace"))), run, **options)
    undisturbed, _ = train(Buffers, alone, **options)
    assert codes == [0, 0] and "was asked for a snapshot after this step" in capsys.readouterr().out
    assert Snapshots(run.snapshots, {}).steps() == [0, 2, 4, 8, 9] and not list(run.requests.iterdir())
    assert Snapshots(alone.snapshots, {}).steps() == [0, 4, 8, 9]
    assert "requests/snapshot: a snapshot after this step" in caplog.messages
    events = json.loads((run.path / "trace_step_00000004.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step#") for event in events) == 3, "three steps"
    assert not list(run.path.glob(".*")) and trainer.switched_off == []
    for a, b in zip(trainer.model.parameters(), undisturbed.model.parameters()):
        assert a.equal(b)


def test_a_trace_ends_with_the_sitting(tmp_path: Path) -> None:
    run = new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, During(3, lambda: inbox.ask(run.requests, "trace")), StopAt(5)), run)
    events = json.loads((run.path / "trace_step_00000004.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step#") for event in events) == 2


def test_a_request_that_came_before_is_obeyed_after_the_first_step(tmp_path: Path) -> None:
    run = new_run(tmp_path, Buffers)
    inbox.ask(run.requests, "snapshot")
    train(Buffers, run, rows=100, snapshot_interval=0, max_steps=3, eval_interval=3)
    assert Snapshots(run.snapshots, {}).steps() == [0, 1, 3]


def test_it_is_removed_when_it_is_obeyed_and_not_before(tmp_path: Path) -> None:
    """A run that is killed before obeys when it is resumed."""
    @dataclass
    class Killed(Callback):
        order = ACT

        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            if trainer.step == 2:
                assert (run.requests / "snapshot").exists()
                raise KeyboardInterrupt

    run = new_run(tmp_path, Buffers)
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Buffers, During(2, lambda: inbox.ask(run.requests, "snapshot")), Killed()), run)
    assert (run.requests / "snapshot").exists()
    train(with_callbacks(Buffers, StopAt(1)), run, resume=True)
    assert not (run.requests / "snapshot").exists()


# -- the folder -----------------------------------------------------------------------------------------------------


def test_what_is_no_request_is_reported_once_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "requests"
    box = Inbox(folder)
    assert box.look() == []  # there is no such folder
    folder.mkdir()
    for name in ("snapshots", ".half", "snapshot"):
        (folder / name).touch()
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    (folder / "trace").symlink_to("nowhere")
    assert box.look() == ["snapshot", "trace"] and box.look() == ["snapshot", "trace"]
    assert sorted(path.name for path in folder.iterdir()) == [".half", "full", "snapshot", "trace"]
    box.clear()
    assert box.look() == [] and sorted(os.listdir(folder)) == [".half", "full"]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert "requests/snapshots is no request and is removed; there are snapshot, trace" in warnings
    assert any(line.startswith(f"{folder / 'full'} cannot be removed: ") for line in warnings)


def test_what_cannot_be_removed_is_not_obeyed_for_ever(tmp_path: Path) -> None:
    (tmp_path / "requests/snapshot/inside").mkdir(parents=True)
    box = Inbox(tmp_path / "requests")
    assert box.look() == ["snapshot"]
    box.clear()
    assert box.look() == []


def test_a_folder_that_cannot_be_read_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "requests").touch()
    box = Inbox(tmp_path / "requests")
    assert box.look() == box.look() == []
    assert len([record for record in caplog.records if "no request can be read there" in record.message]) == 1


def test_it_looks_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "SECONDS_BETWEEN_LOOKS", 1.0)
    clock = [100.0]
    monkeypatch.setattr(inbox.time, "monotonic", lambda: clock[0])
    box = Inbox(tmp_path)
    assert box.look() == []
    (tmp_path / "snapshot").touch()
    for now, found in ((100.5, []), (100.99, []), (101.0, ["snapshot"])):
        clock[0] = now
        assert box.look() == found


# -- the command ----------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_run_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path, Buffers)
    assert command(monkeypatch, "ask", str(run.path), "snapshot") == 2
    error = capsys.readouterr().err
    assert "is not running" in error and error.count("\n") == 1 and not list(run.requests.iterdir())


def test_an_unknown_request_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path, Buffers)
    with run.lock():
        assert command(monkeypatch, "ask", str(run.path), "coffee") == 2
    error = capsys.readouterr().err
    assert "coffee" in error and "snapshot" in error and error.count("\n") == 1 and not list(run.requests.iterdir())


def test_the_script_asks(tmp_path: Path) -> None:
    run = new_run(tmp_path, Buffers)
    with run.lock():
        ran = subprocess.run([PROJECT / "run/ask.sh", run.path, "trace"], capture_output=True, text=True)
    assert ran.returncode == 0 and (run.requests / "trace").exists(), ran.stderr
    for words, why in (([], "which run?"), ([str(run.path)], "what for?")):
        ran = subprocess.run([PROJECT / "run/ask.sh", *words], capture_output=True, text=True)
        assert ran.returncode == 2 and why in ran.stderr and ran.stderr.count("\n") == 1
