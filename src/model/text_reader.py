"""What may come after texts, by a causal language model: many texts at once, from a cache of what they have in common.

Axes: B rows that are read at once, T tokens of each that are new, V vocabulary.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stoker.model.decoding import Decoder
from stoker.model.kv_cache import KVCache


class Text:
    """The tokens of `before` and one more. The first one of all is the end of text, which in training stands between
    two documents."""

    __slots__ = ("before", "token", "length", "log_prob")

    def __init__(self, before: "Text | None", token: int, log_prob: float = 0.0):
        self.before, self.token = before, token
        self.length: int = before.length + 1 if before else 1
        self.log_prob = log_prob  # of all tokens after the first


class _Window(NamedTuple):
    """What the model keeps of texts that it has read from the same position on."""

    cache: KVCache
    rows: Mapping[Text, int]  # the row that has read a text, maybe with more after it


class Reader:
    """Reads texts with a model in evaluation mode.

    Texts that begin alike share what was computed for them. A text that is longer than the model's context is read from
    a later position on, such that its next token has at least half of the context before it.
    """

    def __init__(self, model: Decoder, end_of_text: int):
        self.model, self.root = model, Text(None, end_of_text)
        self.following: dict[Text, np.ndarray] = {}  # (V,) log probabilities of the next token
        self._device = model.head_weight.device
        self._stride = max(1, model.max_seq_len // 2)
        self._windows: dict[int, _Window] = {}  # by the position from which on they are read

    def read(self, asked: Collection[Text], kept: Iterable[Text]) -> None:
        """Put the texts that are `asked` into `following`. `kept` are those with which later ones begin; what is known
        of others is dropped."""
        unread = [text for text in dict.fromkeys(asked) if text not in self.following]
        if not unread:
            return
        lasting = dict.fromkeys([*kept, *asked])
        self.following = {text: self.following[text] for text in lasting if text in self.following}
        earliest = min(self.first(text.length) for text in lasting)
        self._windows = {first: window for first, window in self._windows.items() if first >= earliest}
        windows: dict[int, list[Text]] = {}
        for text in unread:
            windows.setdefault(self.first(text.length), []).append(text)
        for first, group in windows.items():
            self._read_window(first, group, lasting)

    def first(self, length: int) -> int:
        """The position from which on a text of `length` tokens is read."""
        return self._stride * max(0, -((self.model.max_seq_len - length) // self._stride))

    def _read_window(self, first: int, texts: Sequence[Text], kept: Collection[Text]) -> None:
        """Read texts from position `first` on, and carry over what was read of `kept` from there on."""
        known = self._windows.get(first, _Window(KVCache(0, 0), {}))
        found = [_nearest(text, known.rows, first) for text in kept]
        leaves, rows = _leaves([*texts, *(text for text in found if text)], first)
        sources = [_nearest(text, known.rows, first) for text in leaves]
        shared = [text for text in sources if text]
        start = min(text.length for text in shared) if len(shared) == len(leaves) else first
        start = min(start, *(text.length - 1 for text in texts))  # what comes after each of `texts` is computed here
        longest = max(text.length for text in leaves)
        if start > first:
            cache = known.cache.branch(torch.tensor([known.rows[text] for text in shared], device=self._device),
                                       start - first, longest - first)
        else:
            cache = self.model.new_cache(longest - first)
        log_probs = self._log_probs([_tokens(text, start) for text in leaves], cache)
        self._windows[first] = _Window(cache, rows)
        for text, row in rows.items():
            if text.length > start and self.first(text.length) == first:
                self.following.setdefault(text, log_probs[row, text.length - start - 1])

    @torch.no_grad()
    def _log_probs(self, tokens: Sequence[Sequence[int]], cache: KVCache) -> np.ndarray:
        """(B, T, V) of the tokens that follow. Rows are padded at their end, where nothing that counts attends to."""
        longest = max(map(len, tokens))
        padded = torch.tensor([[*row, *[self.root.token] * (longest - len(row))] for row in tokens])
        with torch.autocast(self._device.type, enabled=False):
            logits = self.model.logits(self.model.hidden(padded.to(self._device), cache))
        found: np.ndarray = logits.float().log_softmax(-1).cpu().numpy()
        return found


def _nearest(text: Text | None, rows: Collection[Text], first: int) -> Text | None:
    """The longest beginning of a text that is in `rows`, and goes beyond position `first`."""
    while text and text.length > first:
        if text in rows:
            return text
        text = text.before
    return None


def _leaves(texts: Iterable[Text], first: int) -> tuple[list[Text], dict[Text, int]]:
    """The texts that no other one begins with; and for each of their beginnings beyond position `first` the number of
    one of them."""
    leaves: list[Text] = []
    rows: dict[Text, int] = {}
    for leaf in sorted(texts, key=lambda text: -text.length):
        if leaf in rows:
            continue
        text: Text | None = leaf
        while text and text.length > first and text not in rows:
            rows[text] = len(leaves)
            text = text.before
        leaves.append(leaf)
    return leaves, rows


def _tokens(text: Text, start: int) -> list[int]:
    """Its tokens from a position on."""
    tokens, part = list[int](), text
    while True:
        tokens.append(part.token)
        if part.length <= start + 1 or not part.before:
            return tokens[::-1]
        part = part.before
