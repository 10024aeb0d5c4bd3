"""Dropout that costs little on a CPU, too."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014). On a CPU the mask takes sixteen random bits for each number, so `p` is rounded
    to a multiple of 1/65536; this takes a fifth of torch's time (docs/log.md)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ge(bits[:x.numel()].view(x.shape), dropped - 2**15, out=mask)
        return x * mask.mul_(2**16 / (2**16 - dropped))

    def vectors(self, x: Tensor) -> Tensor:
        """Dropout of whole vectors: (..., C) -> the same. Attention uses it on its values: each head drops the same
        positions for all queries, which needs no mask of T x T, as dropout of single attention weights does."""
        return x * self(x.new_ones(*x.shape[:-1], 1)) if self.training and self.p else x
