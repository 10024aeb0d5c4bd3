"""Blocks of ConvNeXt (Liu et al. 2022, arXiv:2201.03545) in one dimension: time.

Axes: B batch, F frames, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.transformer import init_linear

KERNEL = 7
WIDER = 3  # the hidden size of a block's two layers over its own
SMALL = 0.1  # factor of what a block adds at first

State = list[Tensor]  # of a stream: the frames before, (B, KERNEL - 1, D), for each block


class ConvNeXtBlock(nn.Module):
    """Each channel's own convolution over time, then two layers; added to what came in. A causal one sees no later
    frame."""

    def __init__(self, d_model: int, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.depthwise = nn.Conv1d(d_model, d_model, KERNEL, groups=d_model)
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, WIDER * d_model)
        self.down = nn.Linear(WIDER * d_model, d_model)
        self.scale = nn.Parameter(torch.full((d_model,), SMALL))
        self.apply(init_linear)

    def forward(self, x: Tensor, valid: Tensor | None = None, past: Tensor | None = None) -> Tensor:
        """(B, F, D), which frames count (B, F), and for a causal block the KERNEL - 1 frames before (B, KERNEL - 1, D),
        by default 0."""
        x = x if valid is None else x * valid[..., None]
        around = F.pad(x, (0, 0, KERNEL - 1, 0) if self.causal else (0, 0, KERNEL // 2, KERNEL // 2))
        if past is not None:
            around = torch.cat([past, x], 1)
        y = self.depthwise(around.transpose(1, 2)).transpose(1, 2)
        return x + self.scale * self.down(F.gelu(self.up(self.norm(y))))  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """Several blocks: causal ones for a whole recording or frame by frame."""

    def __init__(self, d_model: int, num_layers: int, causal: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(ConvNeXtBlock(d_model, causal) for _ in range(num_layers))
        self.reach = num_layers * (KERNEL // 2)  # frames to either side that a frame depends on

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, F, D), which frames count (B, F), by default all -> (B, F, D)."""
        for block in self.layers:
            x = block(x, valid)
        return x

    def stream(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The next frames of a stream (B, F, D) -> what `forward` of the whole stream returns for them, if the blocks
        are causal, and the state to pass with the frames that follow. `state` is None at the start."""
        before = state or [x.new_zeros(len(x), KERNEL - 1, x.shape[2])] * len(self.layers)
        kept = State()
        for block, past in zip(self.layers, before):
            kept.append(torch.cat([past, x], 1)[:, 1 - KERNEL:])
            x = block(x, past=past)
        return x, kept
