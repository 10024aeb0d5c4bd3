"""Parts trained by low-rank adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from composed import (
    LORA,
    Composed,
    Config,
    Model,
    Thinker,
    Tied,
    built,
    resumed_as_uninterrupted,
    saved,
    thinker,
    trained,
)
from stoker.config import UserError
from stoker.training.core import adapters, networks
from stoker.training.core.parts import Lora, Part
from toys import Layer, assert_same


def test_adapters_are_trained_beside_a_frozen_base(tmp_path: Path, source: Path) -> None:
    expected, whole, _ = resumed_as_uninterrupted(LORA, tmp_path, source)
    lora = {f"thinker.layers.{i}.lora_{kind}" for i in (0, 1) for kind in "ab"}
    statistics = {f"thinker.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert saved(whole).keys() == lora | statistics | {"head.weight", "head.bias"}
    base = {name: t for name, t in expected.model.thinker.state_dict().items() if "lora" not in name}
    assert base.keys() == thinker().keys()  # as they were called before
    assert_same({n: t for n, t in base.items() if "norm" not in n or n.endswith(("weight", "bias"))},
                {n: t for n, t in thinker().items() if "norm" not in n or n.endswith(("weight", "bias"))})
    assert all(saved(whole)[name].abs().sum() > 0 for name in lora)


def test_the_first_forward_is_that_of_the_base(source: Path) -> None:
    model, base = built(LORA, source), Thinker(8, 16)
    base.load_state_dict(thinker())
    x = torch.randn(5, 8)
    assert torch.equal(model.thinker.eval()(x), base.eval()(x))


def test_what_an_adapter_computes_and_what_is_merged(source: Path) -> None:
    """Against W x + alpha / rank * B A x (Hu et al. 2021, section 4.1), in float64 by numpy."""
    model = built(LORA, source)
    layer = model.thinker.layers[1]
    for index in (0, 1):
        nn.init.normal_(model.thinker.layers[index].lora_b)
    x = torch.randn(5, 16)
    w, bias, a, b = (t.detach().double().numpy() for t in (layer.weight, layer.bias, layer.lora_a, layer.lora_b))
    expected = x.double().numpy() @ (w + 6.0 / 2 * b @ a).T + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    model.eval()
    x, before = torch.randn(5, 8), model.state_dict()
    unmerged, held = model(x), {name: t.clone() for name, t in before.items()}
    stage = LORA(Config(thinker_ckpt=str(source)), Path())
    with networks.merged(stage, model):
        assert model.state_dict().keys() == Model(8, 16).state_dict().keys()
        plain = Model(8, 16).eval()
        plain.load_state_dict(model.state_dict())
        assert not any(isinstance(module, adapters.Adapted) for module in model.modules())
    torch.testing.assert_close(plain(x), unmerged, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(x), built(Composed, source).eval()(x), atol=1e-2)
    assert_same(model.state_dict(), held)
    assert torch.equal(model(x), unmerged) and model.thinker.layers[0].lora_a.requires_grad


def test_a_base_of_bf16_has_adapters_of_fp32(source: Path) -> None:
    class Narrow(Composed):
        how = {"train": Lora(2, layers=("layers.0",)), "dtype": "bf16"}

    model = built(Narrow, source)
    first = model.thinker.layers[0]
    assert (first.weight.dtype, first.lora_a.dtype) == (torch.bfloat16, torch.float32)
    first(torch.randn(3, 8, dtype=torch.bfloat16)).sum().backward()
    assert first.lora_b.grad.abs().sum() > 0 and first.weight.grad is None
    assert not hasattr(model.thinker.layers[1], "lora_a")


def test_tables_that_are_computed_keep_their_type(source: Path) -> None:
    """As those of angles, which lose places in bf16."""
    angles = torch.rand(16)

    class WithTable(Composed):
        how = {"train": "frozen", "dtype": "bf16"}

        def model(self) -> nn.Module:
            model = super().model()
            model.thinker.register_buffer("angles", angles.clone(), persistent=False)
            return model

    model = built(WithTable, source)
    assert torch.equal(model.thinker.angles, angles) and model.thinker.norm.running_mean.dtype == torch.bfloat16


def test_where_adapters_cannot_work_they_are_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="part thinker: no linear layer fits nothing.*"):
        built(trained(train=Lora(layers=("nothing.*",))), source)
    with pytest.raises(UserError, match="head shares its weight with another layer"):
        adapters.add(Tied(), Lora(), "thinker")
    with pytest.raises(UserError, match="torch uses the weight of out_proj without calling the layer"):
        adapters.add(nn.MultiheadAttention(4, 2), Lora(), "thinker")
    with pytest.raises(ValueError, match="export it as a copy"):
        Part("thinker", export="reference")


def test_a_layer_used_twice_gets_one_adapter() -> None:
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, layer)
    adapters.add(network, Lora(2), "part")
    assert len(list(network.parameters())) == 4 and network[0] is network[1]


def test_a_compiled_layer_has_its_adapter(source: Path) -> None:
    network = nn.Sequential(Layer(8, 8))
    adapters.add(network, Lora(2), "part")
    nn.init.normal_(network[0].lora_b)
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(network, backend="eager")(x), network(x))
