"""How well pictures find their captions, and captions their pictures, among all there are.

Axes: N queries, C found among, E width of what is compared, K pairs that belong together.
"""

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


def figures(seen: Tensor, read: Tensor, numbers: Tensor, *, at: tuple[int, ...], seed: int) -> dict[str, float]:
    """Of pairs of a picture and a caption, their vectors (K, E) and numbers (K, 3) of picture, caption and class: each
    picture counts once, each caption too, and all that a pair says belongs together is right.

    acc              pictures whose nearest caption is a right one
    text_recall_5    pictures with a right one among the nearest 5 captions
    image_recall_5   captions with a right one among the nearest 5 pictures
    label_acc        pictures whose nearest caption is one of their class; where there are classes (-1: none)
    shuffled_...     with shuffled captions: chance, or there is a mistake in the data or here
    """
    return {name: share(*each) for name, each in queries(seen, read, numbers, at=at, seed=seed).items()}


def queries(seen: Tensor, read: Tensor, numbers: Tensor, *, at: tuple[int, ...],
            seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The same by pair: which pairs are the first of their picture, or caption, so that it is asked for (K,), and
    which of these are answered right (K,), both bool."""
    picture, first_of_picture = distinct(numbers[:, 0])
    caption, first_of_caption = distinct(numbers[:, 1])
    pictures, captions, right = seen[first_of_picture], read[first_of_caption], torch.stack([picture, caption])
    shuffled = caption[torch.randperm(len(caption), generator=torch.Generator().manual_seed(seed))]
    to_text, to_image = ranks(pictures, captions, right), ranks(captions, pictures, right.flip(0))
    by_chance = ranks(pictures, captions, torch.stack([picture, shuffled]))

    def within(ranks: Tensor, first: Tensor, k: int) -> tuple[Tensor, Tensor]:
        asked = torch.zeros(2, len(numbers), dtype=torch.bool)
        asked[0, first], asked[1, first] = True, ranks < k
        return asked[0], asked[1]

    found = {"acc": within(to_text, first_of_picture, 1),
             **{f"text_recall_{k}": within(to_text, first_of_picture, k) for k in at if k > 1},
             **{f"image_recall_{k}": within(to_image, first_of_caption, k) for k in at},
             "shuffled_acc": within(by_chance, first_of_picture, 1),
             f"shuffled_recall_{max(at)}": within(by_chance, first_of_picture, max(at))}
    classes = numbers[first_of_picture, 2], numbers[first_of_caption, 2]
    if len(labelled := (classes[0] >= 0).nonzero()[:, 0]):
        same = (classes[0][labelled, None] == classes[1]).nonzero().T
        found["label_acc"] = within(ranks(pictures[labelled], captions, same), first_of_picture[labelled], 1)
    return found


def distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) -> the place of each among those that are different (K,), and the first K at which each of these stands."""
    _, first, place = np.unique(numbers.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(place), torch.from_numpy(first)


def ranks(queries: Tensor, among: Tensor, right: Tensor, rows_at_once: int = ROWS_AT_ONCE) -> Tensor:
    """How many wrong ones stand before the first right one: (N,), 0 where the nearest is right.

    `queries` (N, E), `among` (C, E), `right` (2, K): which of them belong together, each query at least once. What is
    as near as the right one counts as before it, and so does all where a vector is NaN: a model that has collapsed
    finds nothing.
    """
    counts = []
    for start in range(0, len(queries), rows_at_once):
        near = queries[start:start + rows_at_once] @ among.T
        here = right[:, (right[0] >= start) & (right[0] < start + len(near))]
        belongs = torch.zeros_like(near, dtype=torch.bool)
        belongs[here[0] - start, here[1]] = True
        best = near.masked_fill(~belongs, -torch.inf).amax(1, keepdim=True)
        counts.append((~(near < best) & ~belongs).sum(1))
    return torch.cat(counts)


def share(asked: Tensor, right: Tensor) -> float:
    """Of the queries, those that are answered right."""
    return float(right[asked].float().mean())
