"""The vision encoder: against transformers' SigLIP, padding, positions, sizes."""

import pytest
import torch
from torch import Tensor

from stoker.model.transformer import rotated
from stoker.model.vision_encoder import VisionEncoder, grid_angles, within

SIZES = torch.tensor([[32, 48], [16, 16], [32, 24], [8, 40]])


def encoder(stem: str = "patch", positions: str = "rotary") -> VisionEncoder:
    torch.manual_seed(0)
    made = VisionEncoder(patch_size=8, d_model=32, num_heads=4, num_layers=2, d_ff=64, stem=stem, positions=positions,
                         image_size=32).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # so that every part makes a difference
    return made


def pictures(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_it_is_the_vision_transformer_of_transformers() -> None:
    """Mapped to SigLIP's, which has learned positions, no class token and exact GELU, weight by weight."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    ours = encoder(positions="learned")
    theirs = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        hidden_act="gelu", layer_norm_eps=1e-5, vision_use_head=False)).eval()
    names = {"stem.convolution.": "embeddings.patch_embedding.", "positions": "embeddings.position_embedding.weight",
             "blocks.": "encoder.layers.", ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2.",
             ".attention.out.": ".self_attn.out_proj.", ".mlp.up.": ".mlp.fc1.", ".mlp.down.": ".mlp.fc2.",
             "final_norm.": "post_layernorm."}
    weights = {}
    for name, weight in ours.state_dict().items():
        for mine, their in names.items():
            name = name.replace(mine, their)
        if ".attention.qkv." in name:
            for part, each in zip("qkv", weight.chunk(3)):
                weights[name.replace(".attention.qkv.", f".self_attn.{part}_proj.")] = each
        else:
            weights[name] = weight
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in theirs.state_dict()) else ""
    theirs.load_state_dict({prefix + name: weight for name, weight in weights.items()})
    pixels = pictures(3, 3, 32, 32)
    states, valid = ours(pixels)
    expected = theirs(pixels.float() / 127.5 - 1).last_hidden_state
    assert valid is None and torch.allclose(states, expected, atol=1e-4), (states - expected).abs().max()


@pytest.mark.parametrize("stem", ["patch", "conv"])
@torch.no_grad()
def test_padding_never_changes_what_counts(stem: str) -> None:
    """Whatever stands in it, and whatever other pictures there are in the batch."""
    model, pixels = encoder(stem), pictures(len(SIZES), 3, 32, 48)
    together, valid = model(pixels, SIZES)
    grid = together.unflatten(1, (4, 6))
    for row, (height, width) in enumerate(SIZES.tolist()):
        alone, _ = model(pixels[row:row + 1, :, :height, :width])
        here = grid[row, :height // 8, :width // 8].flatten(0, 1)
        assert torch.allclose(here, alone[0], atol=1e-5), (height, width)
        assert int(valid[row].sum()) == len(here) and not together[row][~valid[row]].any()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(model(pixels[order], SIZES[order])[0], together[order], atol=1e-5)


@torch.no_grad()
def test_rotary_positions_are_for_any_size_and_learned_ones_for_theirs() -> None:
    assert encoder()(pictures(2, 3, 16, 64))[0].shape == (2, 16, 32)
    learned = encoder(positions="learned")
    assert learned(pictures(2, 3, 32, 32))[0].shape == (2, 16, 32)
    with pytest.raises(ValueError, match="2 x 8 patches have no learned positions"):
        learned(pictures(2, 3, 16, 64))
    with pytest.raises(ValueError, match=r"\(30, 32\) pixels are not whole patches of 8"):
        encoder()(pictures(2, 3, 30, 32))


@torch.no_grad()
def test_it_forgets_in_training_alone() -> None:
    """Without a block too: patches are dropped."""
    model, pixels = VisionEncoder(patch_size=8, d_model=32, num_heads=4, num_layers=0, d_ff=64, stem="conv",
                                  positions="rotary", image_size=32, dropout=0.5), pictures(1, 3, 32, 32)
    a, b, c, d = (model.train(training)(pixels)[0] for training in (True, True, False, False))
    assert not torch.equal(a, b) and torch.equal(c, d)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.no_grad()
def test_where_something_is_matters(positions: str) -> None:
    """Of the same patches in another place, states are others: upwards and sideways."""
    model, pixels = encoder(positions=positions), pictures(1, 3, 32, 32)
    states = model(pixels)[0].unflatten(1, (4, 4))
    for axis in (2, 3):
        moved = model(pixels.roll(8, axis))[0].unflatten(1, (4, 4)).roll(-1, axis - 1)
        assert not torch.allclose(states, moved, atol=1e-3), axis


def test_angles_of_a_grid_differ_by_row_and_column() -> None:
    angles = grid_angles(3, 5, 8, torch.device("cpu")).unflatten(0, (3, 5))
    assert torch.equal(angles[1, :, :2], angles[1, :1, :2].expand(5, 2)) and not torch.equal(angles[0], angles[1])
    assert torch.equal(angles[:, 3, 2:], angles[:1, 3, 2:].expand(3, 2)) and float(angles[2, 3, 0]) == 2
    q, k = torch.randn(8), torch.randn(8)
    turned = [rotated(each.expand(1, 1, 15, 8), angles.flatten(0, 1))[0, 0].unflatten(0, (3, 5)) for each in (q, k)]
    assert torch.allclose(turned[0][0, 1] @ turned[1][1, 3], turned[0][1, 2] @ turned[1][2, 4], atol=1e-4)


def test_valid_patches_are_those_within_rows_and_columns() -> None:
    assert within(torch.tensor([[1, 2], [2, 3]]), 2, 3).int().tolist() == [[[1, 1, 0], [0, 0, 0]], [[1, 1, 1]] * 2]


def test_sizes_of_the_guide() -> None:
    """The guide's tiny ViT has 0.9 million parameters."""
    made = VisionEncoder(patch_size=16, d_model=128, num_heads=2, num_layers=4, d_ff=512, stem="patch",
                         positions="learned", image_size=224)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(0.9e6, rel=0.02)
