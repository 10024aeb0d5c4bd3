"""The embedded speech: sentences that espeak-ng says in many voices, made once on this machine, without network.

    spoken          sentences of a grammar of some 300 words
    spoken-digits   strings of one to seven digits, said in one go or one by one
    spoken-pydocs   sentences of the documentation of the installed packages
    spoken-voice    sentences of the grammar, all in one voice, at one rate and pitch: for a talker
    spoken-voices   the same in eight voices

Each sentence is said once, in the first three sets at its own rate and pitch. Sentences and, in these sets, timbres of
validation and test are not in training.
Of the training sentences every second has a timbre of its own, drawn for it. The same seed gives the same samples, bit
for bit, with the same espeak-ng.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files
from stoker.config import UserError
from stoker.data import made
from stoker.data.speech import audio, espeak, timbres
from stoker.data.speech.espeak import Voice
from stoker.data.text import sentences
from stoker.progress import tracked

if TYPE_CHECKING:
    import numpy as np

BUILDER = 3  # raise it when other sound, or other sentences, come out
SIZES = {
    "spoken": {"train": 10_000, "validation": 500, "test": 500},
    "spoken-digits": {"train": 8_000, "validation": 200, "test": 200},
    "spoken-pydocs": {"train": 3_000, "validation": 200, "test": 200},
    "spoken-voice": {"train": 6_000, "validation": 200, "test": 200},
    "spoken-voices": {"train": 12_000, "validation": 200, "test": 200},
}
LANGUAGES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc")
TIMBRES = {  # all that espeak-ng has, its Klatt voices among them, but for those that whisper or hardly speak
    "train": """m1 m2 m3 m5 m6 m8 f1 f2 f4 Alex Alicia Andy Annie AnxiousAndy Denis Diogo Gene Gene2 Henrique Hugo Jacky
        Lee Marco Mario Michael Nguyen Reed Storm Tweaky UniRobot adam anika anikaRobot announcer antonio aunty belinda
        benjamin caleb croak david ed edward edward2 grandpa gustave ian iven iven2 iven3 iven4 john kaukovalta klatt
        klatt2 klatt3 klatt4 klatt5 klatt6 linda marcelo max michel miguel mike2 norbert pablo paul pedro quincy rob
        robosoft2 robosoft3 robosoft4 robosoft5 robosoft6 robosoft7 robosoft8 sandro steph steph2 steph3 travis victor
        zac""".split(),
    "validation": "m4 f3 Mike boris grandma".split(),
    "test": "m7 f5 Andrea robert shelby".split(),
}
VOICES = {  # whose sentences have one rate and pitch; a talker learns to speak as they do
    "spoken-voice": (Voice(),),
    "spoken-voices": tuple(Voice(name, pitch=pitch) for name, pitch in (
        ("en-us", 50), ("en-us+f3", 55), ("en-us+m3", 35), ("en-gb-scotland", 50), ("en-gb-x-rp+f2", 60),
        ("en-029+m7", 45), ("en-us-nyc+Andy", 50), ("en-us+Alicia", 50))),
}
RATES, PITCHES, RANGES = (130, 210), (25, 75), (30, 70)
ONE_BY_ONE, PAUSES = (90, 210), (" ", ", ", ". ")  # numbers are often read out slowly, each digit for itself
AT_ONCE = 32
PACKAGES = ("espeakng_loader", "soundfile", "soxr")


@dataclass(frozen=True)
class Line:
    """What is said, by whom."""

    split: str
    text: str
    voice: Voice


def missing() -> list[str]:
    """Packages that the speech is made with and that are not installed, one line each."""
    return [f"--dataset spoken is made with {name}, which is not installed; install it: pip install "
            f"{name.replace('_', '-')}" for name in PACKAGES if importlib.util.find_spec(name) is None]


def build(name: str, *, sizes: Mapping[str, int] | None = None, seed: int = 0, workers: int | None = None) -> Path:
    """The manifest (CSV) of a set of files, which are made when they are not there yet. Raises UserError where a
    package is missing, or there is no room."""
    if problems := missing():
        raise UserError(*problems)
    lines = script(name, sizes or SIZES[name], seed)
    folder = files.home() / "spoken" / f"{name}-{_key(lines)}"
    return made.folder(folder, lambda half: _make(half, lines, workers), what=f"{len(lines):,} spoken sentences",
                       room="0.5 GB") / "manifest.csv"


def script(name: str, sizes: Mapping[str, int], seed: int = 0) -> list[Line]:
    """What is said in a set, all of it different."""
    total, kind = sum(sizes.values()), {"spoken-digits": sentences.of_digits}.get(name, sentences.of_grammar)
    texts = _documentation(total, seed) if name == "spoken-pydocs" else sentences.distinct(kind, total, seed)
    splits = itertools.chain.from_iterable([split] * count for split, count in sizes.items())
    draw = random.Random(f"{name} {seed}")
    if name in VOICES:
        return [Line(split, text, draw.choice(VOICES[name])) for split, text in zip(splits, texts)]
    if name == "spoken-digits":
        return [Line(split, text.replace(" ", draw.choice(PAUSES)), _voice(split, draw, number, ONE_BY_ONE))
                for number, (split, text) in enumerate(zip(splits, texts))]
    return [Line(split, text, _voice(split, draw, number)) for number, (split, text) in enumerate(zip(splits, texts))]


def _documentation(count: int, seed: int) -> list[str]:
    from stoker.data.text import pydocs

    corpus = pydocs.build().split(pydocs.SEPARATOR)
    found = list(sentences.of_documentation(corpus))
    random.Random(seed).shuffle(found)
    return found[:count]


def _voice(split: str, draw: random.Random, number: int, rates: tuple[int, int] = RATES) -> Voice:
    """The voice of sentence `number`."""
    language, own = draw.choice(LANGUAGES), split == "train" and number % 2 == 1
    timbre, variant = (f"drawn{number}", timbres.drawn(draw)) if own else (draw.choice(TIMBRES[split]), "")
    return Voice(f"{language}+{timbre}", draw.randint(*rates), draw.randint(*PITCHES), draw.randint(*RANGES), variant)


def _key(lines: list[Line]) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return hashlib.sha256(json.dumps([BUILDER, versions, [(line.split, line.text, line.voice) for line in lines]])
                          .encode()).hexdigest()[:16]


# -- making it ------------------------------------------------------------------------------------------------------


def _make(folder: Path, lines: list[Line], workers: int | None) -> None:
    rows = ["audio_path,transcription,speaker,split,seconds"]
    for line, (sound, seconds) in zip(lines, _said(lines, workers)):
        path = folder / f"{len(rows):05d}.flac"
        path.write_bytes(sound)
        rows.append(f'{path.name},"{line.text}",{line.voice.name},{line.split},{seconds:.3f}')
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def _said(lines: list[Line], workers: int | None) -> "itertools.chain[tuple[bytes, float]]":
    """(FLAC, seconds) of each line, made in processes of their own."""
    from stoker.data.loader import evaluation_batches

    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)))
    parts = evaluation_batches(_Sayings(lines), list, AT_ONCE, workers)  # type: ignore[arg-type]
    sized = ((len(part), part) for part in parts)
    return itertools.chain.from_iterable(tracked(sized, "Saying sentences", len(lines), "sentences"))


class _Sayings:
    """Item i is line i, said."""

    def __init__(self, lines: list[Line]):
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[bytes, float]:
        samples = said(self.lines[index].text, self.lines[index].voice)
        file = io.BytesIO()
        audio.write(file, samples)
        return file.getvalue(), len(samples) / audio.RATE


def said(text: str, voice: Voice) -> "np.ndarray":
    """(N,) float32 at 16 kHz, without the constant offset that some timbres have."""
    import numpy as np

    samples, rate, _ = espeak.say(text, voice)
    samples = samples.astype(np.float32) / 2**15
    found: np.ndarray = np.clip(audio.resampled(samples - samples.mean(dtype=np.float64), rate, audio.RATE), -1, 1)
    return found
