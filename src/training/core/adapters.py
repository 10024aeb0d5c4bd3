"""Low-rank adapters of linear layers (LoRA: Hu et al. 2021, arXiv:2106.09685).

A layer that gets one stays the same module, under the same names: `q.weight` stays, `q.lora_a` and `q.lora_b` come
beside it. Only its class changes.

peft is not used: it wraps each layer, so that `q.weight` becomes `q.base_layer.weight`, and `add` and `merged` do all
that is needed here for the linear layers of any network, also of transformers. What they cannot adapt is its Conv1D
(GPT-2): that is refused, since no linear layer fits.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.config import UserError
from stoker.training.core.parts import Lora

# torch's own, which use the weights of their linear layers without calling them
BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Adapted:
    """What the class of a linear layer with an adapter has beside its own: lora_a (rank, inputs), lora_b (outputs,
    rank), lora_scale."""

    if TYPE_CHECKING:
        weight: nn.Parameter
        lora_a: nn.Parameter
        lora_b: nn.Parameter
        lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)  # type: ignore[misc]
        low = F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return output + (self.lora_scale * low).to(output.dtype)

    def merged_weight(self) -> Tensor:
        """W + scale B A, in the weight's own type."""
        change = self.lora_scale * (self.lora_b.detach() @ self.lora_a.detach())
        return (self.weight.detach().to(change.dtype) + change).to(self.weight.dtype)


@cache
def _adapted(kind: type[nn.Linear]) -> type[nn.Linear]:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def add(network: nn.Module, lora: Lora, part: str) -> None:
    """Give an adapter to each linear layer whose name fits; all other parameters are frozen. At first the network
    computes what it did, since B is 0. Raises UserError where no layer fits, or one cannot have an adapter."""
    network.requires_grad_(False)
    users = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    bypassed = {id(child) for module in network.modules() if isinstance(module, BYPASSING)
                for child in module.modules()}
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)
              and any(fnmatchcase(name, pattern) for pattern in lora.layers)}
    if not layers:
        raise UserError(f"part {part}: no linear layer fits {', '.join(lora.layers)}: name others for its adapters")
    for name, layer in layers.items():
        if users[id(layer.weight)] > 1:
            raise UserError(f"part {part}: {name} shares its weight with another layer, so it can have no adapter: "
                            "name the layers that are to have one")
        if id(layer) in bypassed:
            raise UserError(f"part {part}: torch uses the weight of {name} without calling the layer, so an adapter "
                            "would do nothing: name other layers, or build it of linear layers")
        _add(layer, lora)


def _add(layer: Any, lora: Lora) -> None:
    new: dict[str, Any] = {"device": layer.weight.device, "dtype": torch.float32}
    layer.lora_a = nn.Parameter(torch.empty(lora.rank, layer.in_features, **new))
    layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, lora.rank, **new))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
    layer.lora_scale = lora.alpha / lora.rank
    layer.__class__ = _adapted(type(layer))  # type: ignore[arg-type]


@contextmanager
def merged(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the adapters of these networks are part of their weights, as a model without adapters has them."""
    layers: list[Any] = [layer for network in networks for layer in network.modules() if isinstance(layer, Adapted)]
    before = [(layer, type(layer), dict(layer._parameters)) for layer in layers]
    for layer in layers:
        layer.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
        del layer.lora_a, layer.lora_b
        layer.__class__ = type(layer).__bases__[1]  # beside Adapted
    try:
        yield
    finally:
        for layer, kind, parameters in before:
            layer.__class__ = kind
            layer._parameters.clear()
            layer._parameters.update(parameters)
