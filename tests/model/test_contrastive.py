"""Losses against NumPy and transformers, the towers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stoker.model.contrastive import LOSS_FUNCTIONS, DualEncoder, alike, right_ones, sigmoid_loss, softmax_loss
from stoker.model.gpt import GPT
from stoker.model.text_tower import FrozenTextTower, TextTower
from stoker.model.vision_encoder import VisionEncoder
from stoker.training.core import networks

Loss = Callable[[Tensor, Tensor], Tensor]
PICTURES, CAPTIONS = torch.tensor([0, 1, 2, 3, 3, 4]), torch.tensor([0, 1, 0, 2, 3, 4])  # 0 and 2, 3 and 4 belong


def model(loss: str = "softmax", **text: int) -> DualEncoder:
    torch.manual_seed(0)
    vision = VisionEncoder(patch_size=8, d_model=32, num_heads=4, num_layers=1, d_ff=64, stem="conv",
                           positions="rotary", image_size=32)
    tower = TextTower(50, d_model=24, num_heads=2, num_layers=2, d_ff=48, embed_dim=16)
    return DualEncoder(vision, tower, 16, loss).eval()


def logits() -> Tensor:
    return 4 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# -- losses ---------------------------------------------------------------------------------------------------------


def test_pairs_that_share_a_picture_or_a_caption_are_alike() -> None:
    found = {(i, j) for i, j in alike(PICTURES, CAPTIONS).nonzero().tolist()}
    assert found == {(0, 2), (2, 0), (3, 4), (4, 3)}


def test_the_softmax_loss_is_that_of_the_formula() -> None:
    """-log of the share of the right one among itself and those that are wrong, both ways."""
    values, belong, expected = logits().numpy(), alike(PICTURES, CAPTIONS).numpy(), 0.0
    for i in range(6):
        captions = [values[i, j] for j in range(6) if not belong[i, j]]
        pictures = [values[j, i] for j in range(6) if not belong[j, i]]
        for others in (captions, pictures):
            expected += (np.log(np.exp(others).sum()) - values[i, i]) / 2
    assert float(softmax_loss(logits(), alike(PICTURES, CAPTIONS))) == pytest.approx(expected, rel=1e-12)


def test_the_softmax_loss_is_clips_where_all_are_different() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    none = torch.zeros(6, 6, dtype=torch.bool)
    expected = float(image_text_contrastive_loss(logits()))
    assert float(softmax_loss(logits(), none)) / 6 == pytest.approx(expected, rel=1e-12)


def test_the_sigmoid_loss_is_that_of_the_formula() -> None:
    values, belong, expected = logits().numpy(), alike(PICTURES, CAPTIONS).numpy(), 0.0
    for i in range(6):
        for j in range(6):
            if not belong[i, j]:
                expected += math.log1p(math.exp(-values[i, j] if i == j else values[i, j]))
    assert float(sigmoid_loss(logits(), alike(PICTURES, CAPTIONS))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_what_is_alike_is_not_pushed_apart(loss: Loss) -> None:
    values = logits().requires_grad_()
    loss(values, alike(PICTURES, CAPTIONS)).backward()
    assert values.grad is not None and values.grad.isfinite().all()
    assert (values.grad == 0).nonzero().tolist() == [[0, 2], [2, 0], [3, 4], [4, 3]]


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_the_order_of_a_batch_changes_nothing(loss: Loss) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    again = loss(logits()[order][:, order], alike(PICTURES[order], CAPTIONS[order]))
    assert float(again) == pytest.approx(float(loss(logits(), alike(PICTURES, CAPTIONS))), rel=1e-12)


def test_the_scale_is_held_as_clips_and_can_come_down_again() -> None:
    made, other = model(), model("sigmoid")
    assert made.terms().tolist() == pytest.approx([1 / 0.07, 0]) and made.bias is None
    assert other.terms().tolist() == pytest.approx([10, -10]) and other.bias is not None
    torch.nn.init.constant_(made.log_scale, 6.0)
    made.terms()[0].backward()
    assert made.terms()[0].item() == pytest.approx(100)
    assert made.log_scale.grad is not None and made.log_scale.grad.item() == pytest.approx(100)


@torch.no_grad()
def test_logits_are_cosines_times_the_scale_and_the_bias() -> None:
    """In fp32, whatever the precision of the towers."""
    seen, read, made = torch.randn(3, 16), torch.randn(5, 16), model("sigmoid")
    with torch.autocast("cpu", torch.bfloat16):
        found = made.logits(seen, read)
    assert torch.allclose(found, 10 * seen @ read.T - 10, atol=1e-4) and found.dtype == torch.float32


def test_the_nearest_of_a_batch_is_counted_among_what_is_contrasted() -> None:
    values = torch.zeros(6, 6)
    values[0, 2] = values[3, 4] = 9.0  # alike
    values.fill_diagonal_(1.0)
    values[5, 1] = 2.0
    assert int(right_ones(values, alike(PICTURES, CAPTIONS))) == 5


def test_the_losses_that_can_be_chosen_are_those_there_are() -> None:
    from stoker.training import train_vision

    assert set(train_vision.LOSSES) == {*LOSS_FUNCTIONS, "classes", "auto"}


@torch.no_grad()
def test_probabilities_are_of_one_among_others_or_of_each_by_itself() -> None:
    found = logits().float()
    assert torch.allclose(model().probabilities(found).sum(1), torch.ones(6))
    assert torch.allclose(model("sigmoid").probabilities(found), 1 / (1 + (-found).exp()))


# -- towers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vectors_are_of_length_1_whoever_else_is_in_the_batch() -> None:
    made = model()
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    tokens, lengths = torch.randint(50, (5, 9)), torch.tensor([9, 1, 4, 8, 2])
    seen, read = made.pictures(pixels), made.captions(tokens, lengths)
    assert all(torch.allclose(each.norm(dim=1), torch.ones(5)) and each.shape == (5, 16) for each in (seen, read))
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(made.pictures(pixels[row:row + 1])[0], seen[row], atol=1e-5)
        alone = made.captions(tokens[row:row + 1, :length], lengths[row:row + 1])[0]
        assert torch.allclose(alone, read[row], atol=1e-5)
    assert (read[0] @ read[3] < 0.999) and (seen[0] @ seen[1] < 0.9999)


@torch.no_grad()
def test_the_order_of_words_matters() -> None:
    tower, tokens = model().text, torch.randint(50, (1, 9))
    assert not torch.allclose(tower(tokens, torch.tensor([9])), tower(tokens.flip(1), torch.tensor([9])), atol=1e-3)


@torch.no_grad()
def test_a_text_tower_forgets_in_training_alone() -> None:
    """Without a block too: words are dropped."""
    tower = TextTower(50, d_model=24, num_heads=2, num_layers=0, d_ff=48, embed_dim=16, dropout=0.5)
    tokens, lengths = torch.randint(50, (1, 9)), torch.tensor([9])
    a, b, c, d = (tower.train(training)(tokens, lengths) for training in (True, True, False, False))
    assert not torch.equal(a, b) and torch.equal(c, d)


@torch.no_grad()
def test_attention_of_a_picture_adds_up_to_1() -> None:
    seen = model().attention(torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8))
    assert seen.shape == (2, 4, 6) and torch.allclose(seen.sum((1, 2)), torch.ones(2))


def test_a_frozen_language_model_stays_as_it_is() -> None:
    """No gradient, no dropout; what stands after the end of a caption changes nothing."""
    torch.manual_seed(0)
    gpt = GPT(50, d_model=24, num_heads=2, num_layers=1, d_ff=48, max_seq_len=16, dropout=0.5)
    networks.freeze(gpt)
    tower = FrozenTextTower(gpt, 16).train()
    tokens, lengths = torch.randint(50, (3, 9)), torch.tensor([9, 1, 4])
    made = tower(tokens, lengths)
    made.square().sum().backward()
    assert {name for name, p in tower.named_parameters() if p.grad is not None} == {
        "norm.weight", "norm.bias", "head.weight", "head.bias"}
    other = tokens.clone()
    other[1, 1:], other[2, 4:] = 7, 8
    assert torch.allclose(tower(other, lengths), made, atol=1e-6) and not gpt.training and tower.norm.training
    mean = gpt.hidden(tokens[2:, :4]).mean(1)
    assert torch.allclose(tower.head(tower.norm(mean))[0], made[2], atol=1e-6)
