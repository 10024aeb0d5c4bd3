"""Model folders of the hub: from its cache, from a hub on this machine, and where they cannot be had."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fake_hub import COMMIT, MODEL, cached_model, serving_model
from stoker.config import UserError
from stoker.data.sources import hub, model_hub
from stoker.data.sources.model_hub import Repository


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in (*hub.OFFLINE, "no_proxy", "NO_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "uploaded"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("what, repository", [
    ("hf://a/b", Repository("a/b")), ("hf://a-1/b.c@refs/pr/1", Repository("a-1/b.c", "refs/pr/1")),
    ("a/b@v1.0", Repository("a/b", "v1.0")), ("a/b", None), ("a/b/c@d", None), ("result/lm", None), ("newest", None),
    ("/a/b@c", None), ("../b@c", None), ("a/..@b", None), ("", None)])
def test_which_names_mean_a_repository(what: str, repository: Repository | None) -> None:
    assert model_hub.parse(what) == repository


def test_a_folder_here_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lm@3").mkdir(parents=True)
    assert model_hub.parse("runs/lm@3") is None and model_hub.parse("runs/lm@4")


@pytest.mark.parametrize("what", ["hf://a", "hf://a/b@", "hf://a/b@../c", "hf://a/b@c/../../d", "hf://../a@b", "hf://"])
def test_a_name_of_a_wrong_form_is_refused(what: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(what)}: a repository of .* is written hf://ORG/NAME or"):
        model_hub.parse(what)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_the_cache_is_enough(cache: Path, weights: Path, revision: str) -> None:
    expected = cached_model(cache, weights)
    repository = Repository(MODEL, revision)
    assert model_hub.problem(repository) == ""
    assert model_hub.folder(repository, download=False) == (expected, Repository(MODEL, COMMIT))


def test_the_library_finds_the_same_folder(cache: Path, weights: Path) -> None:
    from huggingface_hub import snapshot_download

    expected = cached_model(cache, weights)
    assert snapshot_download(MODEL, cache_dir=cache, local_files_only=True) == str(expected)


def test_a_download_that_was_cut_off_is_not_the_folder(cache: Path, weights: Path) -> None:
    (weights / "model.safetensors").rename(weights / "model-1.safetensors")
    (weights / model_hub.INDEX).write_text(json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    found = cached_model(cache, weights)
    with pytest.raises(UserError, match="is not in .*cache yet: the start of a run downloads it"):
        model_hub.folder(Repository(MODEL), download=False)
    (found / "model-2.safetensors").write_bytes(b"more")
    assert model_hub.folder(Repository(MODEL), download=False)[0] == found
    (found / model_hub.INDEX).unlink()
    (found / model_hub.INDEX).write_text("[]")
    assert model_hub._cached(Repository(MODEL)) is None


def test_a_download(tmp_path: Path, cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, without programs, and without other formats of the same weights."""
    (weights / "onnx").mkdir()
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"):
        (weights / name).write_bytes(b"other")
    with serving_model(weights) as (address, requests):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found, repository = model_hub.folder(Repository(MODEL), download=True)
        assert repository == Repository(MODEL, COMMIT) and str(repository) == f"hf://{MODEL}@{COMMIT}"
        assert sorted(path.name for path in found.rglob("*")) == ["config.json", "model.safetensors"]
        assert (found / "model.safetensors").read_bytes() == b"weights"
        asked = len(requests)
        assert asked and model_hub.folder(Repository(MODEL), download=True)[0] == found
        assert model_hub.problem(Repository(MODEL)) == "" and len(requests) == asked
        shutil.rmtree(cache)
        assert model_hub.folder(Repository(MODEL, COMMIT), download=True)[0] == found


@pytest.mark.parametrize("repository, why", [
    (Repository("someone/else"), r"hf://someone/else@main: http://127.* has no such repository, or it is private"),
    (Repository(MODEL, "v2"), f"hf://{MODEL}@v2: the repository has no revision 'v2': name a branch, a tag or")])
def test_what_the_hub_does_not_have(weights: Path, monkeypatch: pytest.MonkeyPatch, repository: Repository,
                                    why: str) -> None:
    with serving_model(weights) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match=why) as refusal:
            model_hub.folder(repository, download=True)
    assert len(refusal.value.problems) == 1 and "\n" not in str(refusal.value)


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for why in (r"the Hugging Face hub \(http://127.0.0.1:9\) cannot be reached \(Connection refused\)",
                "HF_HUB_OFFLINE is set"):
        with pytest.raises(UserError, match=f"^hf://{MODEL}@main: {why}, and .*cache has no copy: connect"):
            model_hub.folder(Repository(MODEL), download=True)
        assert re.search(why, model_hub.problem(Repository(MODEL)))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_name_is_checked_with_the_standard_library_alone() -> None:
    code = ("import sys; from stoker.data.sources import model_hub; print(model_hub.problem(model_hub.parse('hf://a/b')))"
            "; assert not {'torch', 'huggingface_hub', 'datasets'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parents[2] / "run" / "python")
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stdout
