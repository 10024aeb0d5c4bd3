"""A language model in the beam search of a CTC head: shallow fusion (Hannun et al. 2014, arXiv:1408.2873).

    score of a text = log p_ctc + weight * log p_lm + bonus * words

While a text is being written, p_lm is the probability that a document begins with it: the sum over all ways to write
it in tokens (Vieira et al. 2024, arXiv:2412.03719). So each letter is scored at once, although a token may be a word.

Axes: F frames, L labels, V vocabulary of the language model.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stoker.config import UserError
from stoker.model import ctc
from stoker.model.decoding import Decoder
from stoker.model.text_reader import Reader, Text

FLOOR = -12.0  # log probability of a label in a frame; with less it is not tried, whatever the language model expects
STRANGE = -20.0  # what a byte adds that makes no text with those before it
NEGLIGIBLE = math.log(1e-3)  # a way to write a text that has less than this share of its probability is dropped
SPACE = b" "


@dataclass(frozen=True)
class Weights:
    """How much the language model counts, and what each word adds, since every word makes a text less likely."""

    weight: float
    bonus: float

    def __str__(self) -> str:
        """The options that set them."""
        return f"--lm_weight {self.weight:g} --lm_bonus {self.bonus:g}"

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

    The language model scores words with single spaces between them, the end of a text before and after.
    """

    def __init__(self, labels: Sequence[bytes], blank: int, model: Decoder, tokens: Sequence[bytes], end_of_text: int):
        """`labels` and `tokens`: what each label of the CTC head and each token of the language model spells, see
        `data.text.spelling`. Raises UserError where the language model cannot write what a label spells."""
        self.labels, self.blank, self.model, self.end_of_text = labels, blank, model, end_of_text
        self.vocabulary = Vocabulary(tokens, end_of_text)
        spelled = b"".join(each for label, each in enumerate(labels) if label != blank)
        if missing := self.vocabulary.missing(spelled.decode(errors="ignore")):
            raise UserError(f"the language model cannot write {missing!r}, which the recognizer can: name another one")

    def search(self, log_probs: np.ndarray, weights: Weights, width: int) -> list[Hypothesis]:
        """What may be said in an utterance (F, L), up to `width` texts, the best first."""
        scorer = _Scorer(self, weights)
        found = ctc.beam_search(log_probs, blank=self.blank, width=width, floor=FLOOR, scorer=scorer)
        parts = [(labels, score, *scorer.endings[tuple(labels)]) for labels, score in found]
        return [Hypothesis(labels, score - weights.of(lm, words), lm, words) for labels, score, lm, words in parts]


# -- the probability of a text, whatever its tokens -----------------------------------------------------------------


class Vocabulary:
    """The tokens of a language model in the order of what they spell, so that those that begin alike are adjacent."""

    def __init__(self, tokens: Sequence[bytes], end_of_text: int):
        used = [token for token, spelled in enumerate(tokens) if spelled and token != end_of_text]
        self.order = np.array(sorted(used, key=lambda token: tokens[token]))
        self.spans: dict[bytes, tuple[int, int, int]] = {}  # beginning -> first, first that is longer, end
        for place, token in enumerate(self.order.tolist()):
            spelled = tokens[token]
            for size in range(1, len(spelled) + 1):
                first, longer, _ = self.spans.get(spelled[:size], (place, place, place))
                self.spans[spelled[:size]] = first, longer + (size == len(spelled)), place + 1

    def missing(self, text: str) -> str:
        """Characters that no tokens spell."""
        return "".join(letter for letter in sorted(set(text)) if not all(
            self._is_token(part) for part in ([letter.encode()] if self._is_token(letter.encode())
                                              else [bytes([byte]) for byte in letter.encode()])))

    def _is_token(self, spelled: bytes) -> bool:
        first, longer, _ = self.spans.get(spelled, (0, 0, 0))
        return longer > first


class Way(NamedTuple):
    """A way to write a text: whole tokens, and the beginning of one more."""

    text: Text
    rest: bytes
    log_prob: float


class Writing:
    """A text, in the ways in which it may be written."""

    __slots__ = ("ways", "log_prob", "longer")

    def __init__(self, ways: Sequence[Way]):
        self.ways = ways
        self.log_prob = _log_sum([way.log_prob for way in ways])  # that a document begins with it
        self.longer: dict[int, Writing] = {}  # by the next byte, those that were asked for


class Writer:
    """Writes texts byte by byte."""

    def __init__(self, fusion: Fusion):
        self.vocabulary = fusion.vocabulary
        self.reader = Reader(fusion.model, fusion.end_of_text)
        self.empty = Writing([Way(self.reader.root, b"", 0.0)])
        self._sums: dict[Text, np.ndarray] = {}  # (V,): of the probabilities of the next token, in the order of `order`

    def write(self, asked: Sequence[tuple[Writing, int]], kept: Collection[Writing]) -> None:
        """Put each writing with one more byte into its `longer`. `kept`: those that later ones begin with."""
        new = [(writing, byte) for writing, byte in dict.fromkeys(asked) if byte not in writing.longer]
        self._read([writing for writing, _ in new], kept)
        for writing, byte in new:
            writing.longer[byte] = Writing([*self._likely(writing, bytes([byte]))])

    def whole(self, writings: Sequence[Writing]) -> list[float]:
        """log of the probability of each as a whole document."""
        self._read(writings, ())
        end = self.reader.root.token
        return [_log_sum([way.log_prob + float(self.reader.following[way.text][end]) for way in writing.ways
                          if not way.rest] or [writing.log_prob + STRANGE]) for writing in writings]

    def _read(self, asked: Collection[Writing], kept: Collection[Writing]) -> None:
        self.reader.read([way.text for writing in asked for way in writing.ways],
                         [way.text for writing in kept for way in writing.ways])
        self._sums = {text: self._sums[text] if text in self._sums else self._summed(log_probs)
                      for text, log_probs in self.reader.following.items()}

    def _summed(self, log_probs: np.ndarray) -> np.ndarray:
        sums: np.ndarray = np.exp(log_probs[self.vocabulary.order], dtype=np.float64).cumsum()
        return sums

    def _likely(self, writing: Writing, byte: bytes) -> list[Way]:
        """The ways to write one more byte, but for those that hardly add to the probability. The likeliest one in whole
        tokens stays in any case, since anything may follow it."""
        ways = [way for before in writing.ways for way in self._longer(before, byte)]
        if not ways:
            likeliest, log_prob = max(writing.ways, key=lambda way: way.log_prob).text, writing.log_prob + STRANGE
            return [Way(Text(likeliest, self.reader.root.token, log_prob), b"", log_prob)]
        least = max(way.log_prob for way in ways) + NEGLIGIBLE
        whole = max((way for way in ways if not way.rest), key=lambda way: way.log_prob, default=None)
        return [way for way in ways if way.log_prob >= least or way is whole]

    def _longer(self, way: Way, byte: bytes) -> Iterator[Way]:
        """The ways to write one more byte that begin with this one."""
        rest = way.rest + byte
        first, longer, end = self.vocabulary.spans.get(rest, (0, 0, 0))
        following, sums = self.reader.following[way.text], self._sums[way.text]
        for token in self.vocabulary.order[first:longer].tolist():
            log_prob = way.text.log_prob + float(following[token])
            yield Way(Text(way.text, token, log_prob), b"", log_prob)
        if end > longer:
            share = float(sums[end - 1] - (sums[longer - 1] if longer else 0.0))
            if share > 0:
                yield Way(way.text, rest, way.text.log_prob + math.log(share))


def _log_sum(log_probs: Sequence[float]) -> float:
    top = max(log_probs)
    return top + math.log(sum(math.exp(each - top) for each in log_probs))


# -- the search -----------------------------------------------------------------------------------------------------


class _Prefix(NamedTuple):
    """What labels have written."""

    written: Writing
    whole: Writing  # without a space at the end
    words: int = 0  # that have ended


class _Scorer(ctc.Scorer):
    """Scores the prefixes of one utterance."""

    def __init__(self, fusion: Fusion, weights: Weights):
        self.fusion, self.weights, self.writer = fusion, weights, Writer(fusion)
        self.endings: dict[tuple[int, ...], tuple[float, int]] = {}  # labels -> log probability and number of words
        self._prefixes = {0: _Prefix(self.writer.empty, self.writer.empty)}

    def begun(self, tree: ctc.Prefixes, beams: Collection[int], prefixes: Collection[int]) -> dict[int, float]:
        self._prefixes = {prefix: self._prefixes[prefix] for prefix in beams}
        new = {prefix: self._prefixes[tree.before[prefix]] for prefix in prefixes if prefix not in self._prefixes}
        spelled = {prefix: self.fusion.labels[tree.last[prefix]] for prefix in new}
        for place in range(max(map(len, spelled.values()), default=0)):
            bytes_here = {prefix: each[place:place + 1] for prefix, each in spelled.items() if place < len(each)}
            new |= self._written({prefix: (new[prefix], byte) for prefix, byte in bytes_here.items()})
        self._prefixes |= new
        return {prefix: self._added(self._prefixes[prefix]) for prefix in prefixes}

    def ended(self, tree: ctc.Prefixes, prefixes: Collection[int]) -> dict[int, float]:
        known = [self._prefixes[prefix] for prefix in prefixes]
        log_probs = self.writer.whole([each.whole for each in known])
        found = {prefix: (log_prob, each.words + (each.written is each.whole and each.written is not self.writer.empty))
                 for prefix, each, log_prob in zip(prefixes, known, log_probs)}
        self.endings = {tuple(tree.spelled(prefix)): ending for prefix, ending in found.items()}
        return {prefix: self.weights.of(*ending) for prefix, ending in found.items()}

    def _added(self, prefix: _Prefix) -> float:
        return self.weights.of(prefix.written.log_prob, prefix.words)

    def _written(self, asked: dict[int, tuple[_Prefix, bytes]]) -> dict[int, _Prefix]:
        """Prefixes with one more byte. Of several spaces one is written, none at the beginning."""
        asked = {number: (prefix, byte) for number, (prefix, byte) in asked.items()
                 if not byte.isspace() or (prefix.written is prefix.whole and prefix.written is not self.writer.empty)}
        pairs = {number: (prefix.written, ord(SPACE if byte.isspace() else byte))
                 for number, (prefix, byte) in asked.items()}
        kept = dict.fromkeys(each for prefix in self._prefixes.values() for each in (prefix.written, prefix.whole))
        self.writer.write([*pairs.values()], kept)
        found = {}
        for number, (prefix, byte) in asked.items():
            before, following = pairs[number]
            longer = before.longer[following]
            found[number] = (_Prefix(longer, before, prefix.words + 1) if byte.isspace()
                             else _Prefix(longer, longer, prefix.words))
        return found
