"""tiktoken's vocabularies as tokenizer.json: the same ids, to the last. And where their files are looked for."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken.load
import tokenizers as library
from tiktoken_ext import openai_public

from stoker import files
from stoker.data.text import vocabularies
from stoker.data.text.tokenizers import Tokenizer, _trained, open_tokenizer

DOWNLOADED = Path(__file__).parents[3] / "shared" / "data" / "tiktoken_cache"
TEXTS = [
    "", " ", "   ", "\n", " \n \n\n", "a  b   c\t\td \r\n\r\n  e\n", "trailing blanks   ", "\n\n\nx",
    "x\u00a0y\u3000z",
    "We've been, they'LL go, I'M here, it'S 12345678 o'clock; don't 'round ' s 'ſ",
    "def f(x: int) -> dict:\n\treturn {'a': [x ** 2, -1.5e-3]}  # why\n\n\nclass A(B):\n    pass\n",
    "https://example.org/a/b?c=d&e=%20 //// ==== ---- !!!!! ...../\n/\r/",
    "CamelCaseWords, ALLCAPS and miXeD mcDonald's",
    "naïve café ÀÉÎ straße İstanbul ǅ ǈ ʰ ª",
    "日本語の文章と中文和한국어 हिन्दी العربية עברית",
    "e\u0301 \u0301x a\u0300\u0301b",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 ✌️ x👍y", "½ ² Ⅷ ٣٤٥ 一二三 1,234.56 10¹⁰",
    "\ufeffx \u200b \u2028 \x00 \x1b[0m", "a<|endofprompt|>",
]


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made once, is made once for these tests too."""
    monkeypatch.setenv("STOKER_HOME", str(shared_home))


def some_of_unicode() -> Iterator[str]:
    """A stretch of text for one in 101 of all characters, in each place that the patterns tell apart."""
    for number in range(0, 0x110000, 101):
        if not 0xd800 <= number < 0xe000:
            yield "{0} a{0}b A{0}B 1{0}2 '{0} -{0}- {0}'s\n{0}\n".format(chr(number))


def code_and_prose(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(TEXTS) + draw.choice(["", " ", "  ", "\n", "\n\n", "\t"]) for _ in range(200))


def differing(texts: list[str], encoding: tiktoken.Encoding, saved: library.Tokenizer) -> list[str]:
    expected = encoding.encode_ordinary_batch(texts)
    found = saved.encode_batch_fast(texts, add_special_tokens=False)
    return [text for text, ids, each in zip(texts, expected, found) if ids != each.ids]


def kind_with_small_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """As tiktoken declares it, its pattern too, but with pieces that were trained here: its files are not needed."""
    own = library.Tokenizer.from_str(_trained(3000, [code_and_prose(seed) for seed in range(20)], False))
    byte = {letter: number for number, letter in vocabularies.byte_letters().items()}
    ranks = {bytes(byte[letter] for letter in token): number - 1 for token, number in own.get_vocab().items() if number}
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *args, **kwargs: ranks)
    declared: dict[str, Any] = getattr(openai_public, name)()
    declared.pop("explicit_n_vocab", None)
    return tiktoken.Encoding(**declared)


@pytest.mark.parametrize("name", vocabularies.NAMES.values())
def test_a_vocabulary_of_each_kind_gives_its_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = kind_with_small_vocabulary(name, monkeypatch)
    saved = library.Tokenizer.from_str(vocabularies.tokenizer_json(encoding))
    texts = [*TEXTS, *some_of_unicode(), *map(code_and_prose, range(100, 110))]
    assert differing(texts, encoding, saved) == []
    assert saved.token_to_id("<|endoftext|>") == encoding.eot_token
    assert max(saved.get_vocab().values()) + 1 == encoding.n_vocab
    assert saved.decode(encoding.encode_ordinary(code_and_prose(0))) == code_and_prose(0)


def test_merges_are_those_that_the_ranks_came_from() -> None:
    words = "".join(random.Random(0).choices("etaoin shrdlu", k=50_000))
    state = json.loads(_trained(2000, [words], False))["model"]
    byte = {letter: number for number, letter in vocabularies.byte_letters().items()}
    ranks = {bytes(byte[letter] for letter in token): rank for token, rank in state["vocab"].items()
             if token != "<|endoftext|>"}
    found = [tuple(ranks[part] for part in pair) for pair in vocabularies._merges(ranks)]
    assert found == [tuple(state["vocab"][part] for part in pair) for pair in state["merges"]] and len(found) > 1000


def test_it_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = kind_with_small_vocabulary("gpt2", monkeypatch)
    first = vocabularies.tokenizer_json(encoding)
    monkeypatch.setattr(vocabularies, "_made", None)
    assert vocabularies.tokenizer_json(encoding) == first


@pytest.mark.parametrize("kind", ["bytes", "bpe", *vocabularies.NAMES])
def test_transformers_reads_the_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = opened(kind, monkeypatch)
    tokenizer.context = 1024
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # as beside a model: gpt2 has a class of its own
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "a <|endoftext|> b", *([] if kind == "bytes" else [code_and_prose(5)])]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert auto.encode(text, split_special_tokens=True) == ids.tolist()
        assert auto.decode(ids.tolist()) == text
        if "<|endoftext|>" not in text:
            assert dict(auto(text, verbose=False)) == {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}
    assert auto.eos_token_id == auto.bos_token_id == tokenizer.end_of_text and auto.model_max_length == 1024
    assert auto.encode("a<|endoftext|>")[-1] == tokenizer.end_of_text, "as in any other folder of its kind"


def opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    if kind in vocabularies.NAMES:
        if not DOWNLOADED.exists():
            pytest.skip("tiktoken's files are not at hand")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DOWNLOADED))
    return open_tokenizer(kind, 400, [code_and_prose(1)])


@pytest.mark.parametrize("kind, name", vocabularies.NAMES.items())
def test_the_real_vocabularies_give_their_ids(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = library.Tokenizer.from_str(opened(kind, monkeypatch).to_json())
    encoding = tiktoken.get_encoding(name)
    assert differing([*TEXTS, *some_of_unicode(), *map(code_and_prose, range(10))], encoding, saved) == []
    assert max(saved.get_vocab().values()) + 1 == encoding.n_vocab


# -- the files


def test_the_files_are_those_that_tiktoken_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def read(url: str, expected_hash: str | None = None) -> bytes:
        asked[kind].append(url)
        return b"{}" if url.endswith("json") else b""

    monkeypatch.setattr(tiktoken.load, "read_file_cached", read)
    for kind, name in vocabularies.NAMES.items():
        asked[kind] = []
        try:
            getattr(openai_public, name)()
        except AssertionError:  # gpt2's two files do not agree
            pass
    assert {kind: tuple(url.removeprefix(vocabularies.HOST) for url in urls) for kind, urls in asked.items()} == (
        vocabularies.FILES)


def test_they_are_looked_for_where_tiktoken_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(vocabularies, "HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: b"content")
    for variable in ("DATA_GYM_CACHE_DIR", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert "its files are not in " + str(tmp_path / variable) in vocabularies.problem("gpt2")
        for path in vocabularies.FILES["gpt2"]:
            tiktoken.load.read_file_cached("http://127.0.0.1:9" + path, hashlib.sha256(b"content").hexdigest())
        assert vocabularies.problem("gpt2") == ""
        assert "--tokenizer gpt4: " in vocabularies.problem("gpt4")


def test_without_a_folder_named_they_are_kept_among_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DATA_GYM_CACHE_DIR", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert vocabularies.folder() == files.home() / "tiktoken"


def test_other_kinds_need_no_files() -> None:
    assert vocabularies.problem("bpe") == vocabularies.problem("some/tokenizer.json") == ""
