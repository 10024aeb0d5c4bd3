"""Talker: text -> codes of speech.

Each symbol of the text (a character or a phone) gets a duration; each frame of codes reads the symbol that it belongs
to. So the talker cannot leave out, repeat or invent words, and stops where the text ends. The codes of a frame are
chosen book after book. Autoregressive, a frame also reads the codes of the frame before, and frames may be spoken while
the rest of the text is not there yet; parallel, all frames are computed at once.

Axes: B batch, S symbols, F frames of codes, Q books, K entries of a book, D hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.model.convnext import Blocks, State
from stoker.model.dropout import Dropout
from stoker.model.transformer import MLP, init_linear, valid_places

LONGEST = 2.0  # seconds that a symbol may last


Choice = Callable[[Tensor], Tensor]  # logits (B, F, K) -> codes (B, F)


class Stream(NamedTuple):
    """What the next frame needs of those before: the codes of the last (B, 1, Q), the state of the blocks. None at the
    start."""

    codes: Tensor | None
    state: State | None


class Places(NamedTuple):
    """Where in the text each frame is: its symbol (B, F); the frames since the symbol's start and until its end
    (B, F, 2); how many frames each text has (B,)."""

    symbols: Tensor
    within: Tensor
    lengths: Tensor


def places(durations: Tensor, sizes: Tensor) -> Places:
    """From how many frames each symbol lasts (B, S), which need not be whole numbers, and how many symbols each text
    has (B,). A frame belongs to the symbol that its middle is in; each text has at least one frame."""
    durations = durations * valid_places(sizes, durations.shape[1])
    ends = durations.cumsum(1)
    lengths = ends[:, -1].round().long().clamp(min=1)
    middles = torch.arange(int(lengths.max()), device=durations.device) + 0.5
    symbols = torch.searchsorted(ends, middles.expand(len(ends), -1).contiguous(), right=True)
    symbols = torch.minimum(symbols, (sizes - 1)[:, None])
    end = ends.gather(1, symbols)
    start = end - durations.gather(1, symbols)
    return Places(symbols, torch.stack([middles - start, end - middles], -1), lengths)


class TextEncoder(nn.Module):
    """Symbols -> a state for each, which sees no more than `reach` symbols to either side."""

    def __init__(self, num_symbols: int, d_model: int, num_layers: int, num_voices: int):
        super().__init__()
        self.symbols, self.voices = nn.Embedding(num_symbols, d_model), nn.Embedding(num_voices, d_model)
        self.blocks = Blocks(d_model, num_layers)
        self.norm = nn.LayerNorm(d_model)
        self.reach = self.blocks.reach

    def forward(self, symbols: Tensor, valid: Tensor, voices: Tensor) -> Tensor:
        """(B, S), which symbols count (B, S), and the number of each text's voice (B,) -> (B, S, D)."""
        x = self.symbols(symbols) + self.voices(voices)[:, None]
        return self.norm(self.blocks(x, valid))  # type: ignore[no-any-return]


class BookHead(nn.Module):
    """Logits of one book's entries, from the state of a frame to which the codes of the books before were added."""

    def __init__(self, d_model: int, book_size: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, 2 * d_model, 0.0)
        self.out = nn.Linear(d_model, book_size)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        return self.out(self.norm2(x + self.mlp(self.norm1(x))))  # type: ignore[no-any-return]


class Talker(nn.Module):
    """Durations of symbols, and the codes of frames. `forget`: the share of frames that do not see the codes before
    them in training, so that they rely on the text."""

    def __init__(self, *, num_symbols: int, num_books: int, book_size: int, d_model: int, num_layers: int,
                 num_voices: int = 1, autoregressive: bool = True, forget: float = 0.3, dropout: float = 0.0):
        super().__init__()
        self.autoregressive, self.forget = autoregressive, forget
        self.text = TextEncoder(num_symbols, d_model, 4, num_voices)
        self.timing = TextEncoder(num_symbols, d_model, 3, num_voices)
        self.duration = nn.Linear(d_model, 1)
        self.within = nn.Linear(4, d_model)
        self.codes = nn.ModuleList(nn.Embedding(book_size, d_model) for _ in range(num_books))  # of the frame before
        self.chosen = nn.ModuleList(nn.Embedding(book_size, d_model) for _ in range(num_books - 1))  # of this frame
        self.dropout = Dropout(dropout)
        self.blocks = Blocks(d_model, num_layers, causal=autoregressive)
        self.heads = nn.ModuleList(BookHead(d_model, book_size) for _ in range(num_books))
        for embedding in (*self.codes, *self.chosen):
            nn.init.normal_(embedding.weight, std=0.3)
        init_linear(self.within)

    def durations(self, symbols: Tensor, sizes: Tensor, voices: Tensor) -> Tensor:
        """(B, S), how many symbols of each text count (B,), voices (B,) -> frames that each symbol lasts (B, S)."""
        valid = valid_places(sizes, symbols.shape[1])
        states = self.timing(symbols, valid, voices)
        return F.softplus(self.duration(states)[..., 0].float()) * valid

    def frames(self, symbols: Tensor, sizes: Tensor, voices: Tensor, where: Places) -> Tensor:
        """What the text says to each frame (B, F, D)."""
        text = self.text(symbols, valid_places(sizes, symbols.shape[1]), voices)
        read = text.gather(1, where.symbols[..., None].expand(-1, -1, text.shape[2]))
        within = torch.cat([where.within, 1 / (where.within.abs() + 1)], -1)
        return read + self.within(within.to(text.dtype))  # type: ignore[no-any-return]

    def forward(self, symbols: Tensor, sizes: Tensor, voices: Tensor, where: Places, codes: Tensor) -> Tensor:
        """With the true codes (B, F, Q) -> logits (B, F, Q, K); those of a frame see no code of it that comes later,
        nor any of later frames."""
        x = self.frames(symbols, sizes, voices, where)
        if self.autoregressive:
            before = F.pad(self._embedded(codes), (0, 0, 1, -1))
            if self.training:
                before = before * (torch.rand(before.shape[:2], device=x.device) >= self.forget)[..., None]
            x = x + before
        x = self.blocks(self.dropout(x), valid_places(where.lengths, x.shape[1]))
        logits = []
        for book, head in enumerate(self.heads):
            logits.append(head(x))
            if book < len(self.chosen):
                x = x + self.chosen[book](codes[..., book])
        return torch.stack(logits, 2)

    def _embedded(self, codes: Tensor) -> Tensor:
        """(B, F, Q) -> (B, F, D)."""
        return torch.stack([embedding(codes[..., book]) for book, embedding in enumerate(self.codes)]).sum(0)

    @torch.no_grad()
    def spoken(self, x: Tensor, lengths: Tensor, choose: "Choice") -> Tensor:
        """From what the text says to each frame (B, F, D) -> codes (B, F, Q), frame by frame unless parallel."""
        if not self.autoregressive:
            return self._books(self.blocks(x, valid_places(lengths, x.shape[1])), choose)
        stream = Stream(None, None)
        found = []
        for frame in x.split(1, 1):
            codes, stream = self.next_frame(frame, stream, choose)
            found.append(codes)
        return torch.cat(found, 1)

    @torch.no_grad()
    def probabilities(self, x: Tensor, lengths: Tensor) -> Tensor:
        """From what the text says to each frame (B, F, D) -> how likely each entry of each book is (B, F, Q, K), given
        the likeliest ones of the books before. For a parallel talker."""
        found = list[Tensor]()

        def likeliest(logits: Tensor) -> Tensor:
            found.append(logits.softmax(-1))
            return logits.argmax(-1)

        self._books(self.blocks(x, valid_places(lengths, x.shape[1])), likeliest)
        return torch.stack(found, 2)

    def next_frame(self, x: Tensor, stream: "Stream", choose: "Choice") -> "tuple[Tensor, Stream]":
        """The codes of the next frame (B, 1, Q), from what the text says to it (B, 1, D) and the frames before."""
        before = 0 if stream.codes is None else self._embedded(stream.codes)
        y, state = self.blocks.stream(x + before, stream.state)
        codes = self._books(y, choose)
        return codes, Stream(codes, state)

    def _books(self, x: Tensor, choose: "Choice") -> Tensor:
        """States of frames (B, F, D) -> codes (B, F, Q)."""
        codes = list[Tensor]()
        for book, head in enumerate(self.heads):
            codes.append(choose(head(x).float()))
            if book < len(self.chosen):
                x = x + self.chosen[book](codes[-1])
        return torch.stack(codes, -1)
