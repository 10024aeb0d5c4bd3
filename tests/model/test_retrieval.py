"""Recall against sorting, one query after another; chance; what has collapsed finds nothing."""

import pytest
import torch
from torch import Tensor

from stoker.model.retrieval import distinct, figures, ranks

DRAW = torch.Generator().manual_seed(0)


def by_sorting(queries: Tensor, among: Tensor, belongs: list[set[int]]) -> list[int]:
    """How many stand before the first that belongs."""
    orders = (-(queries @ among.T)).argsort(1).tolist()
    return [next(place for place, found in enumerate(order) if found in right) for order, right in zip(orders, belongs)]


def test_ranks_are_those_of_sorting() -> None:
    queries, among = (torch.randn(count, 8, generator=DRAW) for count in (40, 25))
    right = torch.stack([torch.arange(40).repeat(2), torch.randint(25, (80,), generator=DRAW)])
    expected = by_sorting(queries, among, [set(right[1, right[0] == i].tolist()) for i in range(40)])
    for rows in (7, 1024):
        assert ranks(queries, among, right, rows).tolist() == expected
    assert 0 in expected and max(expected) > 5


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_model_that_has_collapsed_finds_nothing(value: float) -> None:
    same, right = torch.full((5, 4), value), torch.arange(5).expand(2, 5)
    assert ranks(same, same, right).tolist() == [4] * 5
    numbers = torch.stack([torch.arange(5), torch.arange(5), torch.tensor([0, 0, 1, 1, 1])], 1)
    found = figures(same, same, numbers, at=(1, 3), seed=0)
    assert {name: value for name, value in found.items() if value} == {}


def test_places_of_what_is_different() -> None:
    place, first = distinct(torch.tensor([7, 3, 7, 9, 3]))
    assert place.tolist() == [1, 0, 1, 2, 0] and first.tolist() == [1, 0, 3]


def test_pictures_that_share_a_caption_are_all_right_and_captions_of_a_picture_too() -> None:
    """60 rows of 50 pictures and 30 captions, 4 classes and some without; counted row by row."""
    draw = torch.Generator().manual_seed(1)
    picture_vectors, caption_vectors = torch.randn(50, 6, generator=draw), torch.randn(30, 6, generator=draw)
    picture = torch.cat([torch.arange(50), torch.randint(50, (10,), generator=draw)])
    caption = torch.cat([torch.arange(30), torch.randint(30, (30,), generator=draw)])
    classes = [number % 5 - 1 for number in range(30)]  # of the captions: -1 has none
    class_of_picture = {p: classes[c] for p, c in reversed(list(zip(picture.tolist(), caption.tolist())))}
    numbers = torch.tensor([[p, c, classes[c]] for p, c in zip(picture.tolist(), caption.tolist())])
    found = figures(picture_vectors[picture], caption_vectors[caption], numbers, at=(1, 5, 10), seed=0)

    pairs = list(zip(picture.tolist(), caption.tolist()))
    to_text = by_sorting(picture_vectors, caption_vectors, [{c for p, c in pairs if p == i} for i in range(50)])
    to_image = by_sorting(caption_vectors, picture_vectors, [{p for p, c in pairs if c == i} for i in range(30)])
    labelled = [i for i in range(50) if class_of_picture[i] >= 0]
    nearest = (picture_vectors @ caption_vectors.T).argmax(1).tolist()
    assert found["acc"] == pytest.approx(sum(rank < 1 for rank in to_text) / 50)
    for k in (5, 10):
        assert found[f"text_recall_{k}"] == pytest.approx(sum(rank < k for rank in to_text) / 50)
    for k in (1, 5, 10):
        assert found[f"image_recall_{k}"] == pytest.approx(sum(rank < k for rank in to_image) / 30)
    assert found["label_acc"] == pytest.approx(
        sum(classes[nearest[i]] == class_of_picture[i] for i in labelled) / len(labelled))
    assert {"shuffled_acc", "shuffled_recall_10"} < found.keys()


def test_shuffled_pairs_are_found_by_chance_however_good_the_model() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(2000, 32, generator=DRAW), dim=1)
    numbers = torch.stack([torch.arange(2000), torch.arange(2000) % 20, torch.full((2000,), -1)], 1)
    by_caption = vectors[numbers[:, 1]]
    found = figures(by_caption, by_caption, numbers, at=(1, 10), seed=3)
    assert found["acc"] == found["image_recall_1"] == 1 and "label_acc" not in found
    assert found["shuffled_acc"] == pytest.approx(1 / 20, abs=0.02)
    assert found["shuffled_recall_10"] == pytest.approx(10 / 20, abs=0.05)
    again = figures(by_caption, by_caption, numbers, at=(1, 10), seed=3)
    assert again == found


def test_the_order_of_the_rows_changes_no_figure_but_those_of_chance() -> None:
    draw = torch.Generator().manual_seed(2)
    seen, read = torch.randn(30, 8, generator=draw), torch.randn(12, 8, generator=draw)
    numbers = torch.stack([torch.arange(30), torch.arange(30) % 12, torch.arange(30) % 12 % 3], 1)
    order = torch.randperm(30, generator=draw)
    one = figures(seen, read[numbers[:, 1]], numbers, at=(1, 5), seed=0)
    other = figures(seen[order], read[numbers[:, 1]][order], numbers[order], at=(1, 5), seed=0)
    assert {name for name in one if one[name] != pytest.approx(other[name])} <= {"shuffled_acc", "shuffled_recall_5"}
