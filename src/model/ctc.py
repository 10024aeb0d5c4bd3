"""Connectionist temporal classification (Graves et al. 2006): the loss, what was said, and when.

Axes: B batch, T frames, V units, one of them the blank; L labels of an utterance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.transformer import valid_places

IMPOSSIBLE = -math.inf


def ctc_loss(logits: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor, *, blank: int) -> Tensor:
    """-log of the probability of all alignments of each utterance (B,): infinite where there is none.

    Logits (B, T, V), how many frames count (B,), labels one utterance after the other (sum of L,), how many each (B,).
    Computed on the CPU: CUDA has no repeatable gradient for it, and there it takes a small part of a step.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1).cpu()  # (T, B, V)
    loss = F.ctc_loss(log_probs, labels.cpu(), lengths.cpu(), label_lengths.cpu(), blank=blank, reduction="none")
    return loss.to(logits.device)


def needed_frames(labels: Sequence[int]) -> int:
    """The fewest frames in which labels can be said: one each, and a blank between two that are the same."""
    return len(labels) + sum(a == b for a, b in zip(labels, labels[1:]))


def blanks(logits: Tensor, lengths: Tensor, *, blank: int) -> Tensor:
    """In how many of the frames that count the blank is likeliest."""
    return ((logits.argmax(-1) == blank) & valid_places(lengths, logits.shape[1])).sum()


def greedy(logits: Tensor, lengths: Tensor, *, blank: int) -> list[list[int]]:
    """The labels of the likeliest alignment of each utterance: (B, T, V), (B,) -> B times L."""
    best = logits.argmax(-1).cpu()
    rows = (torch.unique_consecutive(row[:length]).tolist() for row, length in zip(best, lengths.tolist()))
    return [[unit for unit in row if unit != blank] for row in rows]


def beam_search(log_probs: np.ndarray, *, blank: int, width: int = 16,
                candidates: int = 16) -> list[tuple[list[int], float]]:
    """The likeliest labels of one utterance, (T, V) -> up to `width` pairs of labels and their log probability.

    Prefix beam search (Hannun et al. 2014, arXiv:1408.2873), without a language model: all alignments of the same
    labels count together. `width` prefixes are kept at each frame, the `candidates` likeliest units may follow them.
    With both large enough it is exact.
    """
    tree, beams = _Prefixes(), {0: (0.0, IMPOSSIBLE)}
    for frame in log_probs:
        scores = frame.tolist()
        units = [unit for unit in np.argsort(-frame, kind="stable")[:candidates].tolist() if unit != blank]
        beams = dict(sorted(_extended(tree, beams, scores, units, blank).items(), key=_likelihood)[:width])
    return [(tree.spelled(prefix), _sum(*ends)) for prefix, ends in beams.items()]


class _Prefixes:
    """Label sequences as numbers, 0 the empty one: a longer one costs no more to keep than a short one."""

    def __init__(self) -> None:
        self.last = [-1]
        self._before = [-1]
        self._longer: dict[tuple[int, int], int] = {}

    def longer(self, prefix: int, unit: int) -> int:
        """A prefix and one more unit."""
        known = self._longer.setdefault((prefix, unit), len(self.last))
        if known == len(self.last):
            self.last.append(unit)
            self._before.append(prefix)
        return known

    def spelled(self, prefix: int) -> list[int]:
        units = []
        while prefix:
            units.append(self.last[prefix])
            prefix = self._before[prefix]
        return units[::-1]


def _extended(tree: _Prefixes, beams: dict[int, tuple[float, float]], scores: list[float], units: list[int],
              blank: int) -> dict[int, tuple[float, float]]:
    """Each prefix one frame on. Kept apart is how likely it ends in a blank, and in its last unit."""
    following: dict[int, tuple[float, float]] = {}
    for prefix, (in_blank, in_unit) in beams.items():
        either, last = _sum(in_blank, in_unit), tree.last[prefix]
        blank_before, unit_before = following.get(prefix, (IMPOSSIBLE, IMPOSSIBLE))
        stays = in_unit + scores[last] if prefix else IMPOSSIBLE
        following[prefix] = _sum(blank_before, either + scores[blank]), _sum(unit_before, stays)
        for unit in units:
            before = in_blank if unit == last else either
            if before == IMPOSSIBLE:  # twice the same, and no blank between
                continue
            longer = tree.longer(prefix, unit)
            blank_before, unit_before = following.get(longer, (IMPOSSIBLE, IMPOSSIBLE))
            following[longer] = blank_before, _sum(unit_before, before + scores[unit])
    return following


def _likelihood(beam: tuple[int, tuple[float, float]]) -> float:
    return -_sum(*beam[1])


def _sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == IMPOSSIBLE else a + math.log1p(math.exp(b - a))


@dataclass(frozen=True)
class Span:
    """Where a label stands in the likeliest alignment: frames `start` to `end` - 1, and its mean probability there."""

    label: int
    start: int
    end: int
    confidence: float


def align(log_probs: np.ndarray, labels: Sequence[int], *, blank: int) -> list[Span]:
    """The likeliest alignment of labels with the frames of one utterance (T, V), by Viterbi's algorithm.

    Raises ValueError where there are too few frames for them.
    """
    if len(log_probs) < needed_frames(labels):
        raise ValueError(f"{len(labels)} labels need {needed_frames(labels)} frames, there are {len(log_probs)}")
    states = _likeliest_states(log_probs, labels, blank)
    spans = []
    for place, label in enumerate(labels):
        frames = np.flatnonzero(states == 2 * place + 1)
        start, end = int(frames[0]), int(frames[-1]) + 1
        spans.append(Span(label, start, end, float(np.exp(log_probs[start:end, label]).mean())))
    return spans


def _likeliest_states(log_probs: np.ndarray, labels: Sequence[int], blank: int) -> np.ndarray:
    """(T,): which of the 2 L + 1 states each frame is in. Label i is state 2 i + 1, blanks stand around the labels."""
    units = np.full(2 * len(labels) + 1, blank)
    units[1::2] = labels
    skips = np.zeros(len(units), dtype=bool)  # whether a state may follow the one before the last: no blank needed
    skips[2:] = (units[2:] != blank) & (units[2:] != units[:-2])
    score = np.full(len(units), IMPOSSIBLE)
    score[0] = 0.0  # before the first frame: only the first blank and the first label can follow
    steps = np.zeros((len(log_probs), len(units)), dtype=np.int8)
    for t, frame in enumerate(log_probs):
        one, two = np.roll(score, 1), np.roll(score, 2)
        one[0] = IMPOSSIBLE
        two[~skips] = IMPOSSIBLE
        before = np.stack([score, one, two])
        steps[t] = before.argmax(0)
        score = before.max(0) + frame[units]
    states = np.empty(len(log_probs), dtype=int)
    state = len(units) - 1 if not labels or score[-1] >= score[-2] else len(units) - 2
    for t in range(len(log_probs) - 1, -1, -1):
        states[t] = state
        state -= int(steps[t, state])
    return states
