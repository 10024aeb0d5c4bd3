"""Text -> token ids and back: bytes, a byte-level BPE of the corpus' own, tiktoken's vocabularies, a tokenizer.json.

    kind                what                                                   vocabulary size
    bytes               one id a byte                                          257
    bpe                 trained on the training text, GPT-2's way of cutting   --vocab_size
    gpt2, gpt4, gpt4o   tiktoken's gpt2, cl100k_base, o200k_base               50,257, 100,277, 200,019
    PATH                a tokenizer.json made by this or another program       as it says

Text is always ordinary text: a special token that is spelled out in it is cut like any other word.
"""

import hashlib
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker import files
from stoker.config import UserError
from stoker.data import cache
from stoker.data.text import vocabularies
from stoker.data.text.corpus import END_OF_TEXT, fingerprint

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

log = logging.getLogger(__name__)

FIXED = ("bytes", *vocabularies.NAMES)  # the same for every text
KINDS = ("bpe", *FIXED)
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
WHAT_TO_GIVE = f"give one of {', '.join(KINDS)}, or the path of a tokenizer.json"
ADDING = ("post_processor", "truncation", "padding")  # what would add to the ids of a text, or take from them
TRAINER = 2  # raise it when training gives another vocabulary, or it is kept in another form
TRAINED_ON_AT_MOST = 64_000_000
PIECE = 100_000
WORD_START = re.compile(r"(?<=\S) (?=[^\W\d_])")
BLANKS = re.compile(r"\s+")
LARGEST_ID = 10_000_000
BLANKS_AT_MOST = 2**19  # tiktoken gives up on a million in a row; no token has more than 2**7 of the same


class Tokenizer(ABC):
    """What turns text into ids below `vocab_size`, and ids into text."""

    name: str
    vocab_size: int
    end_of_text: int
    fingerprint: str  # SHA-256 of all that decides the ids
    context: int | None = None  # how many ids the model takes at a time, to be noted in what is saved

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as arrays of one axis; the texts are shared out over the processor's cores."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """A tokenizer.json that gives the same ids, but for the end of a text: spelled out, it is recognised there."""

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        """Make a folder one that transformers' `AutoTokenizer` reads. `chat_template`: Jinja, for conversations."""
        end = self.decode([self.end_of_text])
        files.write(folder / "tokenizer.json", self.to_json())
        files.write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "model_max_length": self.context,
            "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would give GPT-2 token types too
            "clean_up_tokenization_spaces": False,
            **({"chat_template": chat_template} if chat_template else {}),
        })


def open_tokenizer(kind: str, vocab_size: int, train: list[str], *, retrain: bool = False,
                   special: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `--tokenizer` names; `vocab_size`, `train` and `retrain` matter to "bpe" alone. The tokens of
    `special` are added after its own, where it lacks them; a "bpe" has `vocab_size` tokens with them.

    A BPE that was trained before on the same text is taken from the cache, unless `retrain`. It may have fewer
    pieces than asked for, where the text gives no more. Raises UserError.
    """
    if kind == "bytes":
        return _with_special(Bytes(), special)
    if kind in vocabularies.NAMES:
        return _with_special(Tiktoken(kind, _downloaded(kind)), special)
    if kind == "bpe":
        return _with_special(from_json(kind, _trained(vocab_size - len(special), train, retrain)), special)
    try:
        return _with_special(from_json(kind, Path(kind).read_text()), special)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"--tokenizer {kind}: {reason}; {WHAT_TO_GIVE}") from error


def pieces(document: str, size: int = PIECE) -> Iterator[str]:
    """A document in parts of `size` characters or a little more, whose ids one after another are those of the whole.

    A part begins with a single space before a letter: there every pattern used here starts a new word. A text that
    has no such place stays whole, unless it is cut within an endless row of blanks.
    """
    start = 0
    while word := WORD_START.search(document, start + size):
        yield from _without_endless_blanks(document[start:word.start()])
        start = word.start()
    yield from _without_endless_blanks(document[start:])


def _without_endless_blanks(part: str) -> Iterator[str]:
    start = 0
    if len(part) > BLANKS_AT_MOST:
        for blanks in BLANKS.finditer(part):
            for end in range(blanks.start() + BLANKS_AT_MOST, blanks.end(), BLANKS_AT_MOST):
                yield part[start:end]
                start = end
    yield part[start:]


class Bytes(Tokenizer):
    """UTF-8 bytes as they are; 256 ends a text."""

    def __init__(self) -> None:
        self.name, self.vocab_size, self.end_of_text = "bytes", 257, 256
        self.fingerprint = _sha256("bytes")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        end = END_OF_TEXT.encode()
        return b"".join(end if i == self.end_of_text else bytes([i]) for i in ids).decode(errors="replace")

    def to_json(self) -> str:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers

        letters = vocabularies.byte_letters()
        vocabulary = {letter: byte for byte, letter in letters.items()} | {END_OF_TEXT: self.end_of_text}
        library = Library(models.BPE(vocab=vocabulary, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([END_OF_TEXT])
        return library.to_str(pretty=True)


class Tiktoken(Tokenizer):
    """An encoding of tiktoken's: the fastest way to the ids, also for a BPE that came as tokenizer.json."""

    def __init__(self, name: str, encoding: "tiktoken.Encoding", content: str = "", end: int | None = None) -> None:
        self.name, self.vocab_size = name, encoding.n_vocab
        self.end_of_text = encoding.eot_token if end is None else end
        self.fingerprint = _sha256(content or f"tiktoken {encoding.name} {encoding.n_vocab}")
        self._encoding, self._content = encoding, content

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _refused(self.name, "cannot encode the text"):
            return _shared_out(lambda text: self._encoding.encode_to_numpy(text, disallowed_special=()), texts)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes(i) for i in ids).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # gpt4's and gpt4o's vocabularies have ids that stand for nothing
            return "\N{REPLACEMENT CHARACTER}".encode()

    def to_json(self) -> str:
        return self._content or vocabularies.tokenizer_json(self._encoding)


class TokenizerJson(Tokenizer):
    """Any tokenizer.json, run by the library that made it."""

    def __init__(self, name: str, library: "tokenizers.Tokenizer", content: str, end_of_text: int) -> None:
        library.encode_special_tokens = True  # special tokens spelled out in the text are cut like other words
        self.name, self.end_of_text = name, end_of_text
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _sha256(content)
        self._library, self._content = library, content

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _refused(self.name, "cannot encode the text"):
            found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.uint32) for each in found]

    def decode(self, ids: Iterable[int]) -> str:
        with _refused(self.name, "cannot decode"):
            return self._library.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        return self._content


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _shared_out(encode: Callable[[str], np.ndarray], texts: Sequence[str]) -> list[np.ndarray]:
    """Texts over threads, in groups: a task for each of many tiny texts would cost more than their encoding."""
    threads = len(os.sched_getaffinity(0))
    size = -(-len(texts) // (8 * threads)) or 1
    groups = [texts[start:start + size] for start in range(0, len(texts), size)]
    with ThreadPoolExecutor(threads) as pool:
        return [ids for group in pool.map(lambda group: [encode(text) for text in group], groups) for ids in group]


# -- tiktoken's own vocabularies ------------------------------------------------------------------------------------


def _downloaded(kind: str) -> "tiktoken.Encoding":
    import tiktoken

    if problem := vocabularies.problem(kind):
        raise UserError(problem)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(vocabularies.folder())
    try:
        return tiktoken.get_encoding(vocabularies.NAMES[kind])
    except (OSError, ValueError) as error:  # the network, as requests tells it; a download that is damaged
        raise UserError(f"--tokenizer {kind}: its files cannot be fetched ({type(error).__name__}: {error}); "
                        f"{vocabularies.WHAT_TO_DO}") from error


# -- the corpus' own byte-level BPE ---------------------------------------------------------------------------------


def _trained(vocab_size: int, train: list[str], retrain: bool) -> str:
    """The tokenizer.json of a BPE trained on the text, from the cache where it is there."""
    key = _sha256(f"{TRAINER} {vocab_size} {fingerprint(train)}")[:24]
    path = files.home() / "tokenizers" / f"{key}.json"
    return cache.text(path, lambda: _train(vocab_size, train), again=retrain)


def _train(vocab_size: int, train: list[str]) -> str:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    log.info("Training a tokenizer of %s tokens on the text", f"{vocab_size:,}")
    library.train_from_iterator(_sample(train), trainer)
    if (got := library.get_vocab_size()) != vocab_size:
        log.warning("The tokenizer has %s tokens, not %s: the text gives no others", f"{got:,}", f"{vocab_size:,}")
    return library.to_str(pretty=True)


def _sample(train: list[str]) -> Iterator[str]:
    """At most 64 MB of the text, taken evenly from all of it."""
    total, seen, given = sum(map(len, train)), 0, 0
    for part in (part for document in train for part in pieces(document)):
        seen += len(part)
        if given + len(part) <= seen * min(1.0, TRAINED_ON_AT_MOST / total):
            given += len(part)
            yield part


# -- special tokens -------------------------------------------------------------------------------------------------


def _with_special(tokenizer: Tokenizer, special: Sequence[str]) -> Tokenizer:
    """The tokenizer with special tokens added, in their order, after its own; itself where it has them all."""
    from tokenizers import Tokenizer as Library

    if not special:
        return tokenizer
    library = Library.from_str(tokenizer.to_json())
    if not library.add_special_tokens(list(special)):
        return tokenizer
    return from_json(tokenizer.name, library.to_str(pretty=True))


# -- tokenizer.json -------------------------------------------------------------------------------------------------


def from_json(name: str, content: str) -> Tokenizer:
    """A tokenizer from the text of its file. Raises UserError."""
    from tokenizers import Tokenizer as Library

    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: it is too deep
        raise UserError(f"--tokenizer {name}: is not JSON ({error}); {WHAT_TO_GIVE}") from error
    if not isinstance(state, dict) or not {"model", "pre_tokenizer", "added_tokens"} <= state.keys():
        raise UserError(f"--tokenizer {name}: is JSON, but no tokenizer; {WHAT_TO_GIVE}")
    if any(state.get(each) for each in ADDING):
        content = json.dumps(state | dict.fromkeys(ADDING))
    with _refused(name, "is no tokenizer that the `tokenizers` library can read"):
        library = Library.from_str(content)
    known = library.get_vocab(with_added_tokens=True)
    end = next((token for token in ENDS_OF_TEXT if token in known), None)
    if end is None:
        raise UserError(f"--tokenizer {name}: has none of {', '.join(ENDS_OF_TEXT)} to end a text with; add one")
    if (largest := max(known.values())) > LARGEST_ID:  # the model has a row for each id up to that
        raise UserError(f"--tokenizer {name}: has the id {largest:,}, for {len(known):,} tokens in all: ids up to "
                        f"{LARGEST_ID:,} can be used")
    if ranks := _ranks(state):
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        return Tiktoken(name, _encoding(ranks, special), content, known[end])
    return TokenizerJson(name, library, content, known[end])


@contextmanager
def _refused(name: str, what: str) -> Iterator[None]:
    """Turn what the library raises into a UserError: a plain Exception, or a panic of its Rust code, which is only a
    BaseException. It panics, for example, if the tokenizer's regular expression takes too many attempts."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"--tokenizer {name}: {what} ({' '.join(str(error).split())}); {WHAT_TO_GIVE}") from error


# GPT-2's way to cut text into words, in the form that tiktoken uses: it does not backtrack
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def _encoding(ranks: dict[bytes, int], special: dict[str, int]) -> "tiktoken.Encoding":
    import tiktoken

    return tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _ranks(state: dict[str, Any]) -> dict[bytes, int]:
    """bytes -> id of a byte-level BPE whose ids stand in the order of its merges, or {} where it is another kind.

    tiktoken joins the pair whose joined piece has the lowest id; in such a vocabulary that is the pair of the
    first merge, so that both give the same ids, tiktoken in a fraction of the time.
    """
    if not _is_byte_level(state) or not all(token.get("special") for token in state["added_tokens"]):
        return {}
    special = {token["content"] for token in state["added_tokens"]}
    vocabulary = {token: i for token, i in state["model"]["vocab"].items() if token not in special}
    merges = state["model"]["merges"]
    joined = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges]
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    byte = {letter: number for number, letter in vocabularies.byte_letters().items()}
    if set(by_id[:256]) != set(byte) or by_id[256:] != joined:
        return {}
    return {bytes(byte[letter] for letter in token): i for token, i in vocabulary.items()}


def _is_byte_level(state: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a BPE over bytes that cuts words as GPT-2 does and adds nothing of its own."""
    model, cutter = state["model"], state["pre_tokenizer"] or {}
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    cuts = (cutter.get("type"), cutter.get("add_prefix_space"), cutter.get("use_regex", True))
    if model.get("type") != "BPE" or state.get("normalizer") or cuts != ("ByteLevel", False, True):
        return False
    return not any(model.get(extra) for extra in ("dropout", "unk_token", "byte_fallback", "ignore_merges", *affixes))
