"""Vision encoder: patches, strided convolutions or a convolutional trunk -> pre-norm transformer (ViT: Dosovitskiy et
al. 2020, arXiv:2010.11929, its patches read by a pool in place of a class token).

Axes: B batch, H rows and W columns of pixels, h rows and w columns of patches, P patches (h * w, row by row), D width.
What is beyond a picture's size never changes what is within it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.conv_trunk import ConvTrunk, scaled
from stoker.model.convolution import Conv2d
from stoker.model.dropout import Dropout
from stoker.model.transformer import Block, init_blocks, init_linear, line_angles

SLOWEST = 100.0  # of rotary positions: a picture is few patches wide


class VisionEncoder(nn.Module):
    """Pictures of any size that `patch_size` divides -> a state for each patch, which a model of more than pictures can
    read too. Learned positions are those of one size, `image_size` pixels a side, rotary ones of any."""

    def __init__(self, *, patch_size: int, d_model: int, num_heads: int, num_layers: int, d_ff: int, stem: str,
                 positions: str, image_size: int, dropout: float = 0.0, backbone: str = "vit"):
        super().__init__()
        self.patch_size, self.num_heads, self.backbone = patch_size, num_heads, backbone
        self.stem: nn.Module = (ConvTrunk(patch_size, d_model) if backbone == "conv" else
                                PatchStem(patch_size, d_model) if stem == "patch" else ConvStem(patch_size, d_model))
        self.positions = (nn.Parameter(0.02 * torch.randn((image_size // patch_size)**2, d_model))
                          if positions == "learned" else None)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        init_blocks(self.blocks)

    def forward(self, pixels: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, 3, H, W), and the rows and columns of pixels (B, 2) that count where not all do -> (B, P, D), and
        which patches count (B, P), None where all do. Raises ValueError for a size that the patches do not divide."""
        if any(side % self.patch_size for side in pixels.shape[2:]):
            raise ValueError(f"{tuple(pixels.shape[2:])} pixels are not whole patches of {self.patch_size}")
        x = scaled(pixels)
        if isinstance(self.stem, ConvTrunk):
            x = self.stem(x, None if sizes is None else within(sizes, *pixels.shape[2:]))
        else:
            x = self.stem(x)  # (B, D, h, w)
        h, w = x.shape[2:]
        valid = None if sizes is None else within(sizes // self.patch_size, h, w).flatten(1)
        x, angles = x.flatten(2).transpose(1, 2), None
        if self.positions is None:
            angles = grid_angles(h, w, x.shape[2] // self.num_heads, x.device)
        else:
            x = x + self._learned(h, w)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, valid, angles)
        x = self.final_norm(x)
        return (x if valid is None else x * valid[..., None]), valid

    def _learned(self, h: int, w: int) -> Tensor:
        assert self.positions is not None
        if h * w != len(self.positions) or h != w:
            raise ValueError(f"{h} x {w} patches have no learned positions: there are those of one size alone")
        return self.positions


def within(sizes: Tensor, rows: int, columns: int) -> Tensor:
    """Rows and columns that count (B, 2) -> (B, rows, columns), whether a place is among them."""
    row, column = torch.arange(rows, device=sizes.device), torch.arange(columns, device=sizes.device)
    return (row < sizes[:, :1])[:, :, None] & (column < sizes[:, 1:])[:, None, :]


def grid_angles(h: int, w: int, C: int, device: torch.device) -> Tensor:
    """(h * w, C/2): half the pairs turn with the row, half with the column."""
    rows, columns = (line_angles(count, C // 2, device, SLOWEST) for count in (h, w))
    return torch.cat([rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], -1).flatten(0, 1)


# -- pixels to patches ----------------------------------------------------------------------------------------------


class PatchStem(nn.Module):
    """Each patch by itself: a linear layer."""

    def __init__(self, patch_size: int, d_model: int):
        super().__init__()
        self.convolution = nn.Conv2d(3, d_model, patch_size, stride=patch_size)
        nn.init.normal_(self.convolution.weight, std=(3 * patch_size**2)**-0.5)
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)  # type: ignore[no-any-return]


class ConvStem(nn.Module):
    """Convolutions of stride 2, each with twice as many channels, and a linear layer (Xiao et al. 2021,
    arXiv:2106.14881): small pictures are learned from sooner so."""

    def __init__(self, patch_size: int, d_model: int):
        super().__init__()
        halvings = int(math.log2(patch_size))
        widths = [3, *(max(16, d_model >> (halvings - 1 - i)) for i in range(halvings))]
        self.convolutions = nn.ModuleList(Conv2d(before, after, 3, stride=2, padding=1)
                                          for before, after in zip(widths, widths[1:]))
        self.linear = nn.Linear(widths[-1], d_model)
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight)  # type: ignore[arg-type]
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        init_linear(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:  # of an even number of places it reaches none beyond: no mask is needed
            x = F.gelu(convolution(x))
        return self.linear(x.movedim(1, 3)).movedim(3, 1)  # type: ignore[no-any-return]
