"""What tokens spell, in bytes: a token of a byte-level vocabulary may be a part of a character."""

import json

from stoker.data.text.tokenizers import Tokenizer
from stoker.data.text.vocabularies import byte_letters


def spelled(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id adds to a text that it does not begin; b"" for ids that stand for nothing."""
    state = json.loads(tokenizer.to_json())
    if (state.get("decoder") or {}).get("type") != "ByteLevel":
        return [_added(tokenizer, token) for token in range(tokenizer.vocab_size)]
    found = [b""] * tokenizer.vocab_size
    byte = {letter: number for number, letter in byte_letters().items()}
    for text, token in state["model"]["vocab"].items():
        if set(text) <= byte.keys():
            found[token] = bytes(byte[letter] for letter in text)
    for added in state["added_tokens"]:
        found[added["id"]] = added["content"].encode()
    return found


def _added(tokenizer: Tokenizer, token: int) -> bytes:
    """Tokenizers may leave out a space at the beginning of a text."""
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])):].encode()
