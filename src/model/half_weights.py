"""Linear layers whose weights are held in fp16 on a CPU, where what a decoder makes token by token takes as long as it
takes to read its weights. Each weight is rounded to 11 binary digits; inputs, products and sums stay fp32.

Axes: D inputs, E outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn


def supported(device: torch.device) -> bool:
    """Whether torch has such layers for the device: on CPUs of x86."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def hold_in_half(model: Any) -> None:
    """Replace all linear layers of a `Decoder` (model/decoding.py), and its head, by ones with weights in fp16. The
    model is good for inference only from then on. Experts keep their weights as they are."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, HalfLinear(layer.weight, layer.bias))
    model.logits = HalfLinear(model.head_weight, None).forward


class HalfLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None):
        """`weight` (E, D), `bias` (E,), both fp32."""
        super().__init__()
        bias = None if bias is None else bias.detach()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) of fp32 -> (..., E)."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)  # type: ignore[no-any-return]
