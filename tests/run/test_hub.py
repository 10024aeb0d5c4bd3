"""The hub, seen by the real scripts: fetched from once, never asked again, missed in seconds, replaced aloud."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from desk import TINY, Desk, until
from fake_hub import make_copy, serving
from stoker.data import cache
from stoker.data.sources import hub
from stoker.data.text import pydocs

SHORT = [*TINY, "--max_steps", "10"]


@pytest.fixture(autouse=True)
def _alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no caches but the desk's own."""
    for variable in (*hub.OFFLINE, "HF_DATASETS_CACHE", "HF_HUB_CACHE", "DATA_GYM_CACHE_DIR", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(desk.folder / "huggingface"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(desk.folder / "tiktoken"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # as a dead proxy is met: tiktoken's server is not asked


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_copy(tmp_path_factory.mktemp("hub"))


def log_of(desk: Desk, name: str) -> str:
    return (desk.results / name / "logs" / "latest.log").read_text()


def ended(desk: Desk, name: str) -> None:
    until(lambda: desk.run(name)["state"] == "finished" and desk.run(name)["pid"] is None)


def nothing_is_left(desk: Desk) -> bool:
    listed = desk.folder / "home" / "runs"
    return not ((desk.results.exists() and os.listdir(desk.results)) or (listed.exists() and os.listdir(listed))
                or list(desk.folder.glob("stoker.*")))


def test_what_was_named_and_is_not_to_be_had_is_refused(desk: Desk) -> None:
    ran = desk.call("run_train_lm.sh", "--dataset", "wikitext", "--result_dir", str(desk.results), *SHORT)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", (
        "run_train_lm.sh: --dataset wikitext: the Hugging Face hub (http://127.0.0.1:9) cannot be reached "
        "(Connection refused); connect, or take --dataset pydocs, or a text file\n"))
    assert nothing_is_left(desk)


def test_so_is_a_tokenizer(desk: Desk) -> None:
    ran = desk.call("run_train_lm.sh", "--dataset", str(desk.corpus), "--result_dir", str(desk.results))
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr
    assert "--tokenizer gpt2: its files are not in" in ran.stderr and "--tokenizer bpe" in ran.stderr
    assert "TIKTOKEN_CACHE_DIR" in ran.stderr and nothing_is_left(desk)


def test_a_download_that_fails_leaves_nothing(desk: Desk, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(copy, fails=True) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        ran = desk.call("run_train_lm.sh", "--dataset", "wikitext", "--result_dir", str(desk.results), *SHORT)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr
    assert f"--dataset wikitext: the download from {address} failed (" in ran.stderr and nothing_is_left(desk)


@pytest.fixture(scope="module")
def documentation(desk: Desk) -> Iterator[None]:
    """The embedded corpus is there already, and short."""
    path = desk.folder / "home" / "pydocs" / f"{pydocs._key()}.txt"
    path.parent.mkdir(parents=True)
    cache.write(path, desk.corpus.read_text().replace("\n\n", f"\n{pydocs.SEPARATOR}"))
    yield
    path.unlink()


def test_what_nobody_named_is_replaced_aloud(desk: Desk, documentation: None) -> None:
    options = [word for word in SHORT if word not in ("--tokenizer", "bytes")]
    ran = desk.start_here("--result_dir", str(desk.results), "--vocab_size", "300", "--run_name", "alone", *options)
    lines = [line for line in log_of(desk, "alone").splitlines() if "NO WIKITEXT" in line]
    assert len(lines) == 1 and "pydocs, with --tokenizer bpe" in lines[0] and lines[0] in ran.stderr
    assert "Gathering the documentation" not in ran.stderr, "which takes half a minute"
    assert ran.returncode == 0, ran.stderr
    used = json.loads((desk.results / "alone" / "run_config.json").read_text())
    assert (used["dataset"], used["tokenizer"]) == ("pydocs", "bpe")


def test_wikitext_is_fetched_once(desk: Desk, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(copy) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        desk.begun(desk.call("run_train_lm.sh", "--result_dir", str(desk.results), "--run_name", "first", *SHORT))
        ended(desk, "first")
    log = log_of(desk, "first")
    assert f"Downloading wikitext-103 from {address} (once" in log and "\r" not in log
    assert "Read the training split" in log and all(line.startswith("[20") for line in log.splitlines())
    assert "HTTP" not in log
    assert "none of the documents of validation and test (9) occurs in training" in log
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    second = desk.start_here("--dataset", "wikitext-103", "--result_dir", str(desk.results), "--run_name", "second",
                              *SHORT)
    assert second.returncode == 0, second.stderr
    assert "Downloading" not in log_of(desk, "second")
    rows = [(desk.results / name / "metrics.jsonl").read_text() for name in ("first", "second")]
    assert rows[0] == rows[1], "the same data"
