"""What tokens spell, joined, is the text: for each kind of tokenizer there is."""

import json
from typing import Any

import pytest

from stoker.data.text.labels import open_labels
from stoker.data.text.spelling import spelled
from stoker.data.text.tokenizers import Bytes, from_json, open_tokenizer

TEXT = "one größe two 東京 one"


def bpe() -> Any:
    return open_tokenizer("bpe", 265, [TEXT * 9])


def metaspace() -> Any:
    """As sentencepiece writes words: with the space before them, also before the first one."""
    pieces = ["\u2581", *sorted(set(TEXT) - {" "}), "<eos>"]
    return from_json("own", json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": len(pieces) - 1, "content": "<eos>", "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "model": {"type": "BPE", "vocab": {piece: number for number, piece in enumerate([*pieces, "\u2581one"])},
                  "merges": [], "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}}))


@pytest.mark.parametrize("tokenizer", [Bytes(), bpe, lambda: from_json("own", Bytes().to_json()), metaspace,
                                       lambda: open_labels("chars", 0, [TEXT]),
                                       lambda: open_tokenizer("bytes", 0, [], special=("<|mine|>",))])
def test_what_tokens_spell_is_the_text(tokenizer: Any) -> None:
    tokenizer = tokenizer() if callable(tokenizer) else tokenizer
    found = spelled(tokenizer)
    ids = tokenizer.encode_batch([TEXT])[0].tolist()
    assert len(found) == tokenizer.vocab_size
    assert b"".join(found[token] for token in ids).strip() == TEXT.encode()


def test_halves_of_characters_are_bytes() -> None:
    tokenizer = bpe()
    halves = [part for part in spelled(tokenizer) if b"\xe6".startswith(part) and part]
    assert halves == [b"\xe6"] and max(map(len, spelled(tokenizer)[:-1])) > 3
