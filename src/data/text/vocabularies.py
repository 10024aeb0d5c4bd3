"""tiktoken's vocabularies: whether their files can be had, and the tokenizer.json that gives the same ids.

Importing this takes the standard library only: the first is asked before anything is set up.
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files
from stoker.data import cache
from stoker.data.sources.network import unreachable

if TYPE_CHECKING:
    import tiktoken

NAMES = {"gpt2": "gpt2", "gpt4": "cl100k_base", "gpt4o": "o200k_base"}
HOST = "https://openaipublic.blob.core.windows.net"
FILES = {
    "gpt2": ("/gpt-2/encodings/main/vocab.bpe", "/gpt-2/encodings/main/encoder.json"),
    "gpt4": ("/encodings/cl100k_base.tiktoken",),
    "gpt4o": ("/encodings/o200k_base.tiktoken",),
}
WHAT_TO_DO = ("connect, set TIKTOKEN_CACHE_DIR to a folder that has them, or train a tokenizer on the text: "
              "--tokenizer bpe")
MAKER = 2  # raise it when another tokenizer.json is made, or it is kept in another form


def problem(kind: str) -> str:
    """Why `--tokenizer` cannot be had, neither from tiktoken's cache nor from its server, or ''; '' for other kinds.

    Answers in seconds; tiktoken itself would wait without limit.
    """
    lacking = [HOST + path for path in FILES.get(kind, ()) if not (folder() / _name(HOST + path)).is_file()]
    if not lacking or not (why := unreachable(lacking[0])):
        return ""
    return (f"--tokenizer {kind}: its files are not in {folder()}, and {HOST} cannot be reached ({why}); {WHAT_TO_DO}")


def folder() -> Path:
    """Where tiktoken is to keep its files: as the environment says, otherwise among our caches. Its own choice, the
    folder for temporary files, would not outlive a reboot."""
    named = [os.environ.get(variable) for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")]
    return Path(next(filter(None, named), files.home() / "tiktoken"))


def tokenizer_json(encoding: "tiktoken.Encoding") -> str:
    """The tokenizer.json that gives an encoding's ids; made in some seconds, then taken from the cache."""
    head = f"{MAKER} {encoding._pat_str} {encoding._special_tokens}".encode()
    key = hashlib.sha256(b"\n".join([head, *encoding._mergeable_ranks])).hexdigest()[:24]
    path = files.home() / "tokenizers" / f"{key}.json"
    return cache.text(path, lambda: _made(encoding))


def byte_letters() -> dict[int, str]:
    """byte -> the letter that stands for it in the vocabulary of a byte-level BPE (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _name(url: str) -> str:
    """What tiktoken calls a file in its cache."""
    return hashlib.sha1(url.encode()).hexdigest()


def _made(encoding: "tiktoken.Encoding") -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letter = byte_letters()

    def shown(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    ranks = encoding._mergeable_ranks
    # of the special tokens the end of a text alone is one here; no merge leads to the others, they count in the size
    vocabulary = {shown(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[(shown(a), shown(b)) for a, b in _merges(ranks)]))
    # to the engine here, Oniguruma, a plus after {1,3} is another repetition, where to the other it means possessive
    words = encoding._pat_str.replace("{1,3}+", "{1,3}")
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([encoding.decode([encoding.eot_token])])
    return library.to_str()


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token was joined from, in the order of their ranks; tiktoken keeps only what it was joined to.

    It is what is left of the token's bytes once all that ranks lower is joined.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
            first = joined.index(min(joined))
            assert joined[first] < rank, f"{token!r} cannot be reached"
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs
