"""A language model goes on only with the text and the tokenizer it began with, and a refusal changes nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stoker import files
from stoker.config import UserError
from stoker.daemon.rundir import RunDir
from stoker.data import cache
from stoker.data.text.tokenizers import open_tokenizer
from stoker.training.core.callback import Callback
from stoker.training.train_lm import LanguageModel
from toys import StopAt, new_run, session, train

SMALL: dict[str, Any] = dict(d_model=16, num_heads=2, num_layers=1, d_ff=32, max_seq_len=16, dropout=0.0, max_steps=9,
                             tokenizer="bpe", vocab_size=280, compile=False, samples=False)


class Stopped(LanguageModel):
    def callbacks(self) -> list[Callback]:
        return [StopAt(4)]


class Ended(LanguageModel):
    def callbacks(self) -> list[Callback]:
        return [StopAt(-1)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {i}th line of the text, which is number {i}\n" for i in range(400)))
    return path


@pytest.fixture
def stopped(tmp_path: Path, text: Path) -> RunDir:
    run = new_run(tmp_path, LanguageModel)
    train(Stopped, run, dataset=str(text), **SMALL)
    return run


def everything(run: RunDir) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*")
            if path.is_file() and path not in (run.lock_file, run.status_file)}


def refused(run: RunDir, why: str) -> None:
    """In one line, before there is a model; all is as it was, but the status, which `launch` puts back."""
    before = everything(run)
    with run.lock(), pytest.raises(UserError, match=why) as refusal:
        session(Ended, run, resume=True).prepare()
    assert len(refusal.value.problems) == 1 and everything(run) == before


def test_a_text_edited_in_place_is_refused(stopped: RunDir, text: Path) -> None:
    """One letter of it, size and time as before; as it was, the run goes on."""
    time, content = text.stat().st_mtime_ns, text.read_text()
    text.write_text(content.replace("the 200th", "thy 200th"))
    os.utime(text, ns=(time, time))
    refused(stopped, r"the data are not those of the interrupted run \(text [0-9a-f]{8} -> [0-9a-f]{8}\)")
    text.write_text(content)
    assert train(Ended, stopped, resume=True)[1].state == "finished"


def test_a_text_that_moved_is_the_same_text(stopped: RunDir, text: Path, tmp_path: Path) -> None:
    text.rename(tmp_path / "moved.txt")
    assert train(Ended, stopped, resume=True, dataset=str(tmp_path / "moved.txt"))[1].state == "finished"


@pytest.mark.parametrize("also_text", [False, True])
def test_a_tokenizer_that_is_gone_is_made_again_of_the_same_text_only(stopped: RunDir, text: Path,
                                                                      also_text: bool) -> None:
    """One made of another text must not be left in the run: it would be taken for its own ever after."""
    own, content = stopped.path / "tokenizer.json", text.read_text()
    was = own.read_text()
    own.unlink()
    if also_text:
        text.write_text(content.replace("line", "verse"))
        refused(stopped, r"text \w{8} -> \w{8}, tokenizer \w{8} -> \w{8}\)")
        text.write_text(content)
    assert train(Ended, stopped, resume=True)[1].state == "finished" and own.read_text() == was


def test_another_tokenizer_is_refused(stopped: RunDir, text: Path) -> None:
    """Put into the run's folder, or into the cache that stands in for it."""
    own = stopped.path / "tokenizer.json"
    was = own.read_text()
    own.write_text(open_tokenizer("bpe", 280, ["quite another text, " * 50]).to_json())
    refused(stopped, r"the interrupted run .*tokenizer \w{8} -> \w{8}\)")
    own.write_text(was[:-5])
    refused(stopped, "tokenizer.json: is not JSON")
    own.unlink()
    for cached in (files.home() / "tokenizers").glob("*.json"):
        state = json.loads(cache.read(cached) or "")
        state["model"]["merges"].reverse()
        cache.write(cached, json.dumps(state))
    refused(stopped, r"the interrupted run .*tokenizer \w{8} -> \w{8}\)")
    own.write_text(was)
    assert train(Ended, stopped, resume=True)[1].state == "finished"


@pytest.mark.parametrize("options", [{"d_model": 32}, {"num_layers": 2}, {"num_heads": 4}, {"max_seq_len": 8}])
def test_another_shape_is_refused(stopped: RunDir, options: dict[str, int]) -> None:
    """Also the number of heads, which no tensor's shape tells."""
    config = json.loads(stopped.config_file.read_text())
    stopped.config_file.write_text(json.dumps(config | options))
    [(name, value)] = options.items()
    refused(stopped, rf"made with \({name} {config[name]} -> {value}\)")
