"""Pictures and captions in one embedding space: two towers, and contrastive losses.

Axes: B pairs of a picture and its caption, E size of the embeddings, N pictures, C captions, P patches, h rows and w
columns of patches, H rows and W columns of pixels, D hidden size.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.transformer import AttentionPool, init_linear
from stoker.model.vision_encoder import VisionEncoder

LARGEST_SCALE = 100.0  # as CLIP's: a larger one makes training unstable
MOVED = 32  # views are moved by 1 / MOVED of the picture's height
CLIP, SIGLIP = (1 / 0.07, 0.0), (10.0, -10.0)  # scale and bias at first


class DualEncoder(nn.Module):
    """A vision encoder and a text tower. The logit of a picture and a caption is the cosine of their embeddings times a
    learned scale.

    With the `loss` "sigmoid" (SigLIP: Zhai et al. 2023, arXiv:2303.15343) a learned bias is added; all other losses are
    like "softmax" (CLIP: Radford et al. 2021, arXiv:2103.00020).
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
        """uint8 (B, 3, H, W) -> (B, E) of length 1, in fp32. With `tta` (test-time augmentation), for pictures without
        `sizes`, the mean over the `views` of each picture, again of length 1."""
        if tta:
            assert sizes is None, "a view of padding would be seen"
            return F.normalize(torch.stack([self.pictures(view) for view in views(pixels)]).sum(0), dim=1)
        return F.normalize(self.head(self.pool(*self.vision(pixels, sizes))).float(), dim=1)

    def captions(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (B, T) of int64 and their numbers without padding (B,) -> (B, E) of length 1, in fp32."""
        return F.normalize(self.text(tokens, lengths).float(), dim=1)

    def attention(self, pixels: Tensor) -> Tensor:
        """Where the embedding of a picture comes from: (B, 3, H, W) -> weights (B, h, w), which add up to 1 in each
        picture. With an attention pool its attention weights, as the mean over its heads; with a mean pool the dot
        product of each patch with the mean, where that is positive."""
        states, valid = self.vision(pixels)
        if isinstance(self.pool, MeanPool):
            each = self.head(states).float()  # (B, P, E)
            toward = torch.einsum("bpe,be->bp", each, each.mean(1)).clamp(min=0)
            weights = toward / toward.sum(1, keepdim=True)
        else:
            weights = self.pool.weights(states, valid).mean(1)
        return weights.unflatten(1, (pixels.shape[2] // self.vision.patch_size, -1))  # type: ignore[no-any-return]

    def terms(self) -> Tensor:
        """(2,): the scale, and the bias or 0."""
        with torch.no_grad():  # in place, as in CLIP: a clamp in the graph has no gradient beyond the limit
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        scale = self.log_scale.exp()
        return torch.stack([scale, torch.zeros_like(scale) if self.bias is None else self.bias])

    def logits(self, pictures: Tensor, captions: Tensor) -> Tensor:
        """(N, E) and (C, E) -> (N, C) in fp32."""
        return logits(pictures, captions, self.terms())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (N, C) -> probabilities (N, C): that a caption is the right one of the C for the picture or, with the
        sigmoid loss, that the two belong together."""
        return logits.softmax(1) if self.bias is None else logits.sigmoid()


def views(pixels: Tensor) -> Iterator[Tensor]:
    """Six views of pictures (B, 3, H, W), all of this shape: as they are, moved down and moved up by 1 / `MOVED` of
    their height (the border is filled with its mirror image), and the mirror images of these three. A picture and its
    mirror image have the same views."""
    rows = max(1, pixels.shape[2] // MOVED)
    higher = F.pad(pixels.float(), (0, 0, rows, rows), mode="reflect").to(pixels.dtype)
    for moved in (pixels, higher[:, :, :-2 * rows], higher[:, :, 2 * rows:]):
        yield moved
        yield moved.flip(3)


class MeanPool(nn.Module):
    """The mean of the patches that are no padding. With convolutions it learns faster than an attention pool, whose
    query must be learned first."""

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, P, D), 0 where `valid` (B, P) is false -> (B, D)."""
        return x.mean(1) if valid is None else x.sum(1) / valid.sum(1, keepdim=True)


def logits(pictures: Tensor, captions: Tensor, terms: Tensor) -> Tensor:
    """(N, E), (C, E), scale and bias (2,) -> (N, C) in fp32."""
    with torch.autocast(pictures.device.type, enabled=False):
        return pictures @ captions.T * terms[0] + terms[1]


# -- losses ---------------------------------------------------------------------------------------------------------


def alike(pictures: Tensor, captions: Tensor) -> Tensor:
    """(B, B) of bool: whether picture i and caption j, of different pairs, belong together nevertheless, since the two
    pairs have the same caption or the same picture. The losses leave these out. `pictures` and `captions` (B,) are
    their numbers in the data set."""
    same = (pictures[:, None] == pictures) | (captions[:, None] == captions)
    return same.fill_diagonal_(False)


def softmax_loss(logits: Tensor, alike: Tensor, reduction: str = "sum") -> Tensor:
    """Logits (B, B) of pictures and captions -> the sum over the pairs of the mean of two cross-entropies: that of the
    caption among those of the batch, and that of the picture; with reduction "none" that mean for each pair (B,)."""
    logits, own = logits.masked_fill(alike, -torch.inf), torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own, reduction=reduction) + F.cross_entropy(logits.T, own, reduction=reduction)) / 2


def sigmoid_loss(logits: Tensor, alike: Tensor, reduction: str = "sum") -> Tensor:
    """Logits (B, B) -> the sum over all pictures and captions of the binary cross-entropy of whether they belong
    together; with reduction "none" the sum over the captions, for each picture (B,)."""
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    each = F.logsigmoid(sign * logits).masked_fill(alike, 0)
    return -(each.sum() if reduction == "sum" else each.sum(1))


LOSS_FUNCTIONS = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def right_ones(logits: Tensor, alike: Tensor) -> Tensor:
    """How many pictures of a batch have their own caption as the nearest."""
    own = torch.arange(len(logits), device=logits.device)
    return (logits.masked_fill(alike, -torch.inf).argmax(1) == own).sum()
