"""Linear layers with weights in fp16, so that a CPU generates text faster: most of the time of a token goes into
reading all weights from memory. Weights are rounded to fp16 (11 significant bits); inputs, products and sums stay in
fp32.

Axes: D inputs, E outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stoker.model.experts import MixtureOfExperts

LARGEST = torch.finfo(torch.float16).max


def supported(device: torch.device) -> bool:
    """Whether torch has such layers for the device: it has them for x86 CPUs only."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def problem(model: Any, device: torch.device) -> str:
    """Why a `Decoder` cannot have such layers on the device, or ''."""
    if not supported(device):
        return f"only x86 CPUs compute with weights in fp16, and the model is on {device}"
    largest = max(float(weight.detach().abs().max()) for weight in model.parameters())
    return f"a weight of the model is {largest:.6g}, and the largest in fp16 is {LARGEST:g}" * (largest > LARGEST)


def hold_in_half(model: Any) -> None:
    """Replace, in place, all linear layers of a `Decoder` (model/decoding.py) and its head by layers with weights in
    fp16. After that the model is for inference only. A mixture of experts stays in fp32."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear and not isinstance(module, MixtureOfExperts):
                setattr(module, name, HalfLinear(layer.weight, layer.bias))
    head = HalfLinear(model.head_weight, None)
    model.logits = lambda hidden: head(hidden)  # a module would not take the place of the method


class HalfLinear(nn.Module):
    """A linear layer for inference, with its weight in fp16."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """`weight` (E, D), `bias` (E,), both fp32."""
        super().__init__()
        bias = None if bias is None else bias.detach()
        copied = weight.detach().clone(memory_format=torch.contiguous_format)  # it writes to what it is given
        self.packed = torch.ops.quantized.linear_prepack_fp16(copied, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) of fp32 -> (..., E)."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)  # type: ignore[no-any-return]
