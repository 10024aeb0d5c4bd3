"""What a talker is trained by: front end, codec, aligner, talker.

Axes: B batch, T mel frames (100 a second), F frames of codes, M mel bands, S symbols of a text, Q books, K entries.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stoker.model import ctc
from stoker.model.codec import Codec, Encoder
from stoker.model.mel import FRAME_RATE, LogMel
from stoker.model.talker import LONGEST, Choice, Places, Stream, Talker, places
from stoker.model.vocoder import SpectralVocoder

ALIGNED = 2  # mel frames to a frame of the aligner, which so has 50 a second
LATE = 2.0  # frames of the aligner between the beginning of a sound and that of its label


class Speaking(nn.Module):
    """A codec of speech, an aligner that finds where each symbol of a text is said, and a talker that writes codes.

    The symbols of a text have a silence before and after them; `blank` is the aligner's label for no symbol.
    """

    def __init__(self, num_mels: int, codec: Codec, aligner: Encoder, talker: Talker, blank: int):
        super().__init__()
        self.mel, self.codec, self.aligner, self.talker, self.blank = LogMel(num_mels), codec, aligner, talker, blank

    def alignable(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the symbols in each frame of the aligner (B, T / 2, V), and how many of these count (B,)."""
        return self.aligner(mel, frames)  # type: ignore[no-any-return]

    @torch.no_grad()
    def durations(self, mel: Tensor, frames: Tensor, symbols: Sequence[Sequence[int]], lengths: Tensor) -> Tensor:
        """How many frames of codes each symbol lasts (B, S), by the likeliest alignment; those of a text add up to
        `lengths` (B,)."""
        logits, counts = self.alignable(mel, frames)
        log_probs = logits.float().log_softmax(-1).cpu().numpy()
        begun = ctc.starts(log_probs, counts.tolist(), symbols, blank=self.blank)
        found = torch.zeros(len(symbols), max(map(len, symbols)))
        for row, (starts, length) in enumerate(zip(begun, lengths.tolist())):
            at = (torch.from_numpy(starts).float() - LATE).clamp(min=0) * (ALIGNED / self.codec.fold)
            at[0] = 0.0
            edges = torch.cat([at.clamp(max=length), torch.tensor([float(length)])])
            found[row, :len(starts)] = edges.diff()
        return found.to(mel.device)

    @torch.no_grad()
    def speak(self, symbols: Tensor, sizes: Tensor, voices: Tensor, choose: Choice,
              durations: Tensor | None = None) -> tuple[Tensor, Tensor, Places]:
        """Texts (B, S), how many symbols of each count (B,), voices (B,) -> spectrograms (B, T, M), how many frames of
        each count (B,), and where in the texts they are. `durations` (B, S), by default those that the talker expects.
        """
        talker = self.talker
        where = places(self._expected(symbols, sizes, voices) if durations is None else durations, sizes)
        mel = self._said(talker.frames(symbols, sizes, voices, where), where.lengths, choose)
        return mel, where.lengths * self.codec.fold, where

    def _said(self, x: Tensor, lengths: Tensor, choose: Choice) -> Tensor:
        """Spectrograms (B, T, M) of what the text says to each frame (B, F, D). A parallel talker that draws nothing
        decodes the vectors to be expected, which are nearer to what was meant than those of the likeliest codes."""
        if self.talker.autoregressive or choose is not likeliest:
            return self.codec.decode(self.talker.spoken(x, lengths, choose))
        vectors = self.codec.quantizer.expected(self.talker.probabilities(x, lengths))
        return self.codec.decoder(vectors)  # type: ignore[no-any-return]

    def stream(self, symbols: Tensor, voices: Tensor, choose: Choice, make: Callable[[Tensor], Tensor], *,
               rate: float = 1.0) -> Iterator[Tensor]:
        """The sound that `make` makes of one text (1, S) in a voice (1,), block by block (1, N): as soon as its frames
        are written where `make` can stream, else all at once."""
        talker, sizes = self.talker, torch.tensor([symbols.shape[1]], device=symbols.device)
        where = places(self._expected(symbols, sizes, voices) / rate, sizes)
        x = talker.frames(symbols, sizes, voices, where)
        if not (talker.autoregressive and isinstance(make, SpectralVocoder)):
            yield make(self._said(x, where.lengths, choose).float())
            return
        state, decoded, sounding = Stream(None, None), None, None  # of talker, codec, vocoder
        for frame in x.split(1, 1):
            codes, state = talker.next_frame(frame, state, choose)
            mel, decoded = self.codec.decode_next(codes, decoded)
            sound, sounding = make.stream(mel, sounding)
            yield sound
        assert sounding
        yield make.end(sounding)

    def _expected(self, symbols: Tensor, sizes: Tensor, voices: Tensor) -> Tensor:
        """Durations (B, S). No symbol lasts longer than LONGEST seconds, so no text is babbled about without an end."""
        longest = LONGEST * FRAME_RATE / self.codec.fold
        return self.talker.durations(symbols, sizes, voices).clamp(max=longest)


def likeliest(logits: Tensor) -> Tensor:
    """(B, F, K) -> (B, F)."""
    return logits.argmax(-1)


class Drawn:
    """Chooses codes at random by their probabilities at a temperature; 0: the likeliest."""

    def __init__(self, temperature: float, generator: torch.Generator):
        self.temperature, self.generator = temperature, generator

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, F, K) -> (B, F)."""
        if not self.temperature:
            return likeliest(logits)
        probabilities = (logits.float() / self.temperature).softmax(-1).flatten(0, 1)
        return torch.multinomial(probabilities, 1, generator=self.generator).view(logits.shape[:-1])
