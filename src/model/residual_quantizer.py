"""Residual vector quantization: a vector becomes the sum of one entry of each of several codebooks.

Each book quantizes what the books before it left (Zeghidour et al. 2021, arXiv:2107.03312). The entries are exponential
moving averages of the vectors that chose them (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1), so no
gradient trains them; entries that hardly anything chooses move beside the most used ones. The gradient of the output
passes straight through to the input.

Axes: B batch, T frames, L numbers of a vector, Q books, K entries of a book, P vectors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

DEAD = 0.03  # an entry is dead where fewer vectors choose it than this share of an entry's fair share
TINY = 1e-6
ITERATIONS = 20  # of k-means


class Quantized(NamedTuple):
    """`vectors` (B, T, L), the sums of the chosen entries, with the gradient of the input. `codes` (B, T, Q).
    `distance`: the sum, over frames that count and all books in use, of the mean squared difference between what a book
    quantizes and its entry; its gradient goes to the input alone (commitment loss)."""

    vectors: Tensor
    codes: Tensor
    distance: Tensor


class Codebook(nn.Module):
    """K vectors of L numbers. In training mode it sums what it needs for its averages (`core.sums.Summed`).

    `decay`: how much of the averages remains after a step.
    """

    entries: Tensor  # (K, L)
    uses: Tensor  # (K,), vectors of a step that chose an entry, averaged over steps
    totals: Tensor  # (K, L), their sum, averaged as well
    spread: Tensor  # (K,), their squared distance from the entry, averaged as well
    directions: Tensor  # (K, L), of length 1, in which an entry leaves the one that it is revived beside

    def __init__(self, num_entries: int, size: int, decay: float):
        super().__init__()
        self.decay, self.sums = decay, dict[str, Tensor]()
        self.register_buffer("entries", torch.randn(num_entries, size))
        self.register_buffer("uses", torch.ones(num_entries))
        self.register_buffer("totals", self.entries.clone())
        self.register_buffer("spread", torch.ones(num_entries))
        fixed = torch.Generator().manual_seed(num_entries)
        self.register_buffer("directions", nn.functional.normalize(
            torch.randn(num_entries, size, generator=fixed), dim=1), persistent=False)

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        """(B, T, L), which vectors count for the averages (B, T) -> the nearest entries' numbers (B, T)."""
        codes = self.nearest(x)
        if self.training:
            found = self.sums_of(x.flatten(0, 1), codes.flatten(), counted.flatten())
            self.sums = {name: total + self.sums[name] if name in self.sums else total for name, total in found.items()}
        return codes

    def nearest(self, x: Tensor) -> Tensor:
        """(B, T, L) -> the numbers of the nearest entries (B, T)."""
        return (x @ self.entries.T - self.entries.square().sum(1) / 2).argmax(-1)

    def sums_of(self, x: Tensor, codes: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
        """What the averages are of, for vectors (P, L), their codes (P,), and whether they count (P,), by default all.
        """
        none, one = torch.zeros_like(self.uses), torch.ones_like(x[:, 0]) if counted is None else counted.to(x)
        distances = (x - self.entries[codes]).square().sum(1)
        return {"uses": none.index_add(0, codes, one), "spread": none.index_add(0, codes, distances * one),
                "totals": torch.zeros_like(self.totals).index_add(0, codes, x * one[:, None])}

    def apply_sums(self, sums: dict[str, Tensor], dropped: Tensor) -> None:
        """Move the entries to the averages of what chose them, dead ones beside the most used ones."""
        for name, total in sums.items():
            average = getattr(self, name)
            average.copy_(torch.where(dropped.bool(), average, average.lerp(total, 1 - self.decay)))
        self._revive(~dropped.bool())
        self.entries.copy_(self.totals / self.uses.clamp(min=TINY)[:, None])

    def _revive(self, wanted: Tensor) -> None:
        """The most used entry gives half of what chose it to the least used one, if that is dead; the second most used
        one to the second least used one, and so on."""
        half = len(self.uses) // 2
        order = self.uses.argsort(descending=True, stable=True)
        giver, taker = order[:half], order.flip(0)[:half]
        dead = (self.uses[taker] < DEAD * self.uses.mean()) & wanted
        given = self.uses[giver].clamp(min=TINY)
        centre = self.totals[giver] / given[:, None]
        away = (self.spread[giver] / given).sqrt()[:, None] * self.directions[taker] / 2
        spread = self.spread[giver] / 2
        for entry, vectors in ((giver, centre - away), (taker, centre + away)):
            self.uses[entry] = torch.where(dead, given / 2, self.uses[entry])
            self.spread[entry] = torch.where(dead, spread, self.spread[entry])
            self.totals[entry] = torch.where(dead[:, None], vectors * given[:, None] / 2, self.totals[entry])


class ResidualQuantizer(nn.Module):
    """Q books of K entries, each for what the books before it left."""

    books: "Sequence[Codebook]"

    def __init__(self, num_books: int, num_entries: int, size: int, decay: float = 0.97):
        super().__init__()
        self.books = nn.ModuleList(Codebook(num_entries, size, decay) for _ in range(num_books))  # type: ignore[assignment]

    def forward(self, x: Tensor, valid: Tensor, used: Tensor | None = None) -> Quantized:
        """(B, T, L), which frames count (B, T), and how many books each row uses (B,), by default all. In fp32 whatever
        the precision of the rest. Codes of books that are not used are those that they would choose."""
        with torch.autocast(x.device.type, enabled=False):
            left, total = x.float(), torch.zeros_like(x, dtype=torch.float32)
            codes, distance = list[Tensor](), x.new_zeros((), dtype=torch.float32)
            for number, book in enumerate(self.books):
                counted = valid if used is None else valid & (number < used)[:, None]
                codes.append(book(left.detach(), counted))
                chosen = book.entries[codes[-1]] * counted[..., None]
                distance = distance + ((left - chosen).square().mean(-1) * counted).sum()
                left, total = left - chosen, total + chosen
            return Quantized(total + (x - x.detach()), torch.stack(codes, -1), distance)  # exactly what is decoded

    def codes(self, x: Tensor) -> Tensor:
        """(B, T, L) -> (B, T, Q), without the sums that the averages need."""
        with torch.autocast(x.device.type, enabled=False):
            left, found = x.float(), list[Tensor]()
            for book in self.books:
                found.append(book.nearest(left))
                left = left - book.entries[found[-1]]
            return torch.stack(found, -1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes of the first books (B, T, Q') -> (B, T, L), the sums of their entries."""
        return torch.stack([book.entries[codes[..., number]]
                            for number, book in zip(range(codes.shape[-1]), self.books)]).sum(0)

    def expected(self, probabilities: Tensor) -> Tensor:
        """How likely each entry of each book is (B, T, Q, K) -> the vectors to be expected (B, T, L)."""
        entries = torch.stack([book.entries for book in self.books])  # (Q, K, L)
        return torch.einsum("btqk,qkl->btl", probabilities.float(), entries)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the entries by k-means of vectors (P, L), P at least K: the books one after another, each on what those
        before it left."""
        for book in self.books:
            book.entries.copy_(k_means(x, len(book.entries)))
            codes = book(x[None], torch.ones(1, len(x), dtype=torch.bool, device=x.device))[0]
            for name, total in book.sums_of(x, codes).items():
                getattr(book, name).copy_(total * len(book.entries) / len(x))  # little: the first steps count for more
            x = x - book.entries[codes]


def k_means(x: Tensor, K: int) -> Tensor:
    """(P, L) -> the centres of K clusters (K, L) (Lloyd 1982), from K of the vectors drawn at random. A cluster that
    loses all its vectors stays where it was."""
    centres = x[torch.randperm(len(x), device=x.device)[:K]].clone()
    for _ in range(ITERATIONS):
        codes = (x @ centres.T - centres.square().sum(1) / 2).argmax(1)
        uses = torch.zeros(K, device=x.device).index_add(0, codes, torch.ones(len(x), device=x.device))
        totals = torch.zeros_like(centres).index_add(0, codes, x)
        centres = torch.where((uses > 0)[:, None], totals / uses.clamp(min=1)[:, None], centres)
    return centres
