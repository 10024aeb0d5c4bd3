"""The parts of the encoders: rotary positions, masks, the pool against torch's own attention."""

import math

import torch
from torch import nn

from stoker.model.transformer import Attention, AttentionPool, Block, init_blocks, line_angles, rotated


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
def test_attention_depends_on_distances_alone() -> None:
    """All places moved on by as many, nothing is changed; turned by no angle, it is."""
    attention, x, angles = Attention(24, 3, 0.0), torch.randn(2, 7, 24), line_angles(40, 8, torch.device("cpu"))
    assert torch.allclose(attention(x, None, angles[:7]), attention(x, None, angles[25:32]), atol=1e-5)
    assert not torch.allclose(attention(x, None, angles[:7]), attention(x, None, None), atol=1e-3)


def test_dropout_is_for_training() -> None:
    attention, x = Attention(24, 3, 0.5), torch.randn(2, 7, 24)
    a, b, c, d = (attention.train(training)(x, None, None) for training in (True, True, False, False))
    assert not torch.equal(a, b) and torch.equal(c, d)


@torch.no_grad()
def test_many_blocks_add_as_much_at_first_as_few() -> None:
    added = []
    for count in (2, 16):
        blocks, x = nn.ModuleList(Block(64, 4, 256, 0.0) for _ in range(count)), torch.randn(4, 10, 64)
        init_blocks(blocks)
        y = x
        for block in blocks:
            y = block(y, None, None)
        added.append(float((y - x).var()))
    assert 0.5 < added[1] / added[0] < 2


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
