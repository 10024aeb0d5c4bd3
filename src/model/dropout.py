"""Dropout that costs little on a CPU, too."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014). On a CPU the mask is drawn sixteen bits a number, so that `p` is a multiple of
    1/65536, a tenth as long as torch takes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ge(bits[:x.numel()].view(x.shape), dropped - 2**15, out=mask)
        return x * mask.mul_(2**16 / (2**16 - dropped))

    def vectors(self, x: Tensor) -> Tensor:
        """Dropout of whole vectors, (..., C). Attention uses it on its values: each head then leaves out some positions
        for all queries alike, so no mask of T x T is needed, as it is to drop single attention weights."""
        return x * self(x.new_ones(*x.shape[:-1], 1)) if self.training and self.p else x
