"""The convolutional trunk: whitening by its definition, batch normalization against torch's, padding, accumulation."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.contrastive import DualEncoder
from stoker.model.conv_trunk import MOMENTUM, BatchNorm, ConvTrunk, Whitening
from stoker.model.text_tower import TextTower
from stoker.model.vision_encoder import VisionEncoder, within
from stoker.training.core.sums import Statistics, Summed

SIZES = torch.tensor([[32, 64], [16, 16], [32, 48], [16, 64]])


def natural(count: int, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    """uint8 (count, 3, H, W): smooth, with more in common between colours than between places."""
    draw = torch.Generator().manual_seed(seed)
    rough = torch.randn(count, 3, height // 4, width // 4, generator=draw) + 2 * torch.randn(
        count, 1, height // 4, width // 4, generator=draw)
    smooth = F.interpolate(rough, (height, width), mode="bilinear")
    return (127 + 30 * smooth + 4 * torch.randn(count, 3, height, width, generator=draw)).clamp(0, 255).to(torch.uint8)


def encoder(patch_size: int = 8, num_layers: int = 1) -> VisionEncoder:
    torch.manual_seed(0)
    made = VisionEncoder(patch_size=patch_size, d_model=32, num_heads=4, num_layers=num_layers, d_ff=64, stem="conv",
                         positions="rotary", image_size=32, backbone="conv")
    for name, tensor in made.named_parameters():
        nn.init.normal_(tensor, std=0.2)  # biases too, so that they reach beyond the edges
    for module in made.modules():
        if isinstance(module, BatchNorm):
            module.mean.normal_()
            module.variance.uniform_(0.5, 2)
    return made.eval()


# -- whitening ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4])
@torch.no_grad()
def test_whitened_components_are_uncorrelated_and_of_variance_1(stride: int) -> None:
    """Within the pictures, where patches are those that it was computed from; then they follow negated."""
    layer, pictures = Whitening(stride), natural(300)
    layer.fit(pictures)
    found = layer(pictures.float() / 127.5 - 1)
    assert found.shape == (300, layer.channels, 16 // stride, 16 // stride)
    inner = found[:, :, :-1, :-1] if stride == 1 else found[:, :, 1:-1, 1:-1]
    assert torch.allclose(inner[:, layer.components:], -inner[:, :layer.components], atol=1e-4)
    values = inner[:, :layer.components].movedim(1, 0).flatten(1)
    covariance = torch.cov(values)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3 and values.mean(1).abs().max() < 1e-4
    assert covariance.diag().max() < 1.001 and covariance.diag()[:3].min() > 0.99 and covariance.diag().min() > 0.5


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_filters_whiten_the_covariance_and_keep_the_largest_components(stride: int) -> None:
    """Of patches that are cut out by hand. What has next to no variance is not enlarged to 1."""
    layer, pictures, side = Whitening(stride), natural(40), 2 * stride
    layer.fit(pictures)
    patches = torch.stack([(picture[:, y:y + side, x:x + side].flatten() / 127.5 - 1).double()
                           for picture in pictures for y in range(stride // 2, 17 - side, stride)
                           for x in range(stride // 2, 17 - side, stride)])
    covariance = torch.cov(patches.T, correction=0)
    filters = layer.weight[:layer.components].flatten(1).double()
    variances = torch.linalg.eigvalsh(covariance).flip(0)[:layer.components]
    expected = variances / (variances + 5e-4 * covariance.trace() / len(covariance))
    torch.testing.assert_close(filters @ covariance @ filters.T, expected.diag(), rtol=0, atol=1e-4)
    torch.testing.assert_close(filters @ patches.mean(0), -layer.bias[:layer.components].double(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_pictures_of_one_colour_leave_it_finite() -> None:
    layer = Whitening(1)
    layer.fit(torch.full((3, 3, 8, 8), 200, dtype=torch.uint8))
    assert layer.weight.isfinite().all() and layer.bias.isfinite().all()


# -- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
@torch.no_grad()
def test_padding_never_changes_what_counts(patch_size: int) -> None:
    """Whatever stands in it, and whatever other pictures there are in the batch."""
    model, pixels = encoder(patch_size), natural(len(SIZES), 32, 64)
    together, valid = model(pixels, SIZES)
    grid = together.unflatten(1, (32 // patch_size, 64 // patch_size))
    for row, (height, width) in enumerate(SIZES.tolist()):
        alone, _ = model(pixels[row:row + 1, :, :height, :width])
        here = grid[row, :height // patch_size, :width // patch_size].flatten(0, 1)
        assert torch.allclose(here, alone[0], atol=1e-4), (height, width)
        assert int(valid[row].sum()) == len(here) and not together[row][~valid[row]].any()


@torch.no_grad()
def test_in_training_too_padding_changes_nothing() -> None:
    """Pictures of one size, in a larger frame: the statistics are of what counts."""
    pixels = natural(3, 32, 64)
    sizes = torch.tensor([[16, 24]] * 3)
    models = [encoder(num_layers=0).train() for _ in range(2)]
    padded, valid = models[0](pixels, sizes)
    alone, _ = models[1](pixels[:, :, :16, :24])
    torch.testing.assert_close(padded[valid].view(alone.shape), alone, rtol=0, atol=1e-4)
    for a, b in zip(*(model.modules() for model in models)):
        if isinstance(a, BatchNorm) and isinstance(b, BatchNorm):
            assert {name: value.tolist() for name, value in a.sums.items()} == {
                name: pytest.approx(value.tolist(), rel=1e-4, abs=1e-3) for name, value in b.sums.items()}


@pytest.mark.parametrize("patch_size, places", [(2, 16 * 32), (4, 8 * 16), (8, 4 * 8), (16, 2 * 4), (32, 2)])
@torch.no_grad()
def test_a_state_for_each_patch(patch_size: int, places: int) -> None:
    trunk = ConvTrunk(patch_size, 32)
    assert len(trunk.blocks) == min(3, patch_size.bit_length() - 1)
    assert trunk(torch.randn(2, 3, 32, 64)).flatten(2).shape == (2, 32, places)


@torch.no_grad()
def test_a_new_convolution_passes_on_the_channels_that_there_are() -> None:
    block, x = ConvTrunk(8, 32).blocks[1], torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block.convolution1(x)[:, :8], x)
    assert block.convolution1(x)[:, 8:].std() > 0.1


@torch.no_grad()
def test_places_keep_their_order() -> None:
    """What changes in one corner of a picture changes nothing far from it."""
    model, pixels = encoder(num_layers=0), natural(1, 64, 96)
    other = pixels.clone()
    other[:, :, 56:, :8] = 255 - other[:, :, 56:, :8]
    change = (model(pixels)[0] - model(other)[0]).norm(dim=2).unflatten(1, (8, 12))[0]
    assert change[7, 0] > 0 and not change[:4].any() and not change[:, 4:].any()


# -- batch normalization --------------------------------------------------------------------------------------------


def test_it_is_torchs_batch_normalization() -> None:
    ours, theirs = BatchNorm(5), nn.BatchNorm2d(5, momentum=MOMENTUM)
    with torch.no_grad():
        theirs.bias.copy_(ours.bias.normal_())
    for seed in range(3):
        x = 3 * torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(seed)) + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b)
        torch.testing.assert_close(y, z)
        for each in (y, z):
            each.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        ours.apply_sums(ours.sums, torch.zeros(()))
        ours.sums = {}
    count = 4 * 6 * 7
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    unbiased = (ours.variance - (1 - MOMENTUM)**3) * count / (count - 1) + (1 - MOMENTUM)**3
    torch.testing.assert_close(unbiased, theirs.running_var)
    assert torch.equal(ours.eval()(x), F.batch_norm(x, ours.mean, ours.variance, None, ours.bias, eps=ours.eps))


def test_statistics_of_a_step_are_those_of_all_its_samples() -> None:
    """Uneven micro-batches, a forward pass outside of the step, and one that checkpointing repeats."""
    norm, x = BatchNorm(3), 2 * torch.randn(7, 3, 4, 4) - 1
    assert isinstance(norm, Summed)
    statistics = Statistics(norm)
    norm(torch.randn(9, 3, 4, 4))
    statistics.begin()
    statistics.begin_phase()
    for part in x.split([4, 2, 1]):
        norm(part)
        statistics.add()
        norm(part)
        statistics.clear()
    statistics.finish_phase()
    statistics.apply(torch.ones(()))
    assert torch.equal(norm.mean, torch.zeros(3)) and torch.equal(norm.variance, torch.ones(3)), "it was dropped"
    statistics.apply(torch.zeros(()))
    torch.testing.assert_close(norm.mean, MOMENTUM * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.variance, 1 - MOMENTUM + MOMENTUM * x.var((0, 2, 3), correction=0))


def test_a_module_that_is_called_twice_adds_both() -> None:
    norm, x = BatchNorm(3), torch.randn(6, 3, 4, 4)
    for part in x.split([4, 2]):
        norm(part)
    assert norm.sums["count"].tolist() == [6 * 16]
    torch.testing.assert_close(norm.sums["squares"], x.square().sum((0, 2, 3)))
    norm.eval()(x)
    assert norm.sums["count"].tolist() == [6 * 16], "an evaluation counts nothing"


def test_a_step_of_nan_leaves_the_statistics() -> None:
    norm = BatchNorm(3)
    norm(torch.full((2, 3, 4, 4), torch.nan))
    norm.apply_sums(norm.sums, torch.ones(()))
    assert torch.equal(norm.mean, torch.zeros(3)) and torch.equal(norm.variance, torch.ones(3))


def test_places_that_do_not_count_are_in_no_statistics() -> None:
    norm, x = BatchNorm(3), torch.randn(2, 3, 4, 4)
    valid = within(torch.tensor([[4, 2], [1, 3]]), 4, 4)
    y = norm(x, valid)
    counted = x.movedim(1, 3)[valid]
    torch.testing.assert_close(y.movedim(1, 3)[valid], F.batch_norm(counted, None, None, training=True))
    assert not y.movedim(1, 3)[~valid].any() and norm.sums["count"].tolist() == [11]
    torch.testing.assert_close(norm.sums["sum"], counted.sum(0))


# -- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit", "conv"])
@torch.no_grad()
def test_with_tta_it_is_the_mean_over_six_views(backbone: str) -> None:
    """Against views made with NumPy. A picture and its mirror image have the same."""
    torch.manual_seed(0)
    vision = VisionEncoder(patch_size=8, d_model=32, num_heads=4, num_layers=1, d_ff=64, stem="conv",
                           positions="rotary", image_size=32, backbone=backbone)
    text = TextTower(50, d_model=24, num_heads=2, num_layers=1, d_ff=48, embed_dim=16)
    model, pixels = DualEncoder(vision, text, 16, "softmax").eval(), natural(5, 64, 32)
    rows = pixels.numpy()
    down = np.concatenate([rows[:, :, 2:0:-1], rows[:, :, :-2]], 2)  # by 64 / 32 rows
    up = np.concatenate([rows[:, :, 2:], rows[:, :, -2:-4:-1]], 2)
    seen = [model.pictures(torch.from_numpy(view.copy())) for each in (rows, down, up)
            for view in (each, each[..., ::-1])]
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(model.pictures(pixels, tta=True), mean / mean.norm(dim=1, keepdim=True))
    assert not torch.allclose(mean, seen[0], atol=1e-4) and not torch.allclose(seen[0], seen[2], atol=1e-4)
    torch.testing.assert_close(model.pictures(pixels.flip(3), tta=True), model.pictures(pixels, tta=True))


@torch.no_grad()
def test_the_pool_is_the_mean_of_what_counts_and_shows_which_places_made_it() -> None:
    model, pixels = DualEncoder(encoder(), nn.Identity(), 16, "softmax").eval(), natural(3, 32, 48)
    model.head.bias.normal_()  # so that the mean's size matters
    states, valid = model.vision(pixels, sizes := torch.tensor([[32, 48], [8, 16], [24, 8]]))
    mean = torch.stack([row[here].mean(0) for row, here in zip(states, valid)])
    torch.testing.assert_close(model.pictures(pixels, sizes), F.normalize(model.head(mean), dim=1))
    seen = model.attention(pixels)
    assert seen.shape == (3, 4, 6) and torch.allclose(seen.sum((1, 2)), torch.ones(3)) and seen.min() >= 0
    each = model.head(model.vision(pixels)[0])
    toward = F.normalize(each.mean(1), dim=1)[:, None].mul(each).sum(2)
    assert torch.equal(seen.flatten(1).argmax(1), toward.argmax(1))


def test_it_learns_in_channels_last_and_every_weight_has_a_gradient() -> None:
    trunk = ConvTrunk(8, 32)
    y = trunk(torch.randn(2, 3, 16, 16))
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trunk.parameters())
    assert "whitening.weight" not in dict(trunk.named_parameters()) and "whitening.weight" in trunk.state_dict()
