"""Changes of training speech: as if said by others, elsewhere, into another microphone, over another line.

Those of the sound itself are made here, one recording at a time; those of the spectrogram in
`stoker.model.spectral_changes`, for a whole batch.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from stoker.data.speech import audio

SPEED_STEPS = 100  # the factors of speed are fractions with this denominator
SEMITONES = 12  # of an octave
QUIETER, FLOOR = 25, 65  # dB below their bound: the most for half of the rows, and for all
SLOPES = np.arange(-0.5, 3.0, 0.5)  # the power of noise falls as 1 / f**slope: from blue over white and pink to brown
NOISE, ROOMS = 2**19, 24  # samples of each noise; impulse responses
LOWEST = 60  # Hz, below which noise grows no more
FFT_SIZES = 4096  # the size of a Fourier transform is a multiple: without large prime factors it is fast
BITS = 4, 8  # of samples that are quantized by their logarithm
SPEAKERS = 4  # at most that talk in the background


class Sound(NamedTuple):
    """A changed recording. `pitch`: how much higher it was made by playing it faster; the spectrogram is made as much
    longer."""

    samples: np.ndarray  # (N,) float32 in [-1, 1], 16 kHz
    pitch: float = 1.0
    unchanged: bool = False  # and so the spectrogram shall be


@dataclass(frozen=True)
class Augmentation:
    """What is changed, within which bounds; 0: not."""

    speed: float = 0.0  # 0.1: between 0.9 and 1.1 times as fast, and as high
    pitch: float = 0.0  # semitones up or down
    silence: float = 0.0  # seconds at most, before and after
    reverb: float = 0.0  # share of the rows that are heard in a room
    noise: float = 0.0  # dB: noise of any colour, in half of the rows so far below the speech or up to QUIETER more, in
    # the others from QUIETER to FLOOR more, as from a quiet microphone
    babble: float = 0.0  # dB: in half of the rows other people, so far below at least
    clip: float = 0.0  # share of the rows whose loudest samples are cut off
    codec: float = 0.0  # share of the rows that are coded with few bits
    gain: float = 0.0  # dB by which it becomes louder or quieter towards its end
    unchanged: float = 0.0  # share of the rows that stay as they are

    def __call__(self, samples: np.ndarray, draw: np.random.Generator,
                 other: Callable[[float], np.ndarray] | None = None) -> Sound:
        """(N,) -> (N',), float32. `other` returns another recording for a number in [0, 1). Draws the same numbers
        whatever is switched off."""
        speed, semitones, gain = draw.uniform(-1, 1, 3)
        before, after, heard_in_room, room, noisy, colour, place, fainter = draw.random(8)
        crowded, quieter, clipped, ceiling, coded, coder, bits, left_alone = draw.random(8)
        if left_alone < self.unchanged:
            return Sound(samples, unchanged=True)
        faster = 1 + speed * self.speed
        steps = int((faster * 2 ** (semitones * self.pitch / SEMITONES) - 1) * SPEED_STEPS)  # no faster than asked for
        pitch = (1 + steps / SPEED_STEPS) / faster if self.pitch else 1.0
        if steps:
            samples = audio.resampled(samples, SPEED_STEPS + steps, SPEED_STEPS)
        level = loudness(samples)
        if self.silence:
            samples = np.pad(samples, [int(self.silence * share * audio.RATE) for share in (before, after)])
        if heard_in_room < self.reverb:
            samples = reverberant(samples, int(room * ROOMS))
        if self.noise:  # also that of a quiet microphone: nothing but a computer is wholly silent between words
            below = self.noise + (QUIETER * fainter if noisy < 0.5 else QUIETER + (FLOOR - QUIETER) * fainter)
            samples = samples + _scaled(_noise(int(colour * len(SLOPES)), place, len(samples)), level, below)
        if self.babble and crowded < 0.5 and other:
            samples = samples + _scaled(_babble(other, draw, len(samples)), level, self.babble + QUIETER * quieter)
        if clipped < self.clip:
            most = float(np.abs(samples).max(initial=0)) * (0.2 + 0.6 * ceiling)
            samples = np.clip(samples, -most, most)
        if coded < self.codec:
            samples = _coded(samples, coder, BITS[0] + int(bits * (BITS[1] - BITS[0])))
        if self.gain:  # the level of the whole makes no difference to the spectrogram
            samples = samples * np.linspace(1, 10 ** (gain * self.gain / 20), len(samples), dtype=np.float32)
        return Sound((samples / max(1.0, float(np.abs(samples).max(initial=0)))).astype(np.float32), pitch)


def loudness(samples: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(samples)))) if len(samples) else 0.0


def _scaled(sound: np.ndarray, level: float, below: float) -> np.ndarray:
    """A sound `below` dB quieter than `level`; one that is silent stays so."""
    return sound * np.float32(level * 10 ** (-below / 20) / (loudness(sound) or 1))


def reverberant(samples: np.ndarray, room: int) -> np.ndarray:
    """(N,) as heard in one of ROOMS rooms."""
    size = len(samples) + len(_response(room))
    size += -size % FFT_SIZES
    spectrum = np.fft.rfft(samples, size) * np.fft.rfft(_response(room), size)
    found: np.ndarray = np.fft.irfft(spectrum, size)[:len(samples)]
    return found


@lru_cache(maxsize=None)
def _response(room: int) -> np.ndarray:
    """The impulse response of a room: the direct sound, then noise that falls by 60 dB in 0.08 to 0.6 s (Polack 1988's
    model of reverberation), between 2 dB louder than the direct sound and 18 dB quieter."""
    draw = np.random.default_rng((ROOMS, room))
    seconds = draw.uniform(0.08, 0.6)
    times = np.arange(int(min(seconds, 0.5) * audio.RATE)) / audio.RATE
    response = draw.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    response[:audio.RATE // 500] = 0  # the first wall is at least 30 cm away
    response *= 10 ** (draw.uniform(-18, 2) / 20) / np.sqrt(np.sum(response**2))
    response[0] = 1
    return response.astype(np.float32)


def _noise(colour: int, place: float, count: int) -> np.ndarray:
    """(count,) of the noise whose power falls as 1 / f**SLOPES[colour], from somewhere in it."""
    noise = _noises(colour)
    start = int(place * len(noise))
    return noise.take(np.arange(start, start + count), mode="wrap") if start + count > len(noise) else (
        noise[start:start + count])


@lru_cache(maxsize=None)
def _noises(colour: int) -> np.ndarray:
    spectrum = np.fft.rfft(np.random.default_rng((NOISE, colour)).standard_normal(NOISE, np.float32))
    frequencies = np.maximum(np.fft.rfftfreq(NOISE, 1 / audio.RATE), LOWEST)
    return np.fft.irfft(spectrum * frequencies ** (-SLOPES[colour] / 2)).astype(np.float32)


def _babble(other: Callable[[float], np.ndarray], draw: np.random.Generator, count: int) -> np.ndarray:
    """(count,): one to SPEAKERS other recordings at once."""
    found = np.zeros(count, np.float32)
    for place in draw.random(1 + int(draw.integers(SPEAKERS))):
        voice = other(float(place))[:count]
        found[:len(voice)] += voice
    return found


def _coded(samples: np.ndarray, coder: float, bits: int) -> np.ndarray:
    """As a telephone sends it: quantized by its logarithm (mu-law, ITU-T G.711), or, for one in three, by ADPCM."""
    loudest = float(np.abs(samples).max(initial=0))
    if not loudest:
        return samples
    samples = samples / loudest
    if coder < 1 / 3:
        return _adpcm(samples) * loudest
    mu, steps = 255.0, 2.0 ** (bits - 1)
    sizes = np.round(np.log1p(mu * np.abs(samples)) / math.log1p(mu) * steps) / steps
    return np.copysign(np.expm1(sizes * math.log1p(mu)) / mu * loudest, samples)


def _adpcm(samples: np.ndarray) -> np.ndarray:
    """(N,) in [-1, 1], with 4 bits a sample (IMA ADPCM)."""
    import soundfile  # type: ignore[import-untyped]

    file = io.BytesIO()
    soundfile.write(file, samples, audio.RATE, format="WAV", subtype="IMA_ADPCM")
    file.seek(0)
    found: np.ndarray = soundfile.read(file, dtype="float32")[0][:len(samples)]
    return found
