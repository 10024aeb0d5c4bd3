"""A long recording in pieces, cut at pauses, so that no word is cut and memory does not grow with the length.

    for piece in pieces(audio.blocks(path, survey), PAUSES["pauses"](survey.peak), longest=160_000):
        ...                       # piece.samples of the recording from sample piece.start on

Pieces follow one another without a gap; those without speech are marked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stoker.data.speech import audio

PART = 60 * audio.RATE  # samples that are searched for pauses at once
FRAME = audio.RATE // 50  # samples whose loudness is measured
PAUSE = audio.RATE // 5  # samples: closures within a word are shorter
EDGE = 3 * audio.RATE // 100  # samples of a pause that stay with the speech beside it: models that are trained on
# recordings without silence around the speech understand little of it where there is a tenth of a second
QUIET = 10  # per cent of the frames are fainter than the noise floor
SHARE = 0.2  # of the way, in dB, from the noise floor to the loudest frame: what is fainter is no speech
STEADY = 6.0  # dB between the two: speech varies more
FAINT = 40.0  # dB below the recording's peak
DEEPEST = 50.0  # dB below the loudest frame, at which the noise floor is at least: digital silence is no noise

Pause = tuple[int, int]  # its first sample and the one after its last
FindPauses = Callable[[np.ndarray], list[Pause]]  # (N,) float32 at 16 kHz -> pauses, in order


class Piece(NamedTuple):
    start: int  # the first sample, counted from the beginning of the recording
    samples: np.ndarray  # (N,) float32 at 16 kHz
    speech: bool = True


def pieces(blocks: Iterable[np.ndarray], find_pauses: FindPauses, *, longest: int) -> Iterator[Piece]:
    """Cut a sound, which comes in blocks, at its pauses. A pause is a piece without speech, all but its edges, which
    belong to the pieces beside it.

    A part of PART samples, or twice `longest`, without any pause is cut at its quietest place among the last `longest`
    samples.
    """
    stream, size = iter(blocks), max(PART, 2 * longest)
    held, start, is_last = np.zeros(0, np.float32), 0, False
    while not is_last:
        held = _filled(held, stream, size)
        part, is_last, begin = held[:size], len(held) <= size, 0
        for end, speech in _ends(part, find_pauses(part), is_last, longest):
            yield Piece(start + begin, part[begin:end], speech)
            begin = end
        held, start = held[begin:], start + begin


def whole(samples: np.ndarray) -> list[Pause]:
    """No pauses: the recording is heard in windows."""
    return []


def by_energy(peak: float) -> FindPauses:
    """Pauses by loudness, in a recording with that peak: what is not much louder than the noise around it."""

    def find(samples: np.ndarray) -> list[Pause]:
        frames = samples[:len(samples) // FRAME * FRAME].reshape(-1, FRAME)
        if not len(frames):
            return []
        level = 10 * np.log10(frames.var(1) + 1e-12)
        loud = level.max()
        floor = max(np.percentile(level, QUIET), loud - DEEPEST)
        if loud - floor < STEADY:
            is_faint = loud < 20 * np.log10(peak) - FAINT
            return [(0, len(samples))] if is_faint else []
        return _runs(level < floor + SHARE * (loud - floor), len(samples))

    return find


def by_silero(peak: float) -> FindPauses:
    """Pauses by silero-vad, a small network that finds the stretches with speech; it must be installed."""
    import torch

    threads = torch.get_num_threads()
    import silero_vad  # type: ignore[import-not-found]

    torch.set_num_threads(threads)  # importing it sets them to 1, for the whole program
    model = silero_vad.load_silero_vad()

    def find(samples: np.ndarray) -> list[Pause]:
        speech = silero_vad.get_speech_timestamps(torch.from_numpy(samples), model, sampling_rate=audio.RATE)
        edges = [0, *(each[end] for each in speech for end in ("start", "end")), len(samples)]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b - a >= PAUSE]

    return find


PAUSES: dict[str, Callable[[float], FindPauses]] = {
    "pauses": by_energy, "silero": by_silero, "windows": lambda peak: whole}


# -- where to cut ---------------------------------------------------------------------------------------------------


def _filled(held: np.ndarray, stream: Iterator[np.ndarray], size: int) -> np.ndarray:
    """The samples, and blocks after them until they are more than `size` or the stream ends."""
    parts, count = [held], len(held)
    while count <= size and (block := next(stream, None)) is not None:
        parts.append(block)
        count += len(block)
    return np.concatenate(parts) if len(parts) > 1 else held


def _runs(quiet: np.ndarray, count: int) -> list[Pause]:
    """The stretches of at least PAUSE samples whose frames are quiet; the last frame reaches to the end."""
    changes = np.flatnonzero(np.diff(quiet, prepend=False, append=False)) * FRAME
    changes[changes == len(quiet) * FRAME] = count
    return [(a, b) for a, b in zip(changes[::2].tolist(), changes[1::2].tolist()) if b - a >= PAUSE]


def _ends(part: np.ndarray, found: Sequence[Pause], is_last: bool, longest: int) -> list[tuple[int, bool]]:
    """Where the pieces of a part end, and whether there is speech in each. What follows the last end is cut together
    with the next part, unless this is the last one."""
    ends: list[tuple[int, bool]] = []
    for a, b in found:
        ends += [(a + EDGE, True)] if a else []
        ends.append((b if is_last and b == len(part) else b - EDGE, False))
    if is_last:
        return ends if not len(part) or ends and ends[-1][0] == len(part) else [*ends, (len(part), True)]
    return ends or [(_quietest(part, longest), True)]


def _quietest(part: np.ndarray, longest: int) -> int:
    frames = part[-longest:][:longest // FRAME * FRAME].reshape(-1, FRAME)
    return len(part) - longest + int(frames.var(1).argmin()) * FRAME + FRAME // 2
