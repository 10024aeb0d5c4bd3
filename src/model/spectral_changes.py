"""Changes of normalised log-mel spectrograms in training, for a whole batch at once: another vocal tract, another
rhythm, another microphone or line, and what SpecAugment blanks out.

Axes: B batch, T frames (100 a second), M mel bands, K knots, N random numbers of a row. Each row's changes depend on
its own random numbers alone.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from stoker.model.mel import RANGE, SAMPLE_RATE
from stoker.model.transformer import valid_places

NYQUIST = SAMPLE_RATE / 2
LINEAR, PER_OCTAVE = 3 / 200, 27 / math.log(6.4)  # Slaney's scale: mels for each Hz up to 1,000, then by the logarithm
TRACT = 100.0, 400.0, 1000.0, 2500.0, 5500.0  # Hz, at each of which a vocal tract may differ by itself
FIXED_FROM = 4800.0  # Hz: above, what is moved is moved less, up to nothing at the highest
MICROPHONE = tuple(80 * 100 ** (place / 7) for place in range(8))  # Hz, 80 to 8,000, at which its gain is drawn
HIGH_PASS, LOW_PASS = (100.0, 400.0), (2800.0, 4200.0)  # Hz: where the bands of a narrow line may begin and end
TEMPOS = 6  # places in a recording, from its start to its end, at which its tempo is drawn
FINE = 256  # steps in which time is warped
STEP, BANDS = 12, 8  # frames between the places at which a field of elastic deformations is drawn; places in frequency
FRAMES, DECIBELS = 16, 40  # by which an elastic deformation moves and amplifies, for each octave that it moves up
PARTS = 1 + len(TRACT), len(MICROPHONE), 4, 1, TEMPOS  # random numbers for each change
NUMBERS = sum(PARTS)
DECIBEL = 1 / (10 * RANGE / 2)  # in a normalised spectrogram, where RANGE powers of ten are from -1 to 1


@dataclass(frozen=True)
class SpectralChanges:
    """What is changed, within which bounds; 0: not."""

    warp: float = 0.0  # 0.15: formants up to 0.15 octaves up or down, each of five regions by a third of that more
    colour: float = 0.0  # dB up or down, by frequency
    narrow: float = 0.0  # share of the rows that lose low frequencies, and share of those that lose high ones
    contrast: float = 0.0  # 0.2: loud and quiet up to a fifth further apart, or nearer
    rhythm: float = 0.0  # 0.25: parts of a recording up to about a quarter faster or slower than the rest
    elastic: float = 0.0  # octaves: standard deviation of moves up and down that differ from place to place

    def __call__(self, mel: Tensor, frames: Tensor, draws: Tensor, fields: Tensor,
                 pitch: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M), how many frames of each count (B,), random numbers (B, NUMBERS) in [0, 1), normal random numbers
        (B, 3, P, BANDS), at least P = places(T'), how much higher each recording was made by playing it faster (B,) ->
        (B, T', M), frames (B,). Without changes the same bits."""
        tract, microphone, line, contrast, tempo = (2 * draws - 1).split(PARTS, 1)
        louder = self.colour * (microphone @ _between(MICROPHONE, mel.shape[2]).to(mel))[:, None]
        if self.warp or self.rhythm or self.elastic or (pitch != 1).any():
            bands = _bands(self.warp * (tract[:, :1] + tract[:, 1:] / 3), mel)
            times, longer = _times(frames, pitch, self.rhythm * tempo)
            if self.elastic:
                up, later, more = _fine(self.elastic * fields, times.shape[1], mel.shape[2])
                bands, louder = bands - up / _octaves_a_band(mel.shape[2]).to(mel), louder + DECIBELS * more
                times = torch.minimum(times - FRAMES * later, (frames[:, None, None] - 1).clamp(min=0))
            mel, frames = _read_at(mel, times, bands), longer
            mel = mel.masked_fill(~valid_places(frames, mel.shape[1])[..., None], 0)
        if not (self.colour or self.narrow or self.contrast or self.elastic):
            return mel, frames
        mel = mel + DECIBEL * louder
        if self.narrow:
            mel = mel.masked_fill(self._lost(line, mel.shape[2])[:, None], -torch.inf)
        return _relative(mel, frames, 1 + self.contrast * contrast), frames

    def _lost(self, line: Tensor, M: int) -> Tensor:
        """(B, 4) in [-1, 1) -> (B, M): whether a band is one that does not pass."""
        chosen, places = line.chunk(2, 1)
        low, high = (lowest + (highest - lowest) * (place + 1) / 2
                     for (lowest, highest), place in zip((HIGH_PASS, LOW_PASS), places.split(1, 1)))
        centres = _centres(M).to(line)
        narrow = chosen.abs() > 1 - self.narrow
        lost: Tensor = ((centres < low) & narrow[:, :1]) | ((centres > high) & narrow[:, 1:])
        return lost


def places(T: int) -> int:
    """At how many places in time a field is drawn for T frames."""
    return -(-T // STEP) + 1


def _fine(fields: Tensor, T: int, M: int) -> Tensor:
    """(B, 3, P, BANDS) -> 3 of (B, T, M), linear between the places at which they were drawn: how far what is at a
    place moves up, in octaves, and later, and how much louder it becomes (elastic deformations: Simard et al. 2003, of
    written digits)."""
    size = (fields.shape[2] - 1) * STEP + 1, M
    return F.interpolate(fields, size, mode="bilinear", align_corners=True)[:, :, :T].transpose(0, 1)


def _times(frames: Tensor, pitch: Tensor, tempos: Tensor) -> tuple[Tensor, Tensor]:
    """The place in time that each frame shows (B, T', 1), and how many frames count (B,), of recordings that are made
    `pitch` (B,) times as long, their parts at different tempos, of logarithms (B, TEMPOS)."""
    # one more, of which playing it faster left a part: there are never fewer frames for the labels than before
    longer = torch.where(pitch == 1, frames, ((frames + 1) * pitch).ceil().long()).clamp(min=1)
    share = torch.arange(int(longer.max()), device=pitch.device) / (longer[:, None] - 1).clamp(min=1)  # (B, T')
    knots = torch.linspace(0, TEMPOS - 1, FINE + 1, device=pitch.device).expand(len(pitch), -1)
    speed = _between_neighbours(tempos, knots).exp()
    passed = F.pad((speed[:, 1:] + speed[:, :-1]).cumsum(1), (1, 0))
    times = _between_neighbours(passed / passed[:, -1:], share.clamp(max=1) * FINE)
    return (times * (frames[:, None] - 1))[..., None], longer


def _bands(octaves: Tensor, mel: Tensor) -> Tensor:
    """The place among the M bands that each band shows (B, 1, M), where what is heard moves up by so many octaves,
    (B, K) at the frequencies TRACT."""
    centres = _centres(mel.shape[2]).to(mel)
    up = octaves @ _between(TRACT, mel.shape[2]).to(mel) * ((NYQUIST - centres) / (NYQUIST - FIXED_FROM)).clamp(0, 1)
    return (_mels(centres * 2**-up) / _mels(torch.tensor(NYQUIST)) * (mel.shape[2] + 1) - 1)[:, None]


def _read_at(mel: Tensor, times: Tensor, bands: Tensor) -> Tensor:
    """(B, T, M) at places in time and among the bands, which broadcast to (B, T', M): bilinear between neighbours; at
    places beyond the outer ones these."""
    last = max(mel.shape[1] - 1, 1), max(mel.shape[2] - 1, 1)
    grid = torch.stack(torch.broadcast_tensors(2 * bands / last[1] - 1, 2 * times / last[0] - 1), -1)
    return F.grid_sample(mel[:, None], grid, padding_mode="border", align_corners=True)[:, 0]


def _between_neighbours(values: Tensor, places: Tensor) -> Tensor:
    """(B, P) at places (B, Q) between 0 and P - 1 -> (B, Q)."""
    left = places.floor().long().clamp(max=values.shape[1] - 2)
    before, after = values.gather(1, left), values.gather(1, left + 1)
    return before + (after - before) * (places - left)


def _relative(mel: Tensor, frames: Tensor, contrast: Tensor) -> Tensor:
    """Each recording's loudest as 1 again, what is further below it than RANGE as -1; `contrast` (B, 1) times as far
    apart."""
    valid = valid_places(frames, mel.shape[1])[..., None]
    loudest = mel.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)
    loudest = loudest.masked_fill(loudest.isinf(), 1)  # nothing counts
    return ((mel - loudest) * contrast[..., None] + 1).clamp(min=-1).masked_fill(~valid, 0)


def _mels(frequencies: Tensor) -> Tensor:
    """Hz on Slaney's scale."""
    return torch.where(frequencies < 1000, frequencies * LINEAR,
                       1000 * LINEAR + PER_OCTAVE * (frequencies.clamp(min=1000) / 1000).log())


@lru_cache(maxsize=8)
def _centres(M: int) -> Tensor:
    """The middle of each of M bands, in Hz."""
    mels = torch.linspace(0, float(_mels(torch.tensor(NYQUIST))), M + 2)[1:-1]
    return torch.where(mels < 1000 * LINEAR, mels / LINEAR, 1000 * ((mels - 1000 * LINEAR) / PER_OCTAVE).exp())


@lru_cache(maxsize=8)
def _octaves_a_band(M: int) -> Tensor:
    return torch.gradient(_centres(M).log2())[0]


@lru_cache(maxsize=8)
def _between(knots: tuple[float, ...], M: int) -> Tensor:
    """(K, M): how much of each knot's value counts in each band, linear over the logarithm of the frequency; beyond
    the outer knots theirs."""
    octaves, at = _centres(M).log2(), torch.tensor(knots).log2()
    places = torch.searchsorted(at, octaves).clamp(1, len(knots) - 1)
    share = ((octaves - at[places - 1]) / (at[places] - at[places - 1])).clamp(0, 1)
    found = torch.zeros(len(knots), M)
    found[places - 1, torch.arange(M)] = 1 - share
    found[places, torch.arange(M)] += share
    return found


# -- SpecAugment ----------------------------------------------------------------------------------------------------


def spec_augment(mel: Tensor, frames: Tensor, draws: Tensor, *, widest_band: int, longest_time: float) -> Tensor:
    """Blank out bands and stretches of time of normalised spectrograms (SpecAugment: Park et al. 2019,
    arXiv:1904.08779, without time warping).

    `draws` (B, K, 4), uniform in [0, 1): width and place of K bands, each of up to `widest_band` mel bands, and of K
    stretches, each of up to the share `longest_time` of the utterance's frames. Blank is 0, the middle of the range.
    """
    B, T, M = mel.shape
    width = (draws[..., 0] * (widest_band + 1)).floor()
    low = (draws[..., 1] * (M - width + 1)).floor()
    length = (draws[..., 2] * longest_time * frames[:, None]).floor()
    start = (draws[..., 3] * (frames[:, None] - length + 1)).floor()
    blank_bands = _within(torch.arange(M, device=mel.device), low, width)  # (B, M)
    blank_times = _within(torch.arange(T, device=mel.device), start, length)  # (B, T)
    return mel.masked_fill(blank_bands[:, None, :] | blank_times[:, :, None], 0)


def _within(places: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Whether each of P places is in any of K stretches: starts (B, K) -> (B, P)."""
    start, end = start[..., None], (start + size)[..., None]
    return ((places >= start) & (places < end)).any(1)
