"""A language model in the beam search of a CTC head: shallow fusion (Hannun et al. 2014, arXiv:1408.2873).

    score of a text = log p_ctc + weight * log p_lm + bonus * words

`Fusion` searches; `Reader` computes log p_lm, of all new texts of a frame at once.

Axes: B texts that are read at once, T tokens of each that are new, V vocabulary of the language model, F frames, L labels.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from stoker.model import ctc
from stoker.model.decoding import Decoder
from stoker.model.kv_cache import KVCache

FLOOR = -12.0  # log probability of a label in a frame; with less it is not tried, whatever the language model expects
UNKNOWN = "\ufffd"  # as which tokenizers decode bytes that are no whole character
CHARACTER_BYTES = 4  # at most, in UTF-8


class Tokenizer(Protocol):
    """What is used of a tokenizer, of labels or of the language model's tokens."""

    vocab_size: int
    end_of_text: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


# -- the language model ---------------------------------------------------------------------------------------------


class Text:
    """Tokens of the language model: those of `before` and one more. The first one of all is its end of text, which in
    training stands between two documents."""

    __slots__ = ("before", "token", "length", "log_prob")

    def __init__(self, before: "Text | None", token: int):
        self.before, self.token = before, token
        self.length: int = before.length + 1 if before else 1
        self.log_prob = 0.0  # of all tokens after the first


class _Window(NamedTuple):
    """What the model keeps of texts that it has read from the same position on."""

    cache: KVCache
    rows: Mapping[Text, int]  # the row that has read a text, maybe with more after it


class Reader:
    """Log probabilities of texts by a causal model in evaluation mode, each given what is before it.

    Texts that begin alike share what was computed for them. A text that is longer than the model's context is read from
    a later position on, such that a token has at least half of the context before it.
    """

    def __init__(self, model: Decoder, end_of_text: int):
        self.model, self.root = model, Text(None, end_of_text)
        self._device = model.head_weight.device
        self._stride = max(1, model.max_seq_len // 2)
        self._windows: dict[int, _Window] = {}  # by the position from which they are read
        self._following: dict[Text, np.ndarray] = {}  # (V,) log probabilities of the token after each

    def extended(self, asked: Sequence[tuple[Text, Sequence[int]]], kept: Collection[Text]) -> list[Text]:
        """Each text with the tokens that come after it. `kept` are the texts that later ones begin with; what is known
        of others is dropped."""
        chains = [[text] for text, _ in asked]
        for chain, (_, tokens) in zip(chains, asked):
            for token in tokens:
                chain.append(Text(chain[-1], token))
        unread = [text for chain in chains for text in chain[:-1] if text not in self._following]
        if unread:
            self._read(dict.fromkeys(unread), dict.fromkeys([*kept, *(text for text, _ in asked)]))
        for chain in chains:
            for before, text in zip(chain, chain[1:]):
                text.log_prob = before.log_prob + float(self._following[before][text.token])
        return [chain[-1] for chain in chains]

    def first(self, length: int) -> int:
        """The position from which on a text of `length` tokens is read."""
        return self._stride * max(0, -((self.model.max_seq_len - length) // self._stride))

    def _read(self, texts: Collection[Text], kept: Collection[Text]) -> None:
        self._following = {text: self._following[text] for text in kept if text in self._following}
        earliest = min(self.first(text.length) for text in (*texts, *kept))
        self._windows = {first: window for first, window in self._windows.items() if first >= earliest}
        windows: dict[int, list[Text]] = {}
        for text in texts:
            windows.setdefault(self.first(text.length), []).append(text)
        for first, group in windows.items():
            self._read_window(first, group, kept)

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
                self._following.setdefault(text, log_probs[row, text.length - start - 1])

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


# -- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """How much the language model counts, and what each word adds, since the language model makes every word cost."""

    weight: float
    bonus: float

    def of(self, log_prob: float, words: int) -> float:
        return self.weight * log_prob + self.bonus * words


@dataclass(frozen=True)
class Hypothesis:
    """A text that was found: its labels, and the parts of its score."""

    labels: list[int]
    ctc: float
    lm: float
    words: int


class Fusion:
    """Searches what is said by a CTC head and a language model.

    Texts are scored as they were trained on: words with single spaces between them, the end of a text before and after.
    Where each token of the language model is a character, or a part of one (`--tokenizer bytes`), each label is scored
    as soon as it is written; else a word is scored when it ends, since its tokens depend on all of it.
    """

    def __init__(self, labels: Tokenizer, model: Decoder, tokenizer: Tokenizer):
        """`labels` decodes those of the CTC head, whose blank is its end of text; `tokenizer` is the model's."""
        self.labels, self.model, self.tokenizer = labels, model, tokenizer
        self.spelled = _spelled(labels)
        self.by_character = not _joins_characters(tokenizer)
        self._tokens: dict[str, list[int]] = {}

    def search(self, log_probs: np.ndarray, weights: Weights, width: int) -> list[Hypothesis]:
        """What may be said in an utterance (F, L), up to `width` texts, the best first."""
        scorer = _Scorer(self, weights)
        found = ctc.beam_search(log_probs, blank=self.labels.end_of_text, width=width, floor=FLOOR, scorer=scorer)
        parts = [(labels, score, *scorer.endings[tuple(labels)]) for labels, score in found]
        return [Hypothesis(labels, score - weights.of(lm, words), lm, words) for labels, score, lm, words in parts]

    def tokens(self, texts: Iterable[str]) -> list[list[int]]:
        """The language model's tokens of each text. Of one that follows another they are the same as within both."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._tokens]:
            self._tokens |= {text: ids.tolist() for text, ids in zip(new, self.tokenizer.encode_batch(new))}
        return [self._tokens[text] for text in texts]


class _Prefix(NamedTuple):
    """What labels have written."""

    text: Text  # as far as the language model has scored it
    word: str = ""  # the word that has begun; "" between words
    words: int = 0  # that have ended
    labels: tuple[int, ...] = ()  # the last ones, which spell a part of a character


class _Scorer(ctc.Scorer):
    """Scores the prefixes of one utterance."""

    def __init__(self, fusion: Fusion, weights: Weights):
        self.fusion, self.weights = fusion, weights
        self.reader = Reader(fusion.model, fusion.tokenizer.end_of_text)
        self.endings: dict[tuple[int, ...], tuple[float, int]] = {}  # labels -> log probability and number of words
        self._prefixes = {0: _Prefix(self.reader.root)}
        self._longer: dict[Text, dict[str, Text]] = {}  # what was scored after each text that is kept

    def begun(self, tree: ctc.Prefixes, beams: Collection[int], prefixes: Collection[int]) -> dict[int, float]:
        self._prefixes = {prefix: self._prefixes[prefix] for prefix in beams}
        kept = dict.fromkeys(prefix.text for prefix in self._prefixes.values())
        self._longer = {text: self._longer.get(text, {}) for text in kept}
        new = [prefix for prefix in prefixes if prefix not in self._prefixes]
        written = [self._continued(self._prefixes[tree.before[prefix]], tree.last[prefix]) for prefix in new]
        self._score([(prefix.text, more) for more, prefix in written if more], kept)
        for number, (more, prefix) in zip(new, written):
            text = self._longer[prefix.text][more] if more else prefix.text
            self._prefixes[number] = prefix._replace(text=text)
        return {number: self._added(self._prefixes[number]) for number in prefixes}

    def ended(self, tree: ctc.Prefixes, prefixes: Collection[int]) -> dict[int, float]:
        whole = [self._whole(self._prefixes[prefix]) for prefix in prefixes]
        tokens = self.fusion.tokens([more for _, more, _ in whole])
        end = self.fusion.tokenizer.end_of_text
        texts = self.reader.extended([(text, [*ids, end]) for (text, _, _), ids in zip(whole, tokens)], ())
        found = [(text.log_prob, words) for text, (_, _, words) in zip(texts, whole)]
        self.endings = {tuple(tree.spelled(prefix)): ending for prefix, ending in zip(prefixes, found)}
        return {prefix: self.weights.of(*ending) for prefix, ending in zip(prefixes, found)}

    def _added(self, prefix: _Prefix) -> float:
        return self.weights.of(prefix.text.log_prob, prefix.words)

    def _score(self, asked: Collection[tuple[Text, str]], kept: Collection[Text]) -> None:
        """Put each text with what comes after it into `_longer`."""
        new = [(text, more) for text, more in dict.fromkeys(asked) if more not in self._longer[text]]
        tokens = self.fusion.tokens([more for _, more in new])
        found = self.reader.extended([(text, ids) for (text, _), ids in zip(new, tokens)], kept)
        for (text, more), longer in zip(new, found):
            self._longer[text][more] = longer

    def _continued(self, prefix: _Prefix, label: int) -> tuple[str, _Prefix]:
        """A prefix with one more label, and what the language model can score now after the prefix's `text`."""
        spelled = self.fusion.spelled[label]
        if prefix.labels or UNKNOWN in spelled:
            labels = (*prefix.labels, label)
            spelled = self.fusion.labels.decode(labels)
            if spelled.endswith(UNKNOWN) and len(labels) < CHARACTER_BYTES:
                return "", prefix._replace(labels=labels)
        more, word, words = "", prefix.word, prefix.words
        for letter in spelled:
            if not letter.isspace():
                more += letter * self.fusion.by_character
                word += letter
            elif word:
                more += " " if self.fusion.by_character else " " * (words > 0) + word
                word, words = "", words + 1
        return more, _Prefix(prefix.text, word, words)

    def _whole(self, prefix: _Prefix) -> tuple[Text, str, int]:
        """Of a text that ends with this prefix: what is scored of it, what is not, and the number of its words."""
        text, word, words = prefix.text, prefix.word, prefix.words
        if word:
            return text, "" if self.fusion.by_character else " " * (words > 0) + word, words + 1
        if words and self.fusion.by_character:  # a space at the end is no part of the text
            assert text.before
            text = text.before
        return text, "", words


def _spelled(labels: Tokenizer) -> list[str]:
    """What each label adds to a text that it does not begin; tokenizers may leave out a space at the beginning."""
    alone, twice = ([labels.decode([label] * times) for label in range(labels.vocab_size)] for times in (1, 2))
    return [both[len(one):] for one, both in zip(alone, twice)]


def _joins_characters(tokenizer: Tokenizer) -> bool:
    """Whether a token may stand for several characters. Special tokens do not count: no text is encoded as these."""
    spelled = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    several = [(token, text) for token, text in enumerate(spelled) if len(text) > 1 and UNKNOWN not in text]
    encoded = tokenizer.encode_batch([text for _, text in several])
    return any(ids.tolist() == [token] for ids, (token, _) in zip(encoded, several))
