"""A convolutional trunk: pixels to patches by a few blocks of convolutions, which learn faster from photographs than a
transformer does. It follows K. Jordan's networks for CIFAR-10 (arXiv:2404.00498): a whitening first layer, max pooling,
batch normalization without a scale, GELU.

Axes: B batch, C channels, H rows and W columns of pixels, h rows and w columns of patches, D hidden size.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = 3  # at most, each of which halves the rows and columns
FILTERS = 48  # of the first layer, at most
SMALLEST = 5e-4  # added to the variances, as a share of their mean, so that noise is not amplified
TINY = 1e-12  # also added, against division by 0 where all pixels are the same
MOMENTUM = 0.4  # weight of a step's statistics in the moving averages, by which evaluations normalize


class ConvTrunk(nn.Module):
    """Whitens patches of pixels, then halves rows and columns in each of up to three blocks. For a `patch_size` above
    8, the first layer has a stride of `patch_size` / 8. All in the memory format channels-last."""

    def __init__(self, patch_size: int, d_model: int):
        super().__init__()
        blocks = min(BLOCKS, int(math.log2(patch_size)))
        self.whitening = Whitening(patch_size >> blocks)
        widths = [self.whitening.channels, *[d_model // 4, d_model, d_model][-blocks:]]
        self.blocks = nn.ModuleList(ConvBlock(before, after) for before, after in zip(widths, widths[1:]))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w), 0 in padding. `valid` (B, H, W): which pixels are no padding; None: all."""
        x = x.contiguous(memory_format=torch.channels_last)
        if valid is not None:
            x = x * valid[:, None]
        x, valid = self.whitening(x), reduced(valid, self.whitening.stride)
        x = F.gelu(x if valid is None else x * valid[:, None])
        for block in self.blocks:
            valid = reduced(valid, 2)
            x = block(x, valid)
        return x


class ConvBlock(nn.Module):
    """Two convolutions of 3 x 3; after the first, max pooling halves rows and columns."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.convolution1 = _convolution(before, after)
        self.norm1 = BatchNorm(after)
        self.convolution2 = _convolution(after, after)
        self.norm2 = BatchNorm(after)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, C, H, W), and which outputs are no padding (B, H/2, W/2) -> (B, C', H/2, W/2)."""
        x = F.gelu(self.norm1(F.max_pool2d(self.convolution1(x), 2), valid))
        return F.gelu(self.norm2(self.convolution2(x), valid))


def _convolution(before: int, after: int) -> nn.Conv2d:
    """A convolution of 3 x 3 whose first output channels are at first its input channels, unchanged (Zagoruyko &
    Komodakis 2017, arXiv:1706.00388)."""
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=5**0.5)
    nn.init.dirac_(convolution.weight.data[:before])
    return convolution


def scaled(pixels: Tensor) -> Tensor:
    """uint8 -> float, from -1 to 1."""
    return pixels.float() / 127.5 - 1


def reduced(valid: Tensor | None, by: int) -> Tensor | None:
    """Which places are no padding after rows and columns were divided by `by`, which divides the sizes of all
    pictures."""
    return None if valid is None else valid[:, ::by, ::by]


# -- the first layer ------------------------------------------------------------------------------------------------


class Whitening(nn.Module):
    """Projects patches, whose side is twice the stride, on their principal components with the largest variances, and
    scales these to variance 1; the outputs are these components and their negatives. The filters are not trained: `fit`
    computes them from pictures; until then they are random."""

    weight: Tensor

    def __init__(self, stride: int):
        super().__init__()
        self.stride, side = stride, 2 * stride
        self.components = min(3 * side**2, FILTERS // 2)
        self.channels = 2 * self.components
        filters = nn.init.orthogonal_(torch.empty(self.components, 3 * side**2)).view(-1, 3, side, side)
        self.register_buffer("weight", torch.cat([filters, -filters]))
        self.bias = nn.Parameter(torch.zeros(self.channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, `channels`, H / stride, W / stride)."""
        before, after = self.stride // 2, self.stride - self.stride // 2
        return F.conv2d(F.pad(x, (before, after, before, after)), self.weight, self.bias, self.stride)

    @torch.no_grad()
    def fit(self, pictures: Iterable[Tensor]) -> None:
        """Compute the filters from pictures, uint8 (3, H, W): the eigenvectors of the covariance of their patches with
        the largest eigenvalues, divided by the roots of these."""
        side, count = self.weight.shape[2], 0
        total = self.weight.new_zeros(3 * side**2, dtype=torch.float64)
        products = total.new_zeros(len(total), len(total))
        first = -(self.stride // 2) % self.stride  # of the patches that no edge cuts
        for picture in pictures:
            inner = scaled(picture[None, :, first:, first:]).double()
            patches = F.unfold(inner, side, stride=self.stride)[0]  # (3 side^2, patches)
            count, total, products = count + patches.shape[1], total + patches.sum(1), products + patches @ patches.T
        mean = total / count
        variances, directions = torch.linalg.eigh(products / count - mean.outer(mean))
        scales = (variances.clamp(min=0) + SMALLEST * variances.mean() + TINY).rsqrt()
        filters = (directions * scales).T.flip(0)[:self.components]  # the largest first
        offset = filters @ mean
        self.weight.copy_(torch.cat([filters, -filters]).view_as(self.weight))
        self.bias.copy_(torch.cat([-offset, offset]))


# -- batch normalization --------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) without a scale. Training normalizes by the
    micro-batch; an evaluation by `mean` and `variance`, moving averages of the statistics of whole steps.

    It is `Summed` (training/core/sums.py): the step adds up the sums of all its micro-batches.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.sums: dict[str, Tensor] = {}

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, C, h, w), and which places are no padding (B, h, w) -> (B, C, h, w), 0 in the padding."""
        if valid is None:
            return self._normalized(x)
        places = x.movedim(1, 3)
        counted = self._normalized(places[valid])
        return torch.zeros_like(places).masked_scatter(valid[..., None], counted).movedim(3, 1)

    def _normalized(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same."""
        if not self.training:
            return F.batch_norm(x, self.mean, self.variance, None, self.bias, False, 0.0, self.eps)
        mean, variance = torch.zeros_like(self.mean), torch.zeros_like(self.variance)
        y = F.batch_norm(x, mean, variance, None, self.bias, True, 1.0, self.eps)  # writes those of the batch
        count = x.numel() // x.shape[1]
        self._observe(count, mean, variance * ((count - 1) / count))
        return y

    def _observe(self, count: int, mean: Tensor, variance: Tensor) -> None:
        new = {"count": torch.full_like(mean[:1], count), "sum": count * mean, "squares": count * (variance + mean**2)}
        self.sums = {name: self.sums[name] + value if self.sums else value for name, value in new.items()}

    def apply_sums(self, sums: dict[str, Tensor], dropped: Tensor) -> None:
        mean = sums["sum"] / sums["count"]
        variance = (sums["squares"] / sums["count"] - mean**2).clamp(min=0)
        for old, new in ((self.mean, mean), (self.variance, variance)):
            old.copy_(torch.where(dropped > 0, old, old.lerp(new, MOMENTUM)))
