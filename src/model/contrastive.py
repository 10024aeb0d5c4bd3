"""Pictures and captions in one space: two towers, and the losses that bring together what belongs together.

Axes: B pairs of a picture and its caption, E width of what is compared, N pictures, C captions.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.transformer import AttentionPool, init_linear
from stoker.model.vision_encoder import VisionEncoder

LARGEST_SCALE = 100.0  # as CLIP's: a larger one makes training unstable
MOVED = 32  # one part in so many of a picture's height is what its views are moved by
CLIP, SIGLIP = (1 / 0.07, 0.0), (10.0, -10.0)  # scale and bias at first


class DualEncoder(nn.Module):
    """A vision encoder and a text tower whose vectors are compared by their angle, times a learned scale.

    `loss` says how: "sigmoid" (SigLIP: Zhai et al. 2023, arXiv:2303.15343), which has a learned bias too, or another
    one, as "softmax" (CLIP: Radford et al. 2021, arXiv:2103.00020).
    """

    def __init__(self, vision: VisionEncoder, text: nn.Module, embed_dim: int, loss: str):
        super().__init__()
        d_model = vision.final_norm.normalized_shape[0]
        self.vision, self.text = vision, text
        self.pool = MeanPool() if vision.backbone == "conv" else AttentionPool(d_model, vision.num_heads)
        self.head = nn.Linear(d_model, embed_dim)
        self.pool.apply(init_linear)
        init_linear(self.head)
        scale, bias = SIGLIP if loss == "sigmoid" else CLIP
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias)) if loss == "sigmoid" else None

    def pictures(self, pixels: Tensor, sizes: Tensor | None = None, tta: bool = False) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, E) of length 1, in fp32. With `tta`, for pictures without sizes, the direction of
        the mean over the `views` of each picture."""
        if tta:
            return F.normalize(torch.stack([self.pictures(view) for view in views(pixels)]).sum(0), dim=1)
        return F.normalize(self.head(self.pool(*self.vision(pixels, sizes))).float(), dim=1)

    def captions(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) of int64, how many of each count (B,) -> (B, E) of length 1, in fp32."""
        return F.normalize(self.text(tokens, lengths).float(), dim=1)

    def attention(self, pixels: Tensor) -> Tensor:
        """Where the picture's vector comes from: (B, 3, H, W) -> (B, h, w), which add up to 1 in each picture. How much
        the pool reads from each place, as a mean of its heads; of a mean, how far each place points to the vector."""
        states, valid = self.vision(pixels)
        if isinstance(self.pool, MeanPool):
            each = self.head(states).float()  # (B, P, E)
            toward = torch.einsum("bpe,be->bp", each, each.mean(1)).clamp(min=0)
            weights = toward / toward.sum(1, keepdim=True)
        else:
            weights = self.pool.weights(states, valid).mean(1)
        return weights.unflatten(1, (pixels.shape[2] // self.vision.patch_size, -1))  # type: ignore[no-any-return]

    def terms(self) -> Tensor:
        """(2,): the scale and the bias, 0 where there is none."""
        with torch.no_grad():  # in place, as CLIP does after each update: a clamp in the graph could not be left again
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        scale = self.log_scale.exp()
        return torch.stack([scale, torch.zeros_like(scale) if self.bias is None else self.bias])

    def logits(self, pictures: Tensor, captions: Tensor) -> Tensor:
        """(N, E) and (C, E) -> (N, C) in fp32."""
        return logits(pictures, captions, self.terms())

    def probabilities(self, logits: Tensor) -> Tensor:
        """(N, C) -> of each caption for each picture: that it is the one of the C, or, by the sigmoid loss, that it
        holds."""
        return logits.softmax(1) if self.bias is None else logits.sigmoid()


def views(pixels: Tensor) -> Iterator[Tensor]:
    """(B, 3, H, W) six times: as they are, moved down, and moved up, by one part in `MOVED` of their height, with what
    comes in mirrored at the edge; and the mirror images of these. A picture and its mirror image have the same views.
    """
    rows = max(1, pixels.shape[2] // MOVED)
    higher = F.pad(pixels.float(), (0, 0, rows, rows), mode="reflect").to(pixels.dtype)
    for moved in (pixels, higher[:, :, :-2 * rows], higher[:, :, 2 * rows:]):
        yield moved
        yield moved.flip(3)


class MeanPool(nn.Module):
    """The mean of the places that count. Convolutions learn sooner by it than by a query that must itself be learned.
    """

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, P, D), 0 where `valid` (B, P) says that a place does not count -> (B, D)."""
        return x.mean(1) if valid is None else x.sum(1) / valid.sum(1, keepdim=True)


def logits(pictures: Tensor, captions: Tensor, terms: Tensor) -> Tensor:
    """(N, E), (C, E), scale and bias (2,) -> (N, C) in fp32."""
    with torch.autocast(pictures.device.type, enabled=False):
        return pictures @ captions.T * terms[0] + terms[1]


# -- losses ---------------------------------------------------------------------------------------------------------


def alike(pictures: Tensor, captions: Tensor) -> Tensor:
    """(B, B): whether picture i and caption j, of different pairs, belong together nevertheless, since the two pairs
    share the caption or the picture. `pictures` and `captions` (B,) are numbers of theirs. Such are not contrasted."""
    same = (pictures[:, None] == pictures) | (captions[:, None] == captions)
    return same.fill_diagonal_(False)


def softmax_loss(logits: Tensor, alike: Tensor, reduction: str = "sum") -> Tensor:
    """(B, B) of pictures and captions -> the sum over the pairs of -log of the probability of the caption among those
    of the batch, and of the picture among those of the batch, half each; with reduction "none" of each pair (B,)."""
    logits, own = logits.masked_fill(alike, -torch.inf), torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own, reduction=reduction) + F.cross_entropy(logits.T, own, reduction=reduction)) / 2


def sigmoid_loss(logits: Tensor, alike: Tensor, reduction: str = "sum") -> Tensor:
    """(B, B) -> the sum over all pictures and captions of -log of the probability that they belong together, or not;
    with reduction "none" the sum over the captions, of each picture (B,)."""
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    each = F.logsigmoid(sign * logits).masked_fill(alike, 0)
    return -(each.sum() if reduction == "sum" else each.sum(1))


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def right_ones(logits: Tensor, alike: Tensor) -> Tensor:
    """How many pictures of a batch have their own caption for the nearest."""
    own = torch.arange(len(logits), device=logits.device)
    return (logits.masked_fill(alike, -torch.inf).argmax(1) == own).sum()
