"""Weights & Biases: offline for real, and against a stand-in for its server that may stop to answer."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.monitors import wandb as monitor
from stoker.training.assembly import launch
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.stage import discover
from stoker.training.trainer import Trainer
from toys import Buffers, Showing, StopAt, assert_same, new_run, train, with_callbacks

PROJECT = {"id": "UA==", "name": "stoker", "entity": {"id": "RQ==", "name": "me"}}


@dataclass
class Server:
    """Answers what wandb asks of its server when a run begins and goes on, and keeps what it is sent."""

    url: str = ""
    silent: str = ""  # no answer is given to requests whose path ends with this
    runs: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if self.silent and path.endswith(self.silent):
            threading.Event().wait(60)
        if path.endswith("file_stream"):
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})
            self.history += [json.loads(line) for line in sent["content"]]
            return {}
        asked = json.loads(body)
        if "upsertBucket" in asked["query"]:
            name = asked["variables"]["name"]
            self.runs.append(name)
            bucket = {"id": "Qg==", "name": name, "displayName": name, "description": None, "config": "{}",
                      "sweepName": None, "project": PROJECT, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in asked["query"]:
            return {"data": {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": []}}}
        return {"data": {"model": None}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            self.respond(json.dumps(state.answer(self.path, body)).encode())

        def do_HEAD(self) -> None:
            self.respond(b"")

        def respond(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *given: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads, listening.block_on_close = True, False
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{listening.server_address[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield state
        listening.shutdown()


@pytest.fixture(autouse=True)
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's settings and keys are those of a test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def sent(run: RunDir) -> list[dict[str, Any]]:
    """What TensorBoard and W&B are given: a row a log step."""
    rows = {row["step"]: row for row in Journal(run.metrics).rows()}
    timings = {row["step"]: row for row in Journal(run.timings).rows()}
    return [{name: value for name, value in (row | timings[step]).items() if name != "time"}
            for step, row in rows.items()]


def plain(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they arrived, without W&B's own fields and the best so far."""
    return [{name: value for name, value in row.items() if not name.startswith("_") and "/best_" not in name
             and not isinstance(value, dict)} for row in history]


# -- where it is sent ---------------------------------------------------------------------------------------------


def test_every_log_step_arrives_under_the_tags_of_tensorboard(tmp_path: Path, server: Server) -> None:
    run = new_run(tmp_path, Buffers)
    trainer, _ = train(Buffers, run, use_wandb=True)
    assert trainer.switched_off == [] and plain(server.history) == sent(run)
    assert [row["eval/best_loss"] for row in server.history if "eval/loss" in row][-1] == trainer.best


def test_a_run_that_goes_on_is_the_same_run_and_loses_no_step(tmp_path: Path, server: Server) -> None:
    @dataclass
    class Killed(Callback):
        order = 99

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 8:
                raise KeyboardInterrupt

    run, other = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    with pytest.raises(KeyboardInterrupt):
        train(with_callbacks(Buffers, Killed()), run, use_wandb=True, log_interval=1)
    before = plain(server.history)
    assert [row["step"] for row in before] == [1, 2, 3, 4, 5, 6, 7]
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    again = plain(server.history)[len(before):]
    assert [row["step"] for row in again] == [7, 8, 9], "from the snapshot of step 6 on"
    assert again[0]["train/loss"] == before[-1]["train/loss"] and again == sent(run)[6:]
    assert len(set(server.runs)) == 1
    train(Buffers, other, use_wandb=True)
    assert len(set(server.runs)) == 2


def test_texts_pictures_sounds_and_histograms_arrive(tmp_path: Path, server: Server) -> None:
    train(Showing, new_run(tmp_path, Showing), use_wandb=True)
    kinds = {name: value["_type"] for row in server.history for name, value in row.items() if isinstance(value, dict)}
    assert kinds == {"text/0": "html-file", "picture": "image-file", "sound": "audio-file"} | {
        f"{kind}/{part}/histogram": "histogram" for kind in ("gradients", "weights") for part in "013"}


# -- where it cannot be sent --------------------------------------------------------------------------------------


def test_offline_it_is_kept_and_the_command_in_the_log_sends_it(tmp_path: Path, offline: None, server: Server,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(5)), run, use_wandb=True)
    time.sleep(1.1)  # folders are named by the second
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    assert server.history == [] and "kept on disk (WANDB_MODE is offline)" in caplog.text
    assert len(list((run.path / "wandb").glob("offline-run-*"))) == 2
    told = next(line for line in caplog.messages if "send it with: " in line).partition("send it with: ")[2]
    subprocess.run(told + " --yes", shell=True, check=True, capture_output=True, timeout=120, cwd=tmp_path)
    assert plain(server.history) == sent(run) and len(set(server.runs)) == 1


def why_kept(caplog: pytest.LogCaptureFixture) -> str:
    (told,) = [line for line in caplog.messages if "Weights & Biases: kept on disk" in line]
    return told


def test_without_a_key_or_a_server_it_is_kept_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = train(Buffers, new_run(tmp_path, Buffers), use_wandb=True)
    assert "there is no API key (WANDB_API_KEY, or wandb login)" in why_kept(caplog) and not trainer.switched_off
    caplog.clear()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    train(Buffers, new_run(tmp_path, Buffers), use_wandb=True)
    assert "40" in why_kept(caplog)
    caplog.clear()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    train(Buffers, new_run(tmp_path, Buffers), use_wandb=True)
    assert "http://127.0.0.1:9 cannot be reached: Connection refused" in why_kept(caplog)


def test_a_server_that_does_not_answer_holds_up_neither_the_start_nor_the_end(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(monitor, "START_SECONDS", 2)
    monkeypatch.setattr(monitor, "END_SECONDS", 2)
    server.silent = "graphql"
    _, ending = train(Buffers, new_run(tmp_path, Buffers), use_wandb=True)
    assert ending.state == "finished" and why_kept(caplog)
    caplog.clear()
    server.silent = "file_stream"
    _, ending = train(Buffers, new_run(tmp_path, Buffers), use_wandb=True)
    assert ending.state == "finished" and "not everything was sent (Timed out" in caplog.text


STRIKE = """
import sys
from dataclasses import dataclass
from pathlib import Path
import psutil
import torch
from stoker.monitors import wandb
from toys import Buffers, new_run, train, with_callbacks
from stoker.training.core.callback import ACT, Callback

@dataclass
class Strikes(Callback):
    order = ACT

    def on_step_start(self, trainer):
        if trainer.step == 6:
            (service,) = [child for child in psutil.Process().children() if child.name() == wandb.SERVICE]
            service.send_signal(int(sys.argv[2]))

wandb.END_SECONDS = -3  # then 2 s are waited for it
trainer, ending = train(with_callbacks(Buffers, Strikes()), new_run(Path(sys.argv[1]), Buffers), use_wandb=True)
torch.save(trainer.model.state_dict(), Path(sys.argv[1]) / "struck.pt")
print(ending.state)
"""


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_service_that_hangs_or_dies_is_no_matter(tmp_path: Path, offline: None, number: int) -> None:
    """In a process of its own, which has to come to its end, too."""
    folders = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", STRIKE, str(tmp_path), str(int(number))], env=os.environ | folders,
                         capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout == "finished\n", ran.stderr
    good, _ = train(Buffers, new_run(tmp_path / "good", Buffers))
    assert_same(torch.load(tmp_path / "struck.pt", weights_only=True), dict(good.model.state_dict()))


# -- what it leaves alone -----------------------------------------------------------------------------------------


def test_weights_and_signals_are_as_without(tmp_path: Path, offline: None) -> None:
    handlers: list[Callable[[], Any]] = []

    @dataclass
    class Looks(Callback):
        order = ACT

        def on_step_start(self, trainer: Trainer) -> None:
            handlers.append({number: signal.getsignal(number) for number in signal.valid_signals()})

    run = new_run(tmp_path, Buffers)
    watched, _ = train(with_callbacks(Buffers, Looks()), run, use_wandb=True)
    bare, _ = train(with_callbacks(Buffers, Looks()), new_run(tmp_path, Buffers))
    assert_same(watched.model.state_dict(), bare.model.state_dict())
    assert all(seen == handlers[-1] for seen in handlers)
    assert {path.name for path in run.path.iterdir()} - {path.name for path in bare.stage.folder.iterdir()} == {"wandb"}


# -- where it is not installed ------------------------------------------------------------------------------------


def test_without_the_package_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("some words to read\n\nand more\n")
    find_spec = launch.importlib.util.find_spec
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    argv = ["--dataset", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--result_dir", str(tmp_path / "results")]
    with pytest.raises(UserError, match=r"--use_wandb: the package wandb is not installed.* -m pip install .*wandb\]"):
        launch.decide(discover()["lm"], [*argv, "--use_wandb"])
    launch.decide(discover()["lm"], argv)
    assert not (tmp_path / "results").exists()
