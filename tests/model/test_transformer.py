"""The parts of the encoders: rotary positions, masks, the pool against torch's own attention."""

import math

import torch
from torch import nn

from model.transformer import Attention, AttentionPool, line_angles, rotated


def test_rotary_positions_depend_on_distances_alone() -> None:
    angles = line_angles(30, 8, torch.device("cpu"))
    q, k = torch.randn(1, 1, 1, 8).expand(-1, -1, 30, -1), torch.randn(1, 1, 1, 8).expand(-1, -1, 30, -1)
    products = (rotated(q, angles) @ rotated(k, angles).transpose(-1, -2))[0, 0]
    for distance in (0, 1, 7):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert not math.isclose(float(products[0, 0]), float(products[0, 7]), rel_tol=1e-3)
    assert torch.allclose(rotated(q, angles).norm(dim=-1), q.norm(dim=-1), atol=1e-5)


@torch.no_grad()
def test_attention_is_that_of_torch() -> None:
    """Of `nn.MultiheadAttention` with the same weights, over the places that count."""
    ours, theirs = Attention(24, 3, 0.0), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    x, valid = torch.randn(2, 7, 24), torch.arange(7) < torch.tensor([[7], [4]])
    assert torch.allclose(ours(x, None, None), theirs(x, x, x)[0], atol=1e-6)
    assert torch.allclose(ours(x, valid, None), theirs(x, x, x, key_padding_mask=~valid)[0], atol=1e-6)


@torch.no_grad()
def test_the_pool_is_attention_with_one_query() -> None:
    ours, theirs = AttentionPool(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight[:24], theirs.in_proj_bias[:24] = torch.eye(24), 0.0
    theirs.in_proj_weight[24:], theirs.in_proj_bias[24:] = ours.kv.weight, ours.kv.bias
    theirs.out_proj.weight.copy_(ours.out.weight), theirs.out_proj.bias.copy_(ours.out.bias)
    x, valid = torch.randn(2, 7, 24), torch.arange(7) < torch.tensor([[7], [4]])
    for counted, mask in ((None, None), (valid, ~valid)):
        expected, weights = theirs(ours.query.expand(2, 1, 24), x, x, key_padding_mask=mask,
                                   average_attn_weights=False)
        assert torch.allclose(ours(x, counted), expected[:, 0], atol=1e-6)
        assert torch.allclose(ours.weights(x, counted), weights[:, :, 0], atol=1e-6)
