"""Encoder of lines of text in pictures: convolutions down to few rows -> pre-norm transformer over the columns.

Axes: B batch, W columns of pixels, T columns of states (4 of pixels each), D width.
What is beyond a line's width is 0 throughout, and never changes what is within it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.convolution import Conv2d
from stoker.model.dropout import Dropout
from stoker.model.transformer import Block, halved, init_blocks, init_linear, line_angles, sines, valid_places

STRIDES = (2, 2), (2, 2), (2, 1), (2, 1)  # of rows, of columns
COLUMNS, ROWS = 4, 16  # pixels to one state, and to one row of what the convolutions leave
FAINTEST = 8.0  # of 255: what differs less is not made to differ more


class LineEncoder(nn.Module):
    """Grey pictures of lines, `image_height` rows (a multiple of 16) and any number of columns -> a state for every 4
    columns, which a model of more than pictures can read too.

    A line is told to the transformer twice where each column stands: by rotary positions, and by sines that what looks
    at the states finds them by.
    """

    def __init__(self, *, image_height: int, stem_width: int, d_model: int, num_heads: int, num_layers: int, d_ff: int,
                 dropout: float = 0.0):
        super().__init__()
        self.image_height, self.num_heads = image_height, num_heads
        self.stem = LineStem(image_height, stem_width, d_model)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        init_blocks(self.blocks)

    def forward(self, pixels: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 1, image_height, W), how many columns of each count (B,) -> (B, T, D), how many of T count (B,)."""
        x, lengths = self.stem(normalized(pixels, widths), widths)
        valid, (T, D) = valid_places(lengths, x.shape[1]), x.shape[1:]
        x = self.dropout(x + sines(torch.arange(T, device=x.device), D).to(x.dtype))
        angles = line_angles(T, D // self.num_heads, x.device)
        for block in self.blocks:
            x = block(x, valid, angles)
        return self.final_norm(x) * valid[..., None], lengths


def states_of(width: int) -> int:
    """How many states a line of so many columns of pixels has."""
    return -(-width // COLUMNS)


def normalized(pixels: Tensor, widths: Tensor) -> Tensor:
    """(B, 1, H, W) of 0 to 255 -> the same of mean 0 and spread 1, whatever light and contrast are."""
    valid = valid_places(widths, pixels.shape[3])[:, None, None]
    count = widths.clamp(min=1)[:, None, None, None] * pixels.shape[2]
    x = pixels.float() * valid
    x = (x - x.sum((2, 3), keepdim=True) / count) * valid
    return x / (x.square().sum((2, 3), keepdim=True) / count + FAINTEST**2).sqrt()


class LineStem(nn.Module):
    """Convolutions that halve the rows four times and the columns twice, and a linear layer over what is left of a
    column (the form of Shi et al. 2015, arXiv:1507.05717)."""

    def __init__(self, image_height: int, width: int, d_model: int):
        super().__init__()
        widths = [1, width, 2 * width, 3 * width, 4 * width]
        self.convolutions = nn.ModuleList(Conv2d(before, after, 3, stride, padding=1)
                                          for before, after, stride in zip(widths, widths[1:], STRIDES))
        self.linear = nn.Linear(widths[-1] * image_height // ROWS, d_model)
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight)  # type: ignore[arg-type]
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        init_linear(self.linear)

    def forward(self, x: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, H, W), widths (B,) -> (B, T, D), lengths (B,)."""
        lengths = widths
        for convolution, (_, columns) in zip(self.convolutions, STRIDES):
            lengths = halved(lengths) if columns == 2 else lengths
            x = F.gelu(convolution(x))
            x = x * valid_places(lengths, x.shape[3])[:, None, None]
        return self.linear(x.permute(0, 3, 1, 2).flatten(2)), lengths  # (B, T, channels x rows) -> (B, T, D)
