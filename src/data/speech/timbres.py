"""Timbres for espeak-ng that nobody speaks twice: variants of a voice, drawn at random.

A timbre is the text of a voice variant, a file of espeak-ng (docs/voices.md of its repository). espeak-ng comes with a
hundred. To draw one for each sentence did not help by itself (docs/log.md).
"""

import random
from collections.abc import Iterable

VOWEL_FORMANTS = 1, 2, 3  # those by which vowels differ
STRESS_LENGTH = 140, 120, 190, 170, 0, 0, 255, 300  # of American English: how long syllables are, by their stress
STRESS_AMPLITUDE = 17, 16, 19, 19, 19, 19, 21, 19
KLATT = 6  # the kinds of voice source of espeak-ng's Klatt synthesizer


def drawn(draw: random.Random) -> str:
    """The text of a variant: the length of the vocal tract, each formant's frequency, strength and width, the voice
    source, breath, the strength of consonants, rhythm, and in one of three Klatt's synthesizer."""
    base, spread = 80 * 2**draw.uniform(-0.3, 1.5), draw.uniform(1.15, 1.7)
    lines = ["language variant", "name drawn", "gender male", f"pitch {base:.0f} {base * spread:.0f}", *_formants(draw)]
    if draw.random() < 0.35:
        lines.append(f"klatt {draw.randint(1, KLATT)}")
    lines += [f"voicing {draw.uniform(60, 130):.0f}", f"consonants {_consonants(draw):.0f} {_consonants(draw):.0f}",
              f"flutter {draw.randint(0, 8)}", f"roughness {draw.choice((0, 0, 1, 2, 3))}"]
    if draw.random() < 0.3:
        lines += ["breath " + " ".join(str(draw.randint(0, 25)) for _ in range(6)), "breathw 150 150 200 200 400 400"]
    if draw.random() < 0.1:
        lines.append(f"echo {draw.randint(10, 130)} {draw.randint(5, 30)}")
    lengths = (length and length * 2**draw.gauss(0, 0.2) for length in STRESS_LENGTH)
    amplitudes = (max(8, amplitude + draw.gauss(0, 1.5)) for amplitude in STRESS_AMPLITUDE)
    return "\n".join([*lines, f"stressLength {_row(lengths)}", f"stressAmp {_row(amplitudes)}",
                      f"intonation {draw.randint(1, 4)}", ""])


def _formants(draw: random.Random) -> list[str]:
    """`formant NUMBER FREQUENCY STRENGTH WIDTH ADDED`: three in percent of the voice's own, the last in Hz."""
    tract, tilt = 2**draw.uniform(-0.33, 0.4), draw.gauss(0, 0.12)
    lines = []
    for number in range(9):
        frequency = 100 * tract * (1 + draw.gauss(0, 0.05 if number in VOWEL_FORMANTS else 0.03))
        strength = 100 * 2**(draw.gauss(0, 0.3) + tilt * (number - 2))
        if number > 5:
            strength *= draw.choice((0, 0.6, 1, 1))
        width, added = 100 * 2**draw.uniform(-0.5, 0.8), draw.gauss(0, 20 if number == 1 else 60)
        lines.append(f"formant {number} {min(frequency, 200):.0f} {min(strength, 250):.0f} {width:.0f} {added:.0f}")
    return lines


def _consonants(draw: random.Random) -> float:
    """The strength of consonants, in percent."""
    return 100 * 2**draw.uniform(-1, 0.7)


def _row(values: Iterable[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)
