"""Shallow fusion against the enumeration of all texts, and the language model's scores against the model itself."""

import itertools
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from stoker.config import UserError
from stoker.data.text.labels import open_labels
from stoker.data.text.spelling import spelled
from stoker.data.text.tokenizers import Bytes, open_tokenizer
from stoker.model import ctc, fusion
from stoker.model.fusion import Fusion, Weights, Writer
from stoker.model.gpt import GPT
from stoker.model.text_reader import Reader, Text, _tokens
from stoker.model.thinker import Thinker

SIZES: dict[str, Any] = dict(d_model=16, num_heads=2, num_layers=2, d_ff=32)
WORDS = "the cat sat on that mat; a cat ate the oat that the hat had. "


def language_model(vocab_size: int, kind: str = "gpt", context: int = 64) -> Any:
    """With weights that make some texts far likelier than others."""
    torch.manual_seed(0)
    model = (GPT(vocab_size, **SIZES, max_seq_len=context) if kind == "gpt" else
             Thinker(vocab_size, **SIZES, num_kv_heads=1, max_seq_len=context))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def of_tokens(model: Any, tokens: list[int]) -> float:
    """log p of all tokens but the first, by one forward pass."""
    if len(tokens) == 1:
        return 0.0
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens[:-1]])).log_softmax(-1)[0]
    return float(sum(log_probs[place, token] for place, token in enumerate(tokens[1:])))


def of_text(model: Any, tokens: list[bytes], end: int, text: str) -> float:
    """log p of a whole document: the sum over all ways to cut it into tokens, each by forward passes of its own."""
    places: dict[int, list[list[int]]] = {0: [[end]]}
    spelled = " ".join(text.split()).encode()
    for place in range(len(spelled)):
        for token, part in enumerate(tokens):
            if part and token != end and spelled.startswith(part, place):
                places.setdefault(place + len(part), []).extend([*way, token] for way in places.get(place, []))
    return float(np.logaddexp.reduce([of_tokens(model, [*way, end]) for way in places[len(spelled)]]))


def fused(labels: Any, model: Any, tokenizer: Any) -> Fusion:
    return Fusion(spelled(labels), labels.end_of_text, model, spelled(tokenizer), tokenizer.end_of_text)


def bpe(size: int = 270) -> Any:
    return open_tokenizer("bpe", size, [WORDS * 20])


def some_log_probs(frames: int, labels: Any, used: list[int], seed: int) -> np.ndarray:
    """(F, L): only the labels of `used`, and the blank, are possible."""
    draw, found = np.random.default_rng(seed), np.full((frames, labels.vocab_size), -math.inf)
    for frame in found:
        likely = 2 * draw.standard_normal(len(used) + 1)
        frame[[*used, labels.end_of_text]] = likely - np.log(np.exp(likely).sum())
    return found


def everything(log_probs: np.ndarray, labels: Any) -> dict[tuple[int, ...], float]:
    """All sequences of labels, and log of the sum over their alignments."""
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    possible = [np.flatnonzero(np.isfinite(frame)).tolist() for frame in log_probs]
    for path in itertools.product(*possible):
        spelled = tuple(label for label, _ in itertools.groupby(path) if label != labels.end_of_text)
        found[spelled].append(sum(frame[label] for frame, label in zip(log_probs, path)))
    return {spelled: float(np.logaddexp.reduce(each)) for spelled, each in found.items()}


def chars() -> tuple[Any, list[int]]:
    labels = open_labels("chars", 0, ["at "])
    return labels, [0, 1, 2]


def joined() -> tuple[Any, list[int]]:
    """Labels of several characters, with a space before or not, and of half a character."""
    labels = bpe()
    return labels, [*(labels.encode_batch([text])[0].tolist()[0] for text in (" the", "at")), *labels.encode_batch(
        ["\u00fc"])[0].tolist()]


@pytest.mark.parametrize("kind", ["gpt", "thinker"])
@pytest.mark.parametrize("tokenizer", [Bytes, bpe])
@pytest.mark.parametrize("made", [chars, joined])
def test_a_wide_beam_finds_the_best_of_all_texts(made: Any, tokenizer: Any, kind: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the score that the formula gives."""
    monkeypatch.setattr(fusion, "FLOOR", -math.inf)
    monkeypatch.setattr(fusion, "NEGLIGIBLE", -math.inf)
    (labels, used), written, weights = made(), tokenizer(), Weights(0.7, 1.5)
    model, tokens = language_model(written.vocab_size, kind), spelled(written)
    log_probs = some_log_probs(5 if made is chars else 4, labels, used, 0)
    expected: dict[tuple[int, ...], tuple[float, float, int]] = {}
    for sequence, likely in everything(log_probs, labels).items():
        text = labels.decode(list(sequence))
        if "\ufffd" not in text:  # else bytes that are no text
            expected[sequence] = likely, of_text(model, tokens, written.end_of_text, text), len(text.split())
    found = [each for each in fused(labels, model, written).search(log_probs, weights, 10**6)
             if tuple(each.labels) in expected]
    assert len(found) == len(expected) >= (50 if made is chars else 15)
    for each in found:
        assert (each.ctc, each.lm, each.words) == pytest.approx(expected[tuple(each.labels)], abs=2e-3), each
    scores = [each.ctc + weights.of(each.lm, each.words) for each in found]
    assert scores == sorted(scores, reverse=True)


def test_without_weight_it_is_the_search_without_a_language_model() -> None:
    (labels, used), tokenizer = chars(), Bytes()
    log_probs = some_log_probs(30, labels, used, 0)
    found = fused(labels, language_model(257), tokenizer).search(log_probs, Weights(0.0, 0.0), 5)
    alone = ctc.beam_search(log_probs, blank=labels.end_of_text, width=5, floor=fusion.FLOOR)
    assert [(each.labels, each.ctc) for each in found] == alone


def test_what_is_unlikely_in_a_frame_is_not_tried() -> None:
    log_probs = np.log(np.array([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]]))
    assert {tuple(labels) for labels, _ in ctc.beam_search(log_probs, blank=2, floor=math.log(0.2))} == {
        (), (0,), (1,), (0, 1), (1, 0)} - {(0, 1)}


@pytest.mark.parametrize("context, length", [(64, 40), (8, 40), (2, 9), (5, 23)])
@pytest.mark.parametrize("kind", ["gpt", "thinker"])
def test_what_comes_next_follows_from_what_is_before(kind: str, context: int, length: int) -> None:
    """From all of it, or where the context is full from at least half of it; whatever is read together."""
    model, draw = language_model(30, kind, context), np.random.default_rng(0)
    reader = Reader(model, 29)
    known = [reader.root]
    for _ in range(length):  # a tree grows, at several branches at once, by one to three tokens
        asked = list[Text]()
        for _ in range(3):
            asked.append(known[draw.integers(len(known))])
            for token in draw.integers(29, size=draw.integers(1, 4)).tolist():
                asked.append(Text(asked[-1], token))
        reader.read(asked, known)
        for text in asked:
            tokens, first = _tokens(text, 0), reader.first(text.length)
            assert len(tokens) == text.length and (first == 0 if text.length <= context else
                                                   context - max(1, context // 2) < text.length - first <= context)
            with torch.no_grad():
                expected = model(torch.tensor([tokens[first:]])).log_softmax(-1)[0, -1]
            torch.testing.assert_close(torch.from_numpy(reader.following[text]), expected, atol=1e-3, rtol=1e-3)
        known = [*known[-3:], *asked[-3:]]
    assert max(text.length for text in known) > context or context == 64


@pytest.mark.parametrize("tokenizer", [Bytes, bpe])
def test_what_may_follow_a_text_adds_up_to_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that begins with a text ends there or goes on with one of 256 bytes."""
    monkeypatch.setattr(fusion, "NEGLIGIBLE", -math.inf)
    written = tokenizer()
    model = language_model(written.vocab_size)
    writer = Writer(fused(chars()[0], model, written))
    writing = writer.empty
    for byte in b"the cat \xc3\xbc":
        writer.write([(writing, byte)], [])
        writing = writing.longer[byte]
        writer.write([(writing, each) for each in range(256)], [])
        parts = [each.log_prob for each in writing.longer.values()] + writer.whole([writing])
        assert len(parts) == 257 and np.logaddexp.reduce(parts) == pytest.approx(writing.log_prob, abs=1e-3)


def test_ways_that_hardly_count_are_dropped() -> None:
    """And the rest is almost all: without them a language model of words is as slow as there are ways to cut a text."""
    written = bpe()
    model = language_model(written.vocab_size)
    few = {}
    for negligible in (math.log(1e-3), -math.inf):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fusion, "NEGLIGIBLE", negligible)
            writer = Writer(fused(chars()[0], model, written))
            writing = writer.empty
            for byte in b"the cat ate":
                writer.write([(writing, byte)], [])
                writing = writing.longer[byte]
            few[negligible] = len(writing.ways), writer.whole([writing])[0]
    (some, near), (every, exact) = few.values()
    assert some < every / 2 and near == pytest.approx(exact, abs=0.05) and near < exact


def test_anything_can_be_written_though_only_the_likeliest_ways_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tokens that spell it; and bytes that are no text in any case, at a price."""
    monkeypatch.setattr(fusion, "NEGLIGIBLE", 0.0)
    written = bpe()
    writer = Writer(fused(chars()[0], language_model(written.vocab_size), written))
    writing, text = writer.empty, b"the that cat zq \xe6\x9d\xb1" + np.random.default_rng(0).bytes(20)
    for byte in text:
        writer.write([(writing, byte)], [])
        writing = writing.longer[byte]
        assert len(writing.ways) <= 2
    tokens = _tokens(next(way.text for way in writing.ways if not way.rest), 1)
    assert b"".join(spelled(written)[token] for token in tokens) == text
    letters = open_labels("chars", 0, ["\u00e4\u00f6"])
    writer = Writer(fused(letters, language_model(letters.vocab_size), letters))
    writer.write([(writer.empty, 0xc3)], [])
    half = writer.empty.longer[0xc3]
    writer.write([(half, 0xc3)], [half])
    assert half.longer[0xc3].log_prob == half.log_prob + fusion.STRANGE
    assert writer.whole([half]) == [half.log_prob + fusion.STRANGE]


def test_the_precision_of_an_evaluation_is_not_that_of_the_language_model() -> None:
    model = language_model(30)
    with torch.no_grad():
        expected = model(torch.tensor([[29, 3]])).log_softmax(-1)[0, -1]
    reader = Reader(model, 29)
    text = Text(reader.root, 3)
    with torch.autocast("cpu", torch.bfloat16):
        reader.read([text], [])
    torch.testing.assert_close(torch.from_numpy(reader.following[text]), expected, atol=1e-4, rtol=0)


def test_characters_that_the_language_model_lacks_are_named() -> None:
    with pytest.raises(UserError, match="the language model cannot write 'b', which the recognizer can"):
        fused(open_labels("chars", 0, ["ab "]), language_model(4), chars()[0])
