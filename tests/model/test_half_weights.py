"""Weights in fp16: compared with fp32 layers whose weights were rounded."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model import half_weights
from stoker.model.experts import Experts
from stoker.model.gpt import GPT
from stoker.model.half_weights import HalfLinear, hold_in_half
from stoker.model.thinker import Thinker

SIZES = dict(d_model=32, num_heads=4, num_layers=2, d_ff=48, max_seq_len=24)

pytestmark = pytest.mark.skipif(not half_weights.supported(torch.device("cpu")), reason="torch has none on this CPU")


def rounded(weight: Tensor) -> Tensor:
    return weight.half().float()


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_computes_in_fp32_with_rounded_weights(has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(70, 33), torch.randn(70) if has_bias else None, torch.randn(2, 5, 33)
    made, exact = HalfLinear(weight, bias)(x), F.linear(x, rounded(weight), bias)
    torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(made, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5), "x was random enough"


@pytest.mark.parametrize("kind", ["gpt", "tied", "own head", "experts"])
@torch.no_grad()
def test_a_model_in_half_is_the_model_of_rounded_layers(kind: str) -> None:
    """The embedding, of which there is one row to read for each token, stays as it is."""
    torch.manual_seed(0)
    model = (GPT(101, **SIZES, dropout=0.5) if kind == "gpt" else
             Thinker(101, **SIZES, num_kv_heads=2, dropout=0.5, tied=kind == "tied",
                     experts=Experts(4, 2, 48) if kind == "experts" else None)).eval()
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.2)
    reference, tokens = copy.deepcopy(model), torch.randint(101, (2, 24))
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith("router"):
            layer.weight.copy_(rounded(layer.weight))
    expected = F.linear(reference.hidden(tokens), rounded(model.head_weight))
    before = model(tokens)
    hold_in_half(model)
    left = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert left == ({"router"} if kind == "experts" else set())
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    assert float((model(tokens) - before).norm() / before.norm()) < 2e-3
    assert all(torch.equal(weight, reference.state_dict()[name]) for name, weight in model.state_dict().items()
               if "embedding" in name)
    cache = model.new_cache(24)
    cached = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 9, 6], 1)]
    torch.testing.assert_close(torch.cat(cached, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_not_for_weights_that_are_too_large() -> None:
    model, cpu = Thinker(50, **SIZES, num_kv_heads=2, tied=True), torch.device("cpu")
    assert half_weights.problem(model, cpu) == ""
    model.token_embedding.weight[5, 3] = -65505
    assert half_weights.problem(model, cpu) == "a weight of the model is 65505, and the largest in fp16 is 65504"
    hold_in_half(model)
    assert model.token_embedding.weight[5, 3] == -65505, "packing writes to a copy"


def test_not_for_a_gpu() -> None:
    assert not half_weights.supported(torch.device("cuda")) and not half_weights.supported(torch.device("mps"))
