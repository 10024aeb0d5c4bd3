"""Documents -> token ids in a memory-mapped file -> windows to train on."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from stoker import files
from stoker.config import UserError
from stoker.data import blocks, cache
from stoker.data.blocks import Numbers
from stoker.data.loader import Order
from stoker.data.text.corpus import fingerprint
from stoker.data.text.tokenizers import Tokenizer, pieces
from stoker.progress import tracked

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when other ids are written, or the same ids in another format
BATCH = 4_000_000  # characters that are encoded at a time
COUNTED_AT_ONCE = 10_000_000  # tokens


def tokenize(documents: list[str], tokenizer: Tokenizer, what: str) -> Numbers:
    """The ids of all documents, one after another, each ended by end-of-text; N of uint16 or uint32.

    They are in a file in the cache, keyed by the documents' content and the tokenizer: a second call encodes nothing,
    and several processes share the memory. `what` names the text in the log. Raises UserError where the disk refuses to
    keep them.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    key = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {fingerprint(documents)}".encode()).hexdigest()[:32]
    path = files.home() / "tokens" / f"{key}.bin"
    with cache.room(path.parent), files.locked(path.with_suffix(".lock")):
        files.tidy(path.parent)
        if (found := _known(path, dtype)) is None:
            _build(path, documents, tokenizer, dtype, what)
            found = _known(path, dtype)
    assert found is not None, path
    return found


def unigram_perplexity(train: Numbers | np.ndarray, valid: Numbers | np.ndarray, vocab_size: int) -> float:
    """Perplexity on `valid` of guessing each token by how often it stands in `train` (add-one smoothed).

    What a model that looks at nothing reaches: below this, something was learned from the context.
    """
    known, asked = _counts(train, vocab_size), _counts(valid, vocab_size)
    log_probability = np.log((known + 1) / (known.sum() + vocab_size))
    return math.exp(-(asked * log_probability).sum() / asked.sum())


class Windows(Dataset[torch.Tensor]):
    """Packed windows of a token stream: item i is (length + 1,) int64, the inputs and, one further on, the targets.

    Neighbours share one token, so each token but the first is a target exactly once; only the last part that fills
    no window is left out.

    With a `seed`, item i + epoch * len(self) is window i of that epoch. The windows of epoch 0 begin at token 0, those
    of each later epoch at a token drawn from (seed, epoch); after its last token the stream continues with its first.
    Such a data set has no last item: do not iterate over it.
    """

    def __init__(self, tokens: Numbers | np.ndarray, length: int, *, max_samples: int = 0, what: str = "text",
                 seed: int | None = None):
        """`max_samples` keeps the first windows only, 0 keeps all. `what` names the text in the error. Raises UserError
        where the text does not fill one window."""
        count = (len(tokens) - 1) // length
        if count < 1:
            raise UserError(
                f"the {what} has {len(tokens):,} tokens, but one window of --max_seq_len {length} needs "
                f"{length + 1:,}; give more text or a shorter --max_seq_len"
            )
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = min(count, max_samples) if max_samples else count
        self.used = self.count * length + 1 if self.count == max_samples else len(tokens)  # tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if index < 0 or index >= self.count and self.seed is None:
            raise IndexError(f"window {index} of {self.count}")
        start = self._start(index)
        end = start + self.length + 1
        window = np.array(self.tokens[start:min(end, self.used)], np.int64)
        if end > self.used:
            window = np.concatenate([window, self.tokens[:end - self.used]], dtype=np.int64)
        return torch.from_numpy(window)

    def _start(self, index: int) -> int:
        """The place of its first token."""
        epoch, row = divmod(index, self.count)
        begin = _drawn(self.seed, epoch, self.used) if epoch and self.seed is not None else 0
        return (begin + row * self.length) % self.used

    def share_targets(self, index: int, other: int) -> bool:
        """Whether two windows, of one epoch or of two, have a target in common."""
        apart = (self._start(index) - self._start(other)) % self.used
        return min(apart, self.used - apart) < self.length

    def documents(self, end_of_text: int) -> list[str]:
        """The number of the document in which each window of epoch 0 begins."""
        starts = np.arange(self.count) * self.length
        return [str(number) for number in np.searchsorted(_ends(self.tokens, end_of_text), starts)]


@lru_cache(maxsize=64)
def _drawn(seed: int, epoch: int, size: int) -> int:
    """A random position in a stream of `size` tokens, the same for the same seed and epoch."""
    return int(np.random.default_rng((seed, epoch)).integers(size))


@dataclass(frozen=True)
class ShiftedOrder(Order):
    """The order of windows that each epoch cuts at other places. With the window of a row that is left out, from a step
    on, later epochs leave out all windows that share a target with it."""

    by_epoch: bool = True
    windows: Windows | None = None

    def leaves_out(self, item: int, step: int) -> bool:
        assert self.windows is not None
        return any(step >= first and self.windows.share_targets(item, row + first // self.steps_per_epoch * self.size)
                   for row, first in self.left_out.items())


class Lines(Dataset[torch.Tensor]):
    """Each document of a token stream is a sample: item i is (at most length + 1,) int64, an end-of-text token and then
    the document's tokens with their end-of-text. Without its last token it is the input, without its first the
    targets."""

    def __init__(self, tokens: Numbers | np.ndarray, length: int, end_of_text: int, *, max_samples: int = 0):
        """`max_samples` keeps the first documents only, 0 keeps all."""
        self.tokens, self.length, self.end_of_text = tokens, length, end_of_text
        ends = _ends(tokens, end_of_text)[:max_samples or None] + 1
        self.spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)  # (N, 2): from, to

    @property
    def used(self) -> int:
        return int(self.lengths().sum())

    def lengths(self) -> np.ndarray:
        """How many tokens of each document are targets, (N,)."""
        lengths: np.ndarray = np.minimum(self.spans[:, 1] - self.spans[:, 0], self.length)
        return lengths

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> torch.Tensor:
        start, end = self.spans[index]
        document = np.array(self.tokens[start:min(end, start + self.length)], np.int64)
        return torch.from_numpy(np.concatenate([[self.end_of_text], document]))


# -- the cache ------------------------------------------------------------------------------------------------------


def _known(path: Path, dtype: np.dtype) -> Numbers | None:
    """The tokens in a file; None where the file or its note is missing or damaged."""
    if (note := cache.read(path.with_suffix(".note"))) is None:
        return None
    known = json.loads(note)
    return blocks.opened(path, dtype, known["count"], known["blocks"])


def _build(path: Path, documents: list[str], tokenizer: Tokenizer, dtype: np.dtype, what: str) -> None:
    """Encode into `path`, batch by batch; the note that makes it valid is written last."""
    total = sum(map(len, documents))
    batches = tracked(_batches(documents), f"Tokenizing {what}", total, "characters")
    digests = blocks.write(path, (_joined(tokenizer.encode_batch(texts), ends, tokenizer.end_of_text, dtype)
                                  for texts, ends in batches))
    count = path.stat().st_size // dtype.itemsize
    cache.write(path.with_suffix(".note"), json.dumps({"count": count, "blocks": digests}))
    log.info("Tokenized %s: %s tokens", what, f"{count:,}")


def _batches(documents: list[str]) -> Iterator[tuple[int, tuple[list[str], list[bool]]]]:
    """(characters, (texts, whether each ends its document)): long documents in pieces, short ones together."""
    texts: list[str] = []
    ends: list[bool] = []
    size = 0
    for document in documents:
        parts = list(pieces(document))
        for number, part in enumerate(parts, start=1):
            texts.append(part)
            ends.append(number == len(parts))
            size += len(part)
            if size >= BATCH:
                yield size, (texts, ends)
                texts, ends, size = [], [], 0
    if texts:
        yield size, (texts, ends)


def _joined(ids: list[np.ndarray], ends: list[bool], end_of_text: int, dtype: np.dtype) -> bytes:
    end = np.array([end_of_text], dtype)
    parts = [part for each, is_end in zip(ids, ends) for part in ((each, end) if is_end else (each,))]
    return np.concatenate(parts, dtype=dtype, casting="same_kind").tobytes()


def _ends(tokens: Numbers | np.ndarray, end_of_text: int) -> np.ndarray:
    """The places of the end-of-text tokens."""
    return np.concatenate([start + np.flatnonzero(tokens[start:start + COUNTED_AT_ONCE] == end_of_text)
                           for start in range(0, len(tokens), COUNTED_AT_ONCE)])


def _counts(tokens: Numbers | np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id stands in the tokens, (vocab_size,); a part at a time, as bincount copies to int64."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start:start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts
