"""What the language model's data options do, and what it falls back to where there is no network."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_hub import make_copy
from stoker import files
from stoker.config import UserError
from stoker.data import cache
from stoker.data.sources import hub
from stoker.data.text import corpus, vocabularies
from stoker.data.text.tokenizers import open_tokenizer
from stoker.training.assembly import launch
from stoker.training.train_lm import DATASETS, LanguageModel
from toys import new_run, train

SMALL: dict[str, Any] = dict(d_model=16, num_heads=2, num_layers=1, d_ff=32, max_seq_len=16, tokenizer="bytes")


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*hub.OFFLINE, "http_proxy", "HTTP_PROXY", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(vocabularies, "HOST", "http://127.0.0.1:9")


@pytest.fixture
def book(tmp_path: Path) -> str:
    """A text with more than a few thousand different words."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijkl"), 5)) for _ in range(2000)]
    (tmp_path / "book.txt").write_text("\n\n".join(" ".join(draw.choice(words, 40)) for _ in range(200)))
    return str(tmp_path / "book.txt")


def prepared(folder: Path, **options: Any) -> LanguageModel:
    folder.mkdir(exist_ok=True)
    stage = LanguageModel(replace(LanguageModel.Config(), **SMALL | options), folder)
    stage.prepare()
    return stage


# -- options


def test_vocab_size_is_the_size_of_tokenizer_and_model(book: str, tmp_path: Path) -> None:
    for size in (300, 700):
        stage = prepared(tmp_path / str(size), dataset=book, tokenizer="bpe", vocab_size=size)
        assert stage.tokenizer.vocab_size == size
        rows = {parameter.shape[0] for parameter in stage.model().parameters() if parameter.dim() == 2}
        assert size in rows, "not padded"


def test_retrain_tokenizer_trains_it_again(book: str, tmp_path: Path) -> None:
    known = prepared(tmp_path / "first", dataset=book, tokenizer="bpe", vocab_size=400).tokenizer
    [cached] = (files.home() / "tokenizers").glob("*.json")
    other = open_tokenizer("bpe", 300, ["another text, of which nobody trains on"])
    cache.write(cached, other.to_json())
    kept = prepared(tmp_path / "second", dataset=book, tokenizer="bpe", vocab_size=400)
    assert kept.tokenizer.fingerprint == other.fingerprint != known.fingerprint
    again = prepared(tmp_path / "third", dataset=book, tokenizer="bpe", vocab_size=400, retrain_tokenizer=True)
    assert again.tokenizer.fingerprint == known.fingerprint


def test_the_first_samples_are_those_of_max_samples(book: str, tmp_path: Path) -> None:
    few, all_of_them = (prepared(tmp_path / str(n), dataset=book, max_samples=n).dataset("train") for n in (5, 0))
    assert len(few) == 5 < len(all_of_them)  # type: ignore[arg-type]
    assert [row.tolist() for row in few] == [all_of_them[i].tolist() for i in range(5)]  # type: ignore[attr-defined]


def test_the_data_are_checked_in_a_line(book: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        stage = prepared(tmp_path / "run", dataset=book)
    train, valid = (stage.tokens[split] for split in ("train", "validation"))
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Data check")]
    assert line == (f"Data check: {(len(train) - 1) // 16:,} rows ({len(train):,} tokens) to train on, "
                    f"{(len(valid) - 1) // 16:,} rows ({len(valid):,} tokens) to validate; "
                    "none of the documents of validation and test (1) occurs in training")


def test_leaked_documents_are_counted() -> None:
    assert corpus.Corpus(["a\n", "b", "c"], ["x", " a"], "", ["c", "y"]).leaked() == 2


# -- WikiText


def test_the_test_split_is_encoded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "REPOSITORY", str(make_copy(tmp_path / "wikitext")))
    stage = prepared(tmp_path / "run", dataset="wikitext")
    assert stage.splits() == ("train", "validation", "test") and set(stage.tokens) == {"train", "validation"}
    first = stage.dataset("test")[0]
    assert stage.tokenizer.decode(first.tolist()).startswith(" = Test 0 = \n\n")
    assert len(stage.tokens["test"]) == sum(len(document.encode()) + 1 for document in stage.test_text)


def test_other_data_have_no_test_split(book: str, tmp_path: Path) -> None:
    assert prepared(tmp_path / "run", dataset=book).splits() == ("train", "validation")


def test_the_data_sets_named_are_those_there_are() -> None:
    assert set(DATASETS) == set(corpus.NAMES)


# -- without network


def test_what_nobody_named_is_replaced_aloud(tmp_path: Path) -> None:
    job = launch.decide(LanguageModel, ["--result_dir", str(tmp_path)])
    assert (job.cfg.dataset, job.cfg.tokenizer, job.cfg.vocab_size) == ("pydocs", "bpe", 32000)
    assert job.notes == (
        "NO WIKITEXT: the Hugging Face hub (http://127.0.0.1:9) cannot be reached (Connection refused). "
        "No --dataset was given, so this run trains on pydocs, with --tokenizer bpe",)


def test_a_tokenizer_that_was_named_is_kept(tmp_path: Path) -> None:
    job = launch.decide(LanguageModel, ["--result_dir", str(tmp_path), "--tokenizer", "bytes"])
    assert (job.cfg.dataset, job.cfg.tokenizer) == ("pydocs", "bytes")
    assert job.notes[0].endswith("so this run trains on pydocs")


def test_what_was_settled_stays_when_the_run_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed before it began has what counts as typed to go by; the hub may be there by then."""
    job = launch.decide(LanguageModel, ["--result_dir", str(tmp_path), "--run_name", "mine"])
    launch._new_run(job)
    monkeypatch.setattr(hub, "missing", lambda name: "")
    again = launch.decide(LanguageModel, ["--result_dir", str(tmp_path), "--run_name", "mine"])
    assert again.run and (again.cfg.dataset, again.cfg.tokenizer) == ("pydocs", "bpe")


@pytest.mark.parametrize("argv, problems", [
    (["--dataset", "wikitext", "--tokenizer", "bpe"], ["--dataset wikitext: the Hugging Face hub"]),
    (["--dataset", "wikitext-103"], ["--dataset wikitext-103: the Hugging", "--tokenizer gpt2: its files are not in"]),
    (["--dataset", "BOOK"], ["--tokenizer gpt2: its files are not in"]),
    (["--tokenizer", "gpt4o"], ["--tokenizer gpt4o: its files are not in"]),
])
def test_what_was_named_is_never_replaced(argv: list[str], problems: list[str], book: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        launch.decide(LanguageModel, [*(book if word == "BOOK" else word for word in argv), "--result_dir",
                                      str(tmp_path / "runs")])
    assert len(caught.value.problems) == len(problems)
    assert all(found.startswith(wanted) for found, wanted in zip(caught.value.problems, problems))
    assert all("--dataset pydocs" in found or "--tokenizer bpe" in found for found in caught.value.problems)


def test_a_run_goes_on_with_its_own_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hub, "missing", lambda name: "")
        launch._new_run(launch.decide(LanguageModel, ["--result_dir", str(tmp_path), "--run_name", "mine",
                                                      "--tokenizer", "bpe"]))
    with pytest.raises(UserError, match="--dataset wikitext-103: .* cannot be reached .*; connect, to go on with it"):
        launch.decide(LanguageModel, ["--result_dir", str(tmp_path), "--run_name", "mine"])


def test_weights_bring_their_tokenizer_so_none_is_missed(book: str, tmp_path: Path) -> None:
    options = SMALL | dict(dataset=book, max_steps=1, threads=1)
    run = new_run(tmp_path, LanguageModel)
    train(LanguageModel, run, **options)
    for argv in (["--init_from", str(run.path)], ["--init_from", str(run.path), "--eval_only"]):
        job = launch.decide(LanguageModel, [*argv, "--dataset", book, "--result_dir", str(tmp_path / "runs")])
        assert (job.cfg.tokenizer, job.cfg.d_model) == ("bytes", 16)


@pytest.mark.parametrize("argv, tokenizer", [(["--vocab_size", "500"], "bpe"), (["--retrain_tokenizer"], "bpe"),
                                             (["--preset", "nano", "--vocab_size", "500"], "bpe"),
                                             (["--tokenizer", "bytes"], "bytes")])
def test_pieces_of_its_own_mean_a_tokenizer_of_its_own(tmp_path: Path, argv: list[str], tokenizer: str) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {i}" for i in range(50)))
    job = launch.decide(LanguageModel, ["--dataset", str(tmp_path / "text.txt"), *argv])
    assert job.cfg.tokenizer == tokenizer
    with pytest.raises(UserError, match="--vocab_size is for --tokenizer bpe, bytes has its own vocabulary"):
        launch.decide(LanguageModel, ["--dataset", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--vocab_size",
                                      "500"])
