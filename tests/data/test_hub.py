"""WikiText from a copy in the hub's own form: its articles, what leaks, what is kept, what goes wrong."""

import logging
import os
import shutil
import sys
from pathlib import Path

import pyarrow
import pytest

from fake_hub import SIZES, make_copy, rows
from stoker.config import UserError
from stoker.data.sources import hub
from stoker.data.text import corpus as text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in hub.OFFLINE:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing here asks the network
    return tmp_path / "cache"


def copied(folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: list[str]) -> None:
    """From here on the repository is this folder."""
    monkeypatch.setattr(hub, "REPOSITORY", str(make_copy(folder / "wikitext", **changed)))


@pytest.mark.parametrize("name", hub.CONFIGS)
def test_documents_are_articles_of_the_published_splits(name: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    copied(tmp_path, monkeypatch)
    corpus = text.documents(name)
    for split, documents in (("train", corpus.train), ("validation", corpus.valid), ("test", corpus.test)):
        assert len(documents) == SIZES[split]
        titles = [next(line for line in document.split("\n") if line) for document in documents]
        assert titles == [f" = {split.title()} {number} = " for number in range(SIZES[split])]
        whole = "".join(row or "\n" for row in rows(split, SIZES[split]))
        assert "".join(documents) == whole.lstrip("\n"), "nothing is lost, sections stay in their articles"
    assert corpus.leaked() == 0


def test_what_begins_an_article() -> None:
    def titles(*lines: str) -> list[str]:
        return [document.split("\n")[0] for document in hub.divided(lines)]

    assert titles("", " = A = \n", "", " = = B = = \n", " x = y \n", " = = = C = = = \n", " = D = E = \n") == [
        " = A = ", " = D = E = "]
    assert titles(" = no blank after the last sign =\n") == [" = no blank after the last sign ="]
    assert hub.divided(["", "", " text before any title \n", " = A = \n"]) == [
        "\n\n text before any title \n", " = A = \n"]
    assert hub.divided(["", ""]) == []


REAL = Path(__file__).parents[3] / "shared" / "data" / "text" / "wikitext-2" / "wiki.valid.tokens"


@pytest.mark.skipif(not REAL.exists(), reason="WikiText is not at hand")
def test_the_real_validation_text_has_sixty_articles() -> None:
    """As its authors say: Merity et al. 2016, table 1."""
    assert len(hub.divided(line for line in REAL.read_text().split("\n"))) == 60


def test_a_document_of_two_splits_stays_where_it_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    shared = [f" = Shared {number} = \n" for number in range(3)]
    copied(tmp_path, monkeypatch, train=[*rows("train", 30), *shared, ""], test=[*rows("test", 5), *shared[:2]],
           validation=[*rows("validation", 4), "", *shared[1:]])
    corpus = text.documents("wikitext")
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (30, 5, 7) and corpus.leaked() == 0
    assert shared[2] in corpus.valid and set(shared[:2]) <= set(corpus.test)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line[:25] for line in warnings] == ["Left out of validation: 1", "Left out of training: 3 d"]


def test_the_fingerprint_knows_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = ([f"{name} {number}" for number in range(3)] for name in "abc")
    prints = [text.published(*each).fingerprint for each in ((a, b, c), (a, c, b), (a + b[:1], b[1:], c), (a, b, c))]
    assert len(set(prints)) == 3 and prints[0] == prints[3]


# -- the cache


@pytest.fixture
def cached(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as the library keeps what it had from the hub."""
    with monkeypatch.context() as patch:
        copied(tmp_path, patch)
        hub.articles("wikitext-103")
    os.rename(cache / "wikitext", cache / "Salesforce___wikitext")
    [folder] = (cache / "Salesforce___wikitext").glob("*/*/*/")
    return folder


def test_what_is_cached_needs_no_hub(cached: Path) -> None:
    assert hub.missing("wikitext-103") == ""
    assert [len(documents) for documents in hub.articles("wikitext-103").values()] == [30, 4, 5]


def test_the_library_calls_it_cached_too(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where we look is where it looks."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    found = datasets.load_dataset(hub.REPOSITORY, hub.CONFIGS["wikitext-103"], cache_dir=str(cached.parents[3]))
    assert {Path(each["filename"]).parent for each in found["train"].cache_files} == {cached}


def test_a_copy_that_was_not_finished_is_none(cached: Path) -> None:
    os.rename(cached, cached.with_name(cached.name + ".incomplete"))
    assert "cannot be reached" in hub.missing("wikitext-103")


def test_shards_are_read_in_their_order(cached: Path) -> None:
    expected = hub.articles("wikitext-103")
    [whole] = cached.glob("*train*.arrow")
    table = pyarrow.ipc.open_stream(whole).read_all()
    for number in range(12):
        with pyarrow.ipc.new_stream(cached / f"wikitext-train-{number:05d}-of-00012.arrow", table.schema) as stream:
            stream.write_table(table.slice(30 * number, 30 if number < 11 else None))
    whole.unlink()
    assert hub.articles("wikitext-103") == expected


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_copy_is_reported(cached: Path, damage: str) -> None:
    [path] = cached.glob("*test.arrow")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    with pytest.raises(UserError) as caught:
        hub.articles("wikitext-103")
    [line] = caught.value.problems
    assert line.startswith(f"--dataset wikitext-103: its copy in {cached} cannot be read (") and "delete that" in line


# -- without the hub


def test_missing_says_why(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for name in hub.CONFIGS:
        assert hub.missing(name) == (
            "the Hugging Face hub (http://127.0.0.1:9) cannot be reached (Connection refused)")
    assert hub.missing("pydocs") == hub.missing("some/file.txt") == ""
    for variable in hub.OFFLINE:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            assert hub.missing("wikitext") == f"{variable} is set, and {cache} has no copy"
        monkeypatch.setenv(variable, "0")


@pytest.mark.parametrize("environment, folder", [
    ({}, "~/.cache/huggingface/datasets"), ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/datasets"),
    ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/y"}, "/y/datasets"), ({"HF_HOME": "/y", "HF_DATASETS_CACHE": "/z"}, "/z"),
])
def test_the_cache_is_where_the_library_has_it(environment: dict[str, str], folder: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert hub._cache() == Path(folder).expanduser()


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "wikitext" / "wikitext-103-raw-v1")
    with pytest.raises(UserError) as caught:
        text.documents("wikitext-103")
    [line] = caught.value.problems
    assert line.startswith("--dataset wikitext-103: the download from http://127.0.0.1:9 failed (")
    assert line.endswith("; try again, or take --dataset pydocs, or a text file")


def test_a_log_gets_lines_and_no_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("stoker.progress.SECONDS_BETWEEN_LINES", 0.001)
    copied(tmp_path, monkeypatch)
    assert not sys.stderr.isatty()
    with caplog.at_level(logging.INFO):
        hub.articles("wikitext")
    assert capfd.readouterr().err == ""
    assert "Downloading wikitext from http://127.0.0.1:9 (once, kept in " in caplog.text
    assert "Downloading wikitext: 0 MB so far" in caplog.text
