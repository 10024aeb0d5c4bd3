"""Pairs of a picture and what is said of it, by numbers: the same picture, caption or class has the same number
wherever it stands, so that it is known which pairs share one."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stoker.data.pictures.resized import Resized
from stoker.data.pictures.table import Splits
from stoker.data.pictures.views import Views

NO_CLASS = -1


class Pair(NamedTuple):
    pixels: Tensor  # (3, H, W) uint8
    numbers: Tensor  # (3,) of picture, caption and class


@dataclass(frozen=True)
class Register:
    """What the numbers mean; `rows` has those of each row, (N, 3) by split. A picture's number is its content's."""

    captions: list[str]
    labels: list[str]
    rows: Mapping[str, Tensor]

    def caption_of(self) -> dict[str, str]:
        """label -> the caption that most of its training pictures have."""
        counts = Counter((label, caption) for _, caption, label in self.rows["train"].tolist() if label != NO_CLASS)
        return {self.labels[label]: self.captions[caption] for (label, caption), _ in reversed(counts.most_common())}

    def captions_are_classes(self) -> bool:
        """Whether each row has a class, and each class one caption, which no other has."""
        pairs = torch.cat(list(self.rows.values()))[:, 1:].unique(dim=0)
        return len(pairs) == len(self.captions) == len(self.labels) and NO_CLASS not in pairs


def registered(splits: Splits, resized: Mapping[str, Resized], *, longest: int) -> Register:
    """Of captions, the first `longest` characters count."""
    rows = {split: [(resized[split].facts[each.path].digest, each.text[:longest], each.label) for each in part]
            for split, part in splits.items()}
    digests, captions, labels = (dict.fromkeys(each) for each in zip(*(row for part in rows.values() for row in part)))
    classes = sorted(labels.keys() - {""})
    places = [{name: place for place, name in enumerate(names)} for names in (digests, captions, classes)]
    return Register(list(captions), classes, {split: torch.tensor(
        [[places[0][digest], places[1][caption], places[2].get(label, NO_CLASS)] for digest, caption, label in part])
        for split, part in rows.items()})


class Pairs(Dataset[Pair]):
    """The rows of `Views`, asked for as those are, with their numbers (N, 3)."""

    def __init__(self, views: Views, numbers: Tensor):
        self.views, self.numbers = views, numbers

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[Pair]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: int) -> Pair:
        view = self.views[index]
        return Pair(view.pixels, self.numbers[view.row])
