"""Every tokenizer gives back the text it got, reads special tokens as text, and agrees with its reference."""

import json
import logging
import os
import random
import socket
import unicodedata
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import tiktoken
import tokenizers as library

from damage import flip, full_disk
from stoker import files
from stoker.config import UserError
from stoker.data.text import tokenizers, vocabularies
from stoker.data.text.tokenizers import Tokenizer, open_tokenizer, pieces

DOWNLOADED = Path(__file__).parents[3] / "shared" / "data" / "tiktoken_cache"
WORDS = "the river runs to the sea and the sea runs to no one's river; we've 12 or 1234 reasons, you'll see".split()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DOWNLOADED))


def english(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" "] * 8 + ["\n", "\n\n", "  ", ", "]) for _ in range(words))


def anything(seed: int, letters: int) -> str:
    """Random characters of all of Unicode, among them many spaces, letters and digits."""
    draw = random.Random(seed)
    ranges = [(9, 14), (32, 127), (32, 33), (128, 0x250), (0x300, 0x370), (0x4e00, 0x4f00), (0x2000, 0x2070),
              (0x1f600, 0x1f640), (0, 0x110000)]
    made = (chr(draw.randrange(*draw.choice(ranges))) for _ in range(letters))
    return "".join(letter for letter in made if unicodedata.category(letter) != "Cs")


HOSTILE = ["", " ", "<|endoftext|>", "a <|endoftext|>\n<|fim_prefix|> b", "\r\n\t \n", "don't", "e\u0301 \u0301x",
           "\ufeffx", *(anything(seed, 300) for seed in range(40)), english(0, 300)]


def opened(kind: str) -> Tokenizer:
    if kind.startswith("gpt") and not DOWNLOADED.exists():
        pytest.skip("tiktoken's files are not at hand")
    return open_tokenizer(kind, 400, [english(1, 3000), anything(1, 3000)])


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_text_comes_back_and_special_tokens_are_text(kind: str) -> None:
    tokenizer = opened(kind)
    found = tokenizer.encode_batch(HOSTILE)
    assert [tokenizer.decode(ids.tolist()) for ids in found] == HOSTILE
    every = np.concatenate(found)
    assert tokenizer.end_of_text not in every and 0 <= every.min() and every.max() < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_pieces_of_a_document_have_the_ids_of_the_whole(kind: str) -> None:
    tokenizer = opened(kind)
    for document in (english(2, 3000), anything(2, 20_000), "nospace" * 100, " ²x 1 y  z" * 50, "w\n\t w" * 90, ""):
        parts = list(pieces(document, 200))
        assert "".join(parts) == document
        whole, *found = tokenizer.encode_batch([document, *parts])
        assert np.array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_an_endless_row_of_blanks_is_cut(kind: str) -> None:
    """tiktoken's engine gives up on a million in a row; what another makes of the whole comes out all the same."""
    document = "Here" + " " * 1_100_000 + "and" + "\t" * 1_100_000 + "x"
    tokenizer = opened(kind)
    parts = list(pieces(document))
    assert "".join(parts) == document and len(parts) == 5
    ids = np.concatenate(tokenizer.encode_batch(parts)).tolist()
    assert tokenizer.decode(ids) == document
    if kind == "bpe":  # the others are cut at the same places
        assert library.Tokenizer.from_str(tokenizer.to_json()).encode(document).ids == ids


def test_pieces_are_as_long_as_asked_for() -> None:
    parts = list(pieces(english(2, 3000), 200))
    assert len(parts) > 50 and all(200 <= len(part) < 260 for part in parts[:-1])


# -- bytes


def test_bytes_are_utf8() -> None:
    [ids] = open_tokenizer("bytes", 0, []).encode_batch(["aé€"])
    assert ids.tolist() == [0x61, 0xc3, 0xa9, 0xe2, 0x82, 0xac]


def test_saved_bytes_give_the_same_ids_elsewhere(tmp_path: Path) -> None:
    tokenizer = open_tokenizer("bytes", 0, [])
    tokenizer.save(tmp_path)
    saved = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.token_to_id("<|endoftext|>") == tokenizer.end_of_text
    ordinary = [each for each in HOSTILE if "<|endoftext|>" not in each]
    assert [saved.encode(each).ids for each in ordinary] == [ids.tolist() for ids in tokenizer.encode_batch(ordinary)]


# -- the corpus' own BPE


def test_bpe_gives_the_ids_of_the_library_that_trained_it(tmp_path: Path) -> None:
    tokenizer = opened("bpe")
    assert isinstance(tokenizer, tokenizers.Tiktoken) and tokenizer.vocab_size == 400
    tokenizer.save(tmp_path)
    reference = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.encode_special_tokens = True
    for text, ids in zip(HOSTILE, tokenizer.encode_batch(HOSTILE)):
        assert ids.tolist() == reference.encode(text).ids
    assert reference.token_to_id("<|endoftext|>") == tokenizer.end_of_text
    assert len(tokenizer.encode_batch([english(3, 500)])[0]) < len(english(3, 500)) / 2, "common words are one piece"


def test_bpe_is_trained_once_for_a_text_and_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [english(1, 2000)]
    first = open_tokenizer("bpe", 300, texts)
    train = tokenizers._train
    monkeypatch.setattr(tokenizers, "_train", None)
    assert open_tokenizer("bpe", 300, texts).fingerprint == first.fingerprint
    for changed in ((300, ["other", *texts], False), (301, texts, False), (300, texts, True)):
        with pytest.raises(TypeError):
            open_tokenizer("bpe", changed[0], changed[1], retrain=changed[2])
    monkeypatch.setattr(tokenizers, "_train", train)
    assert open_tokenizer("bpe", 300, texts, retrain=True).fingerprint == first.fingerprint
    assert open_tokenizer("bpe", 301, texts).fingerprint != first.fingerprint


def test_a_damaged_bpe_is_trained_again(caplog: pytest.LogCaptureFixture) -> None:
    texts = [english(1, 2000)]
    first = open_tokenizer("bpe", 300, texts)
    [cached] = (files.home() / "tokenizers").glob("*.json")
    for damage in (lambda: flip(cached, 5000), lambda: os.truncate(cached, 3000), lambda: cached.write_text("{}")):
        damage()
        assert open_tokenizer("bpe", 300, texts).fingerprint == first.fingerprint
    assert caplog.text.count(f"{cached} is damaged: it is made again") == 3


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write", full_disk)
    with pytest.raises(UserError, match="No space left on device in .*tokenizers: make room there"):
        open_tokenizer("bpe", 300, [english(1, 100)])


def test_a_small_text_gives_fewer_pieces_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = open_tokenizer("bpe", 5000, ["so short a text"])
    assert 257 <= tokenizer.vocab_size < 300
    assert f"{tokenizer.vocab_size} tokens, not 5,000" in caplog.text


def test_training_takes_a_share_of_all_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document{number} " * 10 for number in range(1000)]
    assert list(tokenizers._sample(documents)) == documents
    monkeypatch.setattr(tokenizers, "TRAINED_ON_AT_MOST", sum(map(len, documents)) // 4)
    taken = [documents.index(each) for each in tokenizers._sample(documents)]
    assert 240 <= len(taken) <= 250 and max(np.diff([0, *taken, 999])) <= 8


# -- tokenizer.json


def test_a_saved_tokenizer_is_opened_by_its_path(tmp_path: Path) -> None:
    first = opened("bpe")
    first.save(tmp_path)
    again = open_tokenizer(str(tmp_path / "tokenizer.json"), 0, [])
    assert (again.fingerprint, again.vocab_size, again.end_of_text) == (
        first.fingerprint, first.vocab_size, first.end_of_text)
    assert np.array_equal(again.encode_batch([english(4, 100)])[0], first.encode_batch([english(4, 100)])[0])


def test_another_kind_of_tokenizer_json_is_run_by_the_library(tmp_path: Path) -> None:
    words = {"<unk>": 0, "</s>": 1, "river": 2, "sea": 7}
    other = library.Tokenizer(library.models.WordLevel(words, unk_token="<unk>"))
    other.pre_tokenizer = library.pre_tokenizers.Whitespace()
    other.add_special_tokens(["</s>"])
    other.save(str(tmp_path / "other.json"))
    tokenizer = open_tokenizer(str(tmp_path / "other.json"), 0, [])
    assert tokenizer.encode_batch(["sea river lake", "</s>"])[0].tolist() == [7, 2, 0]
    assert 1 not in tokenizer.encode_batch(["</s>"])[0]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (8, 1)


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
])
def test_what_tiktoken_would_read_otherwise_is_left_to_the_library(change: dict[str, object], tmp_path: Path) -> None:
    opened("bpe").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    text = "The river runs. To the SEA"
    expected = library.Tokenizer.from_file(str(path)).encode(text).ids
    assert open_tokenizer(str(path), 0, []).encode_batch([text])[0].tolist() == expected


def test_what_would_add_to_a_text_or_cut_it_is_taken_out(tmp_path: Path) -> None:
    """Also from what is saved, so that it gives these ids elsewhere."""
    words = library.Tokenizer(library.models.WordLevel({"</s>": 0, "river": 1, "sea": 2}, unk_token="</s>"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    words.post_processor = library.processors.TemplateProcessing("</s> $A </s>", special_tokens=[("</s>", 0)])
    words.enable_truncation(3)
    words.enable_padding()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"), 0, [])
    text = "river sea river sea river"
    assert [ids.tolist() for ids in tokenizer.encode_batch([text, "sea"])] == [[1, 2, 1, 2, 1], [2]]
    assert library.Tokenizer.from_str(tokenizer.to_json()).encode(text).ids == [1, 2, 1, 2, 1]
    assert tokenizers.from_json("again", tokenizer.to_json()).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("content, reason", [
    (None, "No such file"), (b"{", "is not JSON"), pytest.param(b"[" * 200_000, "is not JSON", id="deep"),
    (b"[1]", "no tokenizer"), (b'{"d_model": 64}', "no tokenizer"),
    (b"\xff", "not UTF-8"),
])
def test_a_bad_tokenizer_json_is_one_line(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        open_tokenizer(str(path), 0, [])
    assert str(path) in str(caught.value) and "give one of bpe, bytes, gpt2" in str(caught.value)


@pytest.mark.parametrize("change", [{}, {"model": 3}, {"added_tokens": 3},
                                    {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}])
def test_what_the_library_refuses_is_one_line(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"model": {}, "pre_tokenizer": None, "added_tokens": []} | change))
    with pytest.raises(UserError, match=f"{path}: is no tokenizer that .* can read .*; give one of") as caught:
        open_tokenizer(str(path), 0, [])
    assert "\n" not in str(caught.value)


def test_an_id_that_would_need_billions_of_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    added = {"content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
    model = {"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 2**31 - 1}, "unk_token": "a"}
    path.write_text(json.dumps({"model": model, "pre_tokenizer": None, "added_tokens": [{"id": 2**31 - 1, **added}]}))
    with pytest.raises(UserError, match="has the id 2,147,483,647, for 2 tokens in all"):
        open_tokenizer(str(path), 0, [])


def test_a_regular_expression_that_explodes_is_one_line(tmp_path: Path) -> None:
    """The library panics, and a panic is no Exception."""
    words = library.Tokenizer(library.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    words.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"(a+)+$|(a|aa)+b"), "isolated")
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer(str(tmp_path / "t.json"), 0, [])
    assert len(tokenizer.encode_batch(["aaa", "b a"])) == 2
    with pytest.raises(UserError, match="t.json: cannot encode the text .*retry-limit.*; give one of") as caught:
        tokenizer.encode_batch(["fine", "a" * 4000 + "!"])
    assert "\n" not in str(caught.value)


def test_no_other_error_is_laid_on_the_tokenizer() -> None:
    for error in (KeyboardInterrupt, ValueError("of ours"), MemoryError):
        with pytest.raises(BaseException) as caught, tokenizers._refused("name", "what"):
            raise error
        assert not isinstance(caught.value, UserError)


def test_a_tokenizer_that_cannot_end_a_text_is_refused(tmp_path: Path) -> None:
    library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="has none of <|endoftext|>"):
        open_tokenizer(str(tmp_path / "t.json"), 0, [])


# -- tiktoken


@pytest.mark.parametrize("kind, encoding", vocabularies.NAMES.items())
def test_gpt_kinds_are_tiktokens(kind: str, encoding: str) -> None:
    tokenizer, reference = opened(kind), tiktoken.get_encoding(encoding) if DOWNLOADED.exists() else None
    assert reference is not None
    expected = reference.encode_ordinary_batch(HOSTILE)
    assert [ids.tolist() for ids in tokenizer.encode_batch(HOSTILE)] == expected
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (reference.n_vocab, reference.eot_token)


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


def test_without_tiktokens_files_it_says_what_to_do(no_network: None) -> None:
    with pytest.raises(UserError, match="cannot be reached.*TIKTOKEN_CACHE_DIR.*--tokenizer bpe"):
        open_tokenizer("gpt2", 0, [])


def test_a_download_that_fails_is_reported_too(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "unreachable", lambda url: "")
    with pytest.raises(UserError, match="cannot be fetched .*(Connection|Proxy)Error.*--tokenizer bpe"):
        open_tokenizer("gpt2", 0, [])
