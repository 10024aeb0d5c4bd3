"""How well a recognizer understands an hour of joined sentences, by the way in which transcribe.sh cuts it.

    python benchmarks/cutting.py MODEL [DATA...] [--minutes 60] [--noise -80] [--only pauses ...]

MODEL as transcribe.sh takes it: a run, a snapshot or a model folder. DATA: what `--dataset` takes, `spoken` by default;
the sentences of the validation and test sets, or all where the data name no split, in random order, with pauses of 0.2
to 1.5 s between them and white noise of so many dB of full scale under all. Printed are the word error rate over the
hour, for each value of --cut and for the sentences cut where they were joined, the number of pieces, and the seconds of
CPU. `silero` needs the package silero-vad and is left out without it.
"""

import argparse
import importlib.util
import time
from collections.abc import Iterable

import numpy as np
import rig  # noqa: F401, I001  finds the packages of src/
import torch
from rapidfuzz.distance import Levenshtein

from stoker.data.speech import audio, cuts, recordings
from stoker.inference.transcribe import STAGE, Config, Listener
from stoker.training.core import pretrained

PAUSES = 0.2, 1.5  # seconds
JOINTS = "joints"
CONFIG = Config()


def joined(data: str, minutes: float, noise: float) -> tuple[np.ndarray, list[int], list[str]]:
    """A recording (N,), in the middle of which pauses its sentences are joined, and their texts."""
    rows = list(recordings.listed(data))
    rows = [row for row in rows if row[0] != "train"] or rows
    draw = np.random.default_rng(0)
    parts, joints, texts, count = list[np.ndarray](), list[int](), list[str](), 0
    for place in draw.permutation(len(rows)):
        _, row = rows[place]
        pause = np.zeros(round(draw.uniform(*PAUSES) * audio.RATE), np.float32)
        parts += [audio.read(row.path), pause]
        texts += recordings.normalised(row.text).split()
        count += len(parts[-2]) + len(pause)
        joints.append(count - len(pause) // 2)
        if count > minutes * 60 * audio.RATE:
            break
    samples = np.concatenate(parts)
    samples += 10 ** (noise / 20) * draw.standard_normal(len(samples), dtype=np.float32)
    return samples.clip(-1, 1), joints[:-1], texts


def compare(listener: Listener, name: str, how: str, pieces: Iterable[cuts.Piece], texts: list[str]) -> None:
    start, heard, lengths = time.process_time(), list[str](), list[float]()
    for piece in pieces:
        if piece.speech:
            lengths.append(len(piece.samples) / audio.RATE)
            heard += listener.hear(piece.samples, CONFIG)["text"].split()
    wrong = Levenshtein.distance(texts, heard) / len(texts)
    print(f"{name} {how:9s} WER {wrong:6.2%}  {len(lengths):5,} pieces heard, {np.mean(lengths):5.1f} s on average, "
          f"{max(lengths):5.1f} s at most; {time.process_time() - start:4.0f} s of CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="*", default=["spoken"])
    parser.add_argument("--minutes", default=60, type=float)
    parser.add_argument("--noise", default=-80, type=float)
    parser.add_argument("--only", nargs="+", default=[JOINTS, *cuts.PAUSES], choices=[JOINTS, *cuts.PAUSES])
    asked = parser.parse_args()
    source = pretrained.held(lambda: pretrained.find(asked.model, (STAGE,)))
    listener = Listener(source, torch.device("cpu"))
    window = round(CONFIG.window_seconds * audio.RATE)
    for data in asked.data:
        samples, joints, texts = joined(data, asked.minutes, asked.noise)
        print(f"{data}: {len(samples) / audio.RATE / 60:.1f} minutes, {len(joints) + 1:,} sentences, {len(texts):,} "
              f"words, noise at {asked.noise:g} dB")
        parts = zip([0, *joints], [*joints, len(samples)])
        for how in asked.only:
            if how == "silero" and importlib.util.find_spec("silero_vad") is None:
                continue
            found = (cuts.Piece(a, samples[a:b]) for a, b in parts) if how == JOINTS else cuts.pieces(
                iter([samples]), cuts.PAUSES[how](float(np.abs(samples).max())), longest=window)
            compare(listener, data, how, found, texts)


if __name__ == "__main__":
    main()
