"""Connectionist temporal classification (Graves et al. 2006): the loss, what was said, when, and what may come next.

Axes: B batch, T frames, V labels, one of them the blank; L labels of an utterance.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stoker.model.transformer import valid_places

IMPOSSIBLE = -math.inf


def ctc_loss(logits: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor, *, blank: int) -> Tensor:
    """-log of the probability of all alignments of each utterance (B,): infinite where there is none.

    Logits (B, T, V), how many frames count (B,), labels one utterance after the other (sum of L,), how many each (B,).
    Computed on the CPU: CUDA has no repeatable gradient for it, and there it takes a small part of a step.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1).cpu()  # (T, B, V)
    loss = F.ctc_loss(log_probs, labels.cpu(), lengths.cpu(), label_lengths.cpu(), blank=blank, reduction="none")
    return loss.to(logits.device)


def consistency_loss(first: Tensor, second: Tensor, lengths: Tensor) -> Tensor:
    """How far the predictions of two views of the same utterances are apart (), in the sum over all frames that count:
    the mean of the Kullback-Leibler divergences of each from the other, of which the latter is a target without a
    gradient (CR-CTC: Yao et al. 2024, arXiv:2410.05101, equation 5). Logits (B, T, V) each, lengths (B,)."""
    one, other = first.float().log_softmax(-1), second.float().log_softmax(-1)
    distances = (F.kl_div(one, other.detach(), log_target=True, reduction="none")
                 + F.kl_div(other, one.detach(), log_target=True, reduction="none")).sum(2)
    return distances.masked_fill(~valid_places(lengths, first.shape[1]), 0).sum() / 2


def blanks(logits: Tensor, lengths: Tensor, *, blank: int) -> Tensor:
    """In how many of the frames that count the blank is likeliest."""
    return ((logits.argmax(-1) == blank) & valid_places(lengths, logits.shape[1])).sum()


def greedy(logits: Tensor, lengths: Tensor, *, blank: int) -> list[list[int]]:
    """The labels of the likeliest alignment of each utterance: (B, T, V), (B,) -> B times L."""
    best = logits.argmax(-1).cpu()
    rows = (torch.unique_consecutive(row[:length]).tolist() for row, length in zip(best, lengths.tolist()))
    return [[label for label in row if label != blank] for row in rows]


class Scorer(Protocol):
    """What another model, such as a language model, adds to the log probabilities of prefixes in a beam search."""

    def begun(self, tree: "Prefixes", beams: Collection[int], prefixes: Collection[int]) -> Mapping[int, float]:
        """What to add to each of `prefixes`, after which more may come. Each is one of `beams` or one label longer than
        one of these, which are the prefixes that the frame before has left."""

    def ended(self, tree: "Prefixes", prefixes: Collection[int]) -> Mapping[int, float]:
        """What to add to each of `prefixes` if nothing comes after it."""


def beam_search(log_probs: np.ndarray, *, blank: int, width: int = 16, candidates: int = 16, floor: float = IMPOSSIBLE,
                scorer: Scorer | None = None) -> list[tuple[list[int], float]]:
    """The likeliest labels of one utterance, (T, V) -> up to `width` pairs of labels and their score: their log
    probability, and what the scorer adds to it.

    Prefix beam search (Hannun et al. 2014, arXiv:1408.2873): all alignments of the same labels count together. `width`
    prefixes are kept at each frame, the `candidates` likeliest labels may follow them, unless their log probability in
    this frame is below `floor`. With both large enough it is exact.
    """
    tree, beams = Prefixes(), {0: (0.0, IMPOSSIBLE)}
    for frame in log_probs:
        scores = frame.tolist()
        labels = [label for label in np.argsort(-frame, kind="stable")[:candidates].tolist()
                  if label != blank and scores[label] >= floor]
        found = _extended(tree, beams, scores, labels, blank)
        added = scorer.begun(tree, beams, found) if scorer else {}
        beams = {prefix: found[prefix] for prefix in _ranked(found, added)[:width]}
    added = scorer.ended(tree, beams) if scorer else {}
    return [(tree.spelled(prefix), _sum(*beams[prefix]) + added.get(prefix, 0.0)) for prefix in _ranked(beams, added)]


class Prefixes:
    """Label sequences as numbers, 0 the empty one: a longer one costs no more to keep than a short one."""

    def __init__(self) -> None:
        self.last = [-1]  # the last label of each
        self.before = [-1]  # each without its last label
        self._longer: dict[tuple[int, int], int] = {}

    def longer(self, prefix: int, label: int) -> int:
        """A prefix and one more label."""
        known = self._longer.setdefault((prefix, label), len(self.last))
        if known == len(self.last):
            self.last.append(label)
            self.before.append(prefix)
        return known

    def spelled(self, prefix: int) -> list[int]:
        labels = []
        while prefix:
            labels.append(self.last[prefix])
            prefix = self.before[prefix]
        return labels[::-1]


def _extended(tree: Prefixes, beams: dict[int, tuple[float, float]], scores: list[float], labels: list[int],
              blank: int) -> dict[int, tuple[float, float]]:
    """Each prefix one frame on. Kept apart is how likely it ends in a blank, and in its last label."""
    following: dict[int, tuple[float, float]] = {}
    for prefix, (in_blank, in_label) in beams.items():
        either, last = _sum(in_blank, in_label), tree.last[prefix]
        blank_before, label_before = following.get(prefix, (IMPOSSIBLE, IMPOSSIBLE))
        stays = in_label + scores[last] if prefix else IMPOSSIBLE
        following[prefix] = _sum(blank_before, either + scores[blank]), _sum(label_before, stays)
        for label in labels:
            before = in_blank if label == last else either
            if before == IMPOSSIBLE:  # twice the same, and no blank between
                continue
            longer = tree.longer(prefix, label)
            blank_before, label_before = following.get(longer, (IMPOSSIBLE, IMPOSSIBLE))
            following[longer] = blank_before, _sum(label_before, before + scores[label])
    return following


def _ranked(beams: Mapping[int, tuple[float, float]], added: Mapping[int, float]) -> list[int]:
    """The prefixes, the best first."""
    return sorted(beams, key=lambda prefix: -(_sum(*beams[prefix]) + added.get(prefix, 0.0)))


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
    states, score = _likeliest_states(log_probs[None], [len(log_probs)], [labels], blank)
    if score[0] == IMPOSSIBLE:
        raise ValueError(f"{len(labels)} labels cannot be aligned with {len(log_probs)} frames")
    spans = []
    for place, label in enumerate(labels):
        frames = np.flatnonzero(states[0] == 2 * place + 1)
        start, end = int(frames[0]), int(frames[-1]) + 1
        spans.append(Span(label, start, end, float(np.exp(log_probs[start:end, label]).mean())))
    return spans


def starts(log_probs: np.ndarray, lengths: Sequence[int], labels: Sequence[Sequence[int]], *,
           blank: int) -> list[np.ndarray]:
    """The frame at which each label begins in the likeliest alignment, (L,) of each utterance: log probabilities
    (B, T, V), of which `lengths` (B,) frames count. Where there are too few frames the labels are evenly spread."""
    states, scores = _likeliest_states(log_probs, lengths, labels, blank)
    return [np.linspace(0, length, len(row), endpoint=False) if score == IMPOSSIBLE
            else np.searchsorted(each, 2 * np.arange(len(row)) + 1)  # the states of an utterance only rise
            for each, length, row, score in zip(states, lengths, labels, scores)]


def _likeliest_states(log_probs: np.ndarray, lengths: Sequence[int], labels: Sequence[Sequence[int]],
                      blank: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the 2 L + 1 states each frame of each utterance is in (B, T), and the log probability of that (B,):
    IMPOSSIBLE where there are too few frames. Label i is state 2 i + 1, blanks stand around the labels; frames that do
    not count are in the last state."""
    B, T, _ = log_probs.shape
    rows, most, sizes = np.arange(B), 2 * max(map(len, labels)) + 1, np.array([2 * len(row) + 1 for row in labels])
    outputs = np.full((B, most), blank)
    for row, each in enumerate(labels):
        outputs[row, 1:2 * len(each):2] = each
    skips = np.zeros((B, most), dtype=bool)  # whether a state may follow the one before the last: no blank needed
    skips[:, 2:] = (outputs[:, 2:] != blank) & (outputs[:, 2:] != outputs[:, :-2])
    score = np.full((B, most), IMPOSSIBLE)
    score[:, 0] = 0.0  # before the first frame: only the first blank and the first label can follow
    steps = np.zeros((T, B, most), dtype=np.int8)
    counted = np.arange(T)[:, None] < np.asarray(lengths)
    for t in range(T):
        one, two = np.roll(score, 1, 1), np.roll(score, 2, 1)
        one[:, 0] = IMPOSSIBLE
        two[~skips] = IMPOSSIBLE
        before = np.stack([score, one, two])
        steps[t] = before.argmax(0) * counted[t][:, None]
        added = np.take_along_axis(log_probs[:, t], outputs, 1)
        score = np.where(counted[t][:, None], before.max(0) + added, score)
    last, other = score[rows, sizes - 1], score[rows, np.maximum(sizes - 2, 0)]
    state = np.where(last >= other, sizes - 1, sizes - 2)
    states = np.empty((B, T), dtype=int)
    for t in range(T - 1, -1, -1):
        states[:, t] = np.where(counted[t], state, sizes - 1)
        state = state - steps[t, rows, state]
    return states, np.maximum(last, other)


# -- beside a decoder -----------------------------------------------------------------------------------------------

class PrefixScores:
    """How likely texts that are written label by label go on with each label, or end there, in the sum over all
    alignments (Watanabe et al. 2017, doi:10.1109/JSTSP.2017.2763455, algorithm 2).

    K texts of each line are written side by side. What is kept of a text is how likely the first 0 to T frames are
    aligned with all of it, apart for alignments whose last frame is a blank, and a label (B, K, T + 1). Computed on the
    CPU: a GPU's cumulated sums have no fixed order.
    """

    def __init__(self, logits: Tensor, lengths: Tensor, *, blank: int):
        """Of (B, T, V), how many frames count (B,); nothing is written yet, K is 1."""
        log_probs = logits.detach().cpu().double().log_softmax(-1)
        valid = valid_places(lengths.cpu(), logits.shape[1])[..., None]
        self.log_probs, self.probs = log_probs * valid, log_probs.exp() * valid  # beyond its length a line only goes on
        self.beyond, self.blank, self.device = ~valid.mT, blank, logits.device
        self.in_blank = F.pad(self.log_probs[..., blank].cumsum(1), (1, 0))[:, None]
        self.in_label = torch.full_like(self.in_blank, IMPOSSIBLE)
        self.last = torch.full((len(logits), 1), blank)
        self.so_far = torch.zeros(len(logits), 1, dtype=torch.double)
        self.going_on = self._going_on()

    def select(self, rows: Tensor) -> None:
        """Go on with these of the B * K texts (B * K',); those of a line stay together, and in its place."""
        B = len(self.log_probs)
        for name in ("in_blank", "in_label", "last", "so_far", "going_on"):
            setattr(self, name, getattr(self, name).flatten(0, 1)[rows.cpu()].unflatten(0, (B, -1)))

    def following(self, tokens: Tensor) -> Tensor:
        """Write tokens (B * K,), and none where one is the blank; then log of the probability (B * K, V) of each label
        to come next, the blank for the end. Together they are 1."""
        tokens = tokens.cpu().unflatten(0, self.last.shape)
        written = (tokens != self.blank)[..., None]
        before = self.in_blank.where((tokens == self.last)[..., None], self._either())  # as the last: after a blank
        in_label = _arrived(before, self._of(tokens))
        in_label[..., 1:].masked_fill_(self.beyond, IMPOSSIBLE)
        in_blank = _arrived(in_label, self._of(torch.full_like(tokens[:, :1], self.blank)))
        self.so_far = self.so_far.where(~written[..., 0], self.going_on.gather(2, tokens[..., None])[..., 0])
        self.in_label, self.in_blank = in_label.where(written, self.in_label), in_blank.where(written, self.in_blank)
        self.last = tokens.where(written[..., 0], self.last)
        self.going_on = self._going_on()
        found = self.going_on - self.so_far[..., None]
        found = found.masked_fill(self.so_far.isneginf()[..., None], IMPOSSIBLE)  # what is impossible has no next
        return found.flatten(0, 1).float().to(self.device)

    def _of(self, tokens: Tensor) -> Tensor:
        """(B, K) -> (B, K, T), how likely each is in each frame."""
        return self.log_probs.gather(2, tokens[:, None].expand(-1, self.log_probs.shape[1], -1)).mT

    def _either(self) -> Tensor:
        return torch.logaddexp(self.in_blank, self.in_label)

    def _going_on(self) -> Tensor:
        """(B, K, V): log of the probability of all texts that begin with what is written and that label; for the blank,
        of what is written and no more."""
        either = self._either()
        top = either.amax(2, keepdim=True)
        top = top.masked_fill(top.isneginf(), 0)
        found = ((either[..., :-1] - top).exp() @ self.probs).log() + top
        again = (self.in_blank[..., :-1] + self._of(self.last)).masked_fill(self.beyond, IMPOSSIBLE)
        found.scatter_(2, self.last[..., None], again.logsumexp(2, keepdim=True))
        found[..., self.blank] = either[..., -1]
        return found


def _arrived(before: Tensor, log_probs: Tensor) -> Tensor:
    """How likely what can begin after each frame (B, K, T + 1) has gone on as a label up to each later one, that label
    as likely in each frame as log_probs (B, K, T)."""
    stays = F.pad(log_probs.cumsum(2), (1, 0))
    arrived = stays[..., 1:] + (before[..., :-1] - stays[..., :-1]).logcumsumexp(2)
    return F.pad(arrived, (1, 0), value=IMPOSSIBLE)
