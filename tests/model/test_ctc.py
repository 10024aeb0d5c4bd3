"""CTC against the enumeration of all alignments, on cases small enough for that."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from stoker.data.text.labels import aligned_length
from stoker.model import ctc

BLANK = 2
CASES = [(T, V, seed) for T in (1, 2, 4, 6) for V in (3, 4) for seed in (0, 1)]


def some_log_probs(T: int, V: int, seed: int) -> torch.Tensor:
    return (2 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(unit for unit, _ in itertools.groupby(path) if unit != BLANK)


def enumerated(log_probs: torch.Tensor) -> dict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]]:
    """Labels -> (log probability, path) of each of their alignments."""
    found: dict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]] = defaultdict(list)
    T, V = log_probs.shape
    for path in itertools.product(range(V), repeat=T):
        found[collapsed(path)].append((sum(float(log_probs[t, unit]) for t, unit in enumerate(path)), path))
    return found


def total(alignments: list[tuple[float, tuple[int, ...]]]) -> float:
    return math.log(sum(math.exp(score) for score, _ in alignments))


@pytest.mark.parametrize("T, V, seed", CASES)
def test_the_loss_is_that_of_all_alignments(T: int, V: int, seed: int) -> None:
    log_probs = some_log_probs(T, V, seed)
    for labels, alignments in enumerated(log_probs).items():
        if labels:
            loss = ctc.ctc_loss(log_probs[None], torch.tensor([T]), torch.tensor(labels), torch.tensor([len(labels)]),
                                blank=BLANK)
            assert float(loss) == pytest.approx(-total(alignments), rel=1e-4, abs=1e-5), labels


def test_the_losses_of_a_batch_are_those_of_its_rows_and_padding_does_not_count() -> None:
    logits = torch.randn(3, 7, 5)
    lengths, label_lengths = torch.tensor([7, 4, 6]), torch.tensor([3, 1, 2])
    labels = torch.tensor([0, 1, 3, 4, 1, 1])
    whole = ctc.ctc_loss(logits, lengths, labels, label_lengths, blank=BLANK)
    parts, start = [], 0
    for row, (length, size) in enumerate(zip(lengths.tolist(), label_lengths.tolist())):
        parts += ctc.ctc_loss(logits[row:row + 1, :length], lengths[row:row + 1], labels[start:start + size],
                              label_lengths[row:row + 1], blank=BLANK).tolist()
        start += size
    assert whole.tolist() == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("T, V, seed", CASES)
def test_labels_are_feasible_where_there_is_an_alignment(T: int, V: int, seed: int) -> None:
    possible = enumerated(some_log_probs(T, V, seed)).keys()
    units = [unit for unit in range(V) if unit != BLANK]
    for size in range(T + 2):
        for labels in itertools.product(units, repeat=size):
            assert (aligned_length(labels) <= T) == (labels in possible)


def test_the_loss_of_what_is_not_feasible_is_infinite() -> None:
    loss = ctc.ctc_loss(torch.zeros(1, 2, 3), torch.tensor([2]), torch.tensor([0, 0]), torch.tensor([2]), blank=BLANK)
    assert math.isinf(float(loss))


@pytest.mark.parametrize("T, V, seed", CASES)
def test_a_wide_beam_finds_the_likeliest_labels_there_are(T: int, V: int, seed: int) -> None:
    log_probs = some_log_probs(T, V, seed)
    expected = sorted(((total(found), labels) for labels, found in enumerated(log_probs).items()), reverse=True)
    found = ctc.beam_search(log_probs.numpy(), blank=BLANK, width=10**6, candidates=V)
    assert [tuple(labels) for labels, _ in found] == [labels for _, labels in expected]
    assert [score for _, score in found] == pytest.approx([score for score, _ in expected])


def test_a_narrow_beam_is_never_better_and_a_wider_one_is_often() -> None:
    better = 0
    for seed in range(30):
        log_probs = some_log_probs(7, 5, seed).numpy()
        (_, narrow), *_ = ctc.beam_search(log_probs, blank=BLANK, width=1)
        (_, wide), *_ = ctc.beam_search(log_probs, blank=BLANK, width=50)
        assert narrow <= wide + 1e-9
        better += narrow < wide - 1e-9
    assert better > 5


@pytest.mark.parametrize("T, V, seed", CASES)
def test_greedy_is_the_labels_of_the_likeliest_alignment(T: int, V: int, seed: int) -> None:
    log_probs = some_log_probs(T, V, seed)
    best = max(pair for found in enumerated(log_probs).values() for pair in found)
    padded = torch.cat([log_probs, torch.randn(3, V, dtype=torch.float64)])[None]
    assert ctc.greedy(padded, torch.tensor([T]), blank=BLANK) == [list(collapsed(best[1]))]


@pytest.mark.parametrize("T, V, seed", CASES)
def test_an_alignment_is_the_likeliest_of_all(T: int, V: int, seed: int) -> None:
    log_probs = some_log_probs(T, V, seed)
    for labels, alignments in enumerated(log_probs).items():
        spans = ctc.align(log_probs.numpy(), labels, blank=BLANK)
        path = np.full(T, BLANK)
        for span in spans:
            path[span.start:span.end] = span.label
            assert span.confidence == pytest.approx(float(log_probs[span.start:span.end, span.label].exp().mean()))
        assert tuple(path) == max(alignments)[1] and tuple(span.label for span in spans) == labels


def test_labels_that_do_not_fit_cannot_be_aligned() -> None:
    with pytest.raises(ValueError, match="2 labels cannot be aligned with 2 frames"):
        ctc.align(np.zeros((2, 3)), [1, 1], blank=BLANK)


def test_blanks_are_counted_where_frames_count() -> None:
    logits = torch.full((2, 5, 3), -1.0)
    logits[..., 0] = 0
    logits[0, :3, BLANK] = 1
    logits[1, 4, BLANK] = 1
    assert int(ctc.blanks(logits, torch.tensor([5, 4]), blank=BLANK)) == 3


def test_a_long_alignment_is_found_too() -> None:
    labels = [unit % 2 for unit in range(500)]
    log_probs = np.full((1500, 3), -9.0)
    log_probs[np.arange(1500), np.ravel([[BLANK, label, label] for label in labels])] = -0.001
    spans = ctc.align(log_probs, labels, blank=BLANK)
    assert [(span.start, span.end) for span in spans] == [(3 * i + 1, 3 * i + 3) for i in range(500)]
    assert ctc.beam_search(log_probs, blank=BLANK, width=4)[0][0] == labels


@pytest.mark.parametrize("T, V, seed", CASES)
def test_prefix_scores_are_sums_over_all_alignments_of_all_texts(T: int, V: int, seed: int) -> None:
    """Beside a longer line; each text goes on in all ways, among them those for which no room is left."""
    log_probs = some_log_probs(T, V, seed)
    both = torch.stack([torch.cat([log_probs, torch.full((2, V), 3.0)]), some_log_probs(T + 2, V, 9)])
    scores = ctc.PrefixScores(both, torch.tensor([T, T + 2]), blank=BLANK)
    units = [unit for unit in range(V) if unit != BLANK]
    odds = {labels: math.exp(total(found)) for labels, found in enumerated(log_probs).items()}

    def beginning(text: tuple[int, ...]) -> float:
        return sum(likely for labels, likely in odds.items() if labels[:len(text)] == text)

    texts: list[tuple[int, ...]] = [()]
    following = scores.following(torch.full((2,), BLANK))
    for _ in range(min(T, 3) + 1):
        for text, found in zip(texts, following):  # the rows of the first line come first
            expected = [beginning((*text, unit)) for unit in range(V)]
            expected[BLANK] = odds.get(text, 0.0)
            so_far = beginning(text)
            assert sum(expected) == pytest.approx(so_far)
            assert found.exp().tolist() == pytest.approx([each / so_far if so_far else 0.0 for each in expected],
                                                         abs=1e-6), text
        rows = torch.arange(2 * len(texts)).repeat_interleave(len(units))
        scores.select(rows)
        texts = [(*text, unit) for text in texts for unit in units]
        following = scores.following(torch.tensor(units).repeat(len(rows) // len(units)))


def test_a_text_that_has_ended_stays_as_it_is() -> None:
    logits = torch.randn(2, 6, 4)
    scores = ctc.PrefixScores(logits, torch.tensor([6, 4]), blank=BLANK)
    scores.following(torch.tensor([BLANK, BLANK]))
    before = scores.following(torch.tensor([1, 3]))
    assert torch.equal(scores.following(torch.tensor([BLANK, BLANK])), before)
    assert not torch.equal(scores.following(torch.tensor([BLANK, 0]))[1], before[1])


def test_lines_of_thousands_of_frames_are_scored_too() -> None:
    """Where the probabilities of whole texts are far below the smallest number there is."""
    logits = 5 * torch.randn(1, 3000, 40)
    scores = ctc.PrefixScores(logits, torch.tensor([3000]), blank=BLANK)
    tokens, so_far = torch.tensor([BLANK]), 0.0
    labels = [unit for unit in torch.randint(40, (200,)).tolist() if unit != BLANK]
    for unit in labels:
        so_far += float(scores.following(tokens)[0, unit])
        tokens = torch.tensor([unit])
    so_far += float(scores.following(tokens)[0, BLANK])
    loss = ctc.ctc_loss(logits.double(), torch.tensor([3000]), torch.tensor(labels), torch.tensor([len(labels)]),
                        blank=BLANK)
    assert so_far == pytest.approx(-float(loss), rel=1e-4)
