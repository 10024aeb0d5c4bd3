"""Recordings of words -> recordings of strings of words, each by one speaker: spoken digits become numbers."""

import csv
import io
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files
from stoker.config import UserError
from stoker.data.speech import audio
from stoker.data.speech.recordings import Utterance
from stoker.progress import tracked

if TYPE_CHECKING:
    import numpy as np


def make(words: Sequence[Utterance], folder: Path, *, count: int, longest: int, pause: float, seed: int) -> Path:
    """`count` strings of each speaker, of one to `longest` words with up to `pause` seconds of silence between them, as
    files of a new folder; returns its manifest. Raises UserError."""
    speakers: dict[str, list[Utterance]] = defaultdict(list)
    for word in words:
        speakers[word.speaker].append(word)
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder")
    folder.mkdir(parents=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["audio_path", "transcription", "speaker", "seconds"])
    drawn = [(1, (speaker, number)) for speaker in sorted(speakers) for number in range(count)]
    for speaker, number in tracked(drawn, "Making strings", len(drawn), "strings"):
        draw = random.Random(f"{seed} {speaker} {number}")
        chosen = draw.choices(speakers[speaker], k=draw.randint(1, longest))
        name = f"{speaker or 'words'}_{number:05d}.flac"
        seconds = _write(folder / name, chosen, [draw.uniform(0, pause) for _ in chosen])
        rows.writerow([name, " ".join(word.text for word in chosen), speaker, f"{seconds:.3f}"])
    files.write(folder / "manifest.csv", table.getvalue())
    return folder / "manifest.csv"


def _write(path: Path, words: Sequence[Utterance], pauses: Sequence[float]) -> float:
    """Seconds. Raises UserError where a word cannot be read."""
    import numpy as np

    parts: list[np.ndarray] = []
    for word, pause in zip(words, pauses):
        parts += [_read(word.path), np.zeros(round(pause * audio.RATE), np.float32)]
    samples = np.concatenate(parts[:-1])
    audio.write(path, samples)
    return len(samples) / audio.RATE


@lru_cache(maxsize=None)  # words are short, and said again and again
def _read(path: str) -> "np.ndarray":
    try:
        return audio.read(path)
    except audio.AudioError as error:
        raise UserError(f"{path} {error}: take it out of the data") from error
