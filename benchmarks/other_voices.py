"""Sentences of the grammar of `spoken`, said by other synthesizers: what a recognizer is tested on, never trained on.

    python benchmarks/other_voices.py FOLDER [--count 160]
    ./run/evaluate.sh RUN --dataset FOLDER/kal.csv --split all

Festival and flite say them, Debian's packages festival, festvox-kallpc16k, festvox-kdlpc16k, festvox-us-slt-hts and
flite. Voices that are not installed are left out. None of the sentences is in `spoken`.
"""

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rig  # noqa: F401  finds the packages of src/

from stoker.data.speech import spoken
from stoker.data.text import sentences

FESTIVAL = {"kal": "kal_diphone", "ked": "ked_diphone", "slt": "cmu_us_slt_arctic_hts"}
FLITE = ("rms", "awb", "slt")
SEED = 20261129
Say = Callable[[str, Path], None]


def texts(count: int) -> list[str]:
    known = {line.text for line in spoken.script("spoken", spoken.SIZES["spoken"])}
    found = sentences.distinct(sentences.of_grammar, count + len(known), SEED)
    return [text for text in found if text not in known][:count]


def festival(voice: str) -> Say:
    def say(text: str, target: Path) -> None:
        subprocess.run(["text2wave", "-eval", f"(voice_{voice})", "-o", target], input=text, text=True, check=True)
    return say


def flite(voice: str) -> Say:
    def say(text: str, target: Path) -> None:
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", target], check=True)
    return say


def installed() -> Iterator[tuple[str, Say]]:
    """The voices that are there, by name."""
    if shutil.which("text2wave"):
        known = subprocess.run(["festival", "-b", "(print (voice.list))"], capture_output=True, text=True, check=True)
        yield from ((name, festival(voice)) for name, voice in FESTIVAL.items() if voice in known.stdout)
    if shutil.which("flite"):
        yield from ((f"flite_{voice}", flite(voice)) for voice in FLITE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=160)
    asked = parser.parse_args()
    voices, said = dict(installed()), texts(asked.count)
    if not voices:
        parser.error("neither festival nor flite is installed")
    for name, say in voices.items():
        (asked.folder / name).mkdir(parents=True, exist_ok=True)
        paths = [asked.folder / name / f"{number:03d}.wav" for number in range(len(said))]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(say, said, paths))
        rows = [f"{name}/{path.name},{text},{name}" for path, text in zip(paths, said)]
        (asked.folder / f"{name}.csv").write_text("\n".join(["audio_path,transcription,speaker", *rows, ""]))
        print(f"{asked.folder / name}.csv: {len(said)} sentences")


if __name__ == "__main__":
    main()
