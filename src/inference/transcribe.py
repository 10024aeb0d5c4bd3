"""Writes down what is said in sound files. Standard output carries the transcripts and nothing else."""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
from config import Parsed, UserError, opt
from data import audio
from training import pretrained
from training.options import device_problems
from training.pretrained import Pretrained
from training.stage import discover

if TYPE_CHECKING:
    import numpy as np

STAGE = "audio_enc"
USAGE = """usage: transcribe.sh FILE... [OPTIONS]

Writes down what is said in sound files of any kind and length, in all those of a folder, or, for -, in one that comes
from standard input."""


@dataclass
class Config:
    """How"""

    model: str = opt("newest", "a run of run_train_audio_enc.sh, also one that still trains, a snapshot or a model "
                     "folder; newest: the newest finished run")
    json: bool = opt(False, "a line of JSON for each file: text, confidence, and words with their times in seconds")
    beam: int = opt(1, "search for the likeliest text with so many at a time (1: the likeliest unit of a frame)", ge=1,
                    le=1000)
    window_seconds: float = opt(10.0, "a longer recording is heard in windows of this length", ge=1)
    overlap_seconds: float = opt(2.0, "by which windows overlap", ge=0)
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self) -> list[str]:
        found = device_problems(self.device)
        if self.overlap_seconds >= self.window_seconds:
            found.append(f"--overlap_seconds {self.overlap_seconds:g} must be less than --window_seconds "
                         f"{self.window_seconds:g}")
        return found


def _main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(config.help_text(Config, {}, USAGE))
        return 0
    words: list[str] = []
    cfg = config.parse(Config, {}, [word for word in argv if word != "--check"], words=words).config
    if not words:
        raise UserError("which sound? give files, folders, or - for standard input")
    paths = list(_files(words))
    source = pretrained.find(cfg.model, STAGE)
    if source.stage not in ("", STAGE):
        raise UserError(f"--model {cfg.model}: {source} is of stage {source.stage}, which does not hear")
    if "--check" in argv:
        return 0
    return _transcribe(cfg, source, paths)


def _files(words: Sequence[str]) -> Iterator[str]:
    """The files that words mean, those of a folder in the order of their names. Raises UserError for all mistakes."""
    problems = []
    for word in words:
        inside = sorted(str(path) for path in Path(word).rglob("*") if path.suffix.lower() in audio.SUFFIXES)
        if word == "-" or Path(word).is_file():
            yield word
        elif inside:
            yield from inside
        elif Path(word).is_dir():
            problems.append(f"{word} has no sound files ({', '.join(audio.SUFFIXES)}) in it")
        else:
            problems.append(f"{word}: there is no such file or folder")
    if problems:
        raise UserError(*problems)


# -- hearing --------------------------------------------------------------------------------------------------------


def _transcribe(cfg: Config, source: Pretrained, paths: Sequence[str]) -> int:
    """Exit code 1 where some of the files could not be read; each is told."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"torch is not installed for this Python ({sys.executable}): use ./run/transcribe.sh")
    from training import device as devices

    device = devices.choose(cfg.device)
    listener = Listener(source, device)
    print(f"{source}; {told(source)}", file=sys.stderr, flush=True)
    unread = 0
    for path in paths:
        try:
            samples = _read(path)
        except audio.AudioError as error:
            print(f"{config.program()}: {path} {error}", file=sys.stderr)
            unread += 1
            continue
        found = listener.hear(samples, cfg)
        if cfg.json:
            line = json.dumps({"file": path, **found}, ensure_ascii=False)
        else:
            line = found["text"] if len(paths) == 1 else f"{path}\t{found['text']}"
        sys.stdout.buffer.write(f"{line}\n".encode(errors="surrogateescape"))
        sys.stdout.buffer.flush()
    return 1 if unread else 0


def told(source: Pretrained) -> str:
    """How well a model did when it was evaluated."""
    rates = [f"{name} {source.scores[f'eval/{name}']:.1%}" for name in ("wer", "cer")
             if f"eval/{name}" in source.scores]
    data = Path(str(source.options.get("dataset", ""))).name
    return f"{', '.join(rates)} on validation data of {data}" if rates else "not evaluated at that step"


def _read(path: str) -> "np.ndarray":
    """(N,) at 16 kHz. Raises AudioError."""
    if path != "-":
        return audio.read(path)
    with tempfile.NamedTemporaryFile() as file:  # formats are told apart by looking to and fro
        file.write(sys.stdin.buffer.read())
        file.flush()
        return audio.read(file.name)


class Listener:
    """A trained model, and what it hears."""

    def __init__(self, source: Pretrained, device: Any):
        kind = discover()[STAGE]
        empty: Parsed[Any] = Parsed(kind.Config(), frozenset(), "")
        settled = pretrained.taken(kind, empty, source).config
        stage: Any = kind(settled, source.run.path if source.is_snapshot and source.run else source.folder)
        stage.reopen()
        self.units, self.device = stage.units, device
        self.model: Any = stage.model().to(device).eval()
        source.load(stage, self.model)

    def hear(self, samples: "np.ndarray", cfg: Config) -> dict[str, Any]:
        """{"seconds", "text", "confidence", "words": [{"word", "start", "end", "confidence"}]}; times in seconds,
        confidences between 0 and 1: the mean probability of the units, in the frames in which they stand."""
        import torch

        from data.units import words
        from model import ctc

        blank = self.units.end_of_text
        heard = self.model.log_probs(torch.from_numpy(samples).to(self.device), window_seconds=cfg.window_seconds,
                                     overlap_seconds=cfg.overlap_seconds).cpu()
        if cfg.beam > 1:
            labels = ctc.beam_search(heard.numpy(), blank=blank, width=cfg.beam)[0][0]
        else:
            labels = ctc.greedy(heard[None], torch.tensor([len(heard)]), blank=blank)[0]
        spans = ctc.align(heard.numpy(), labels, blank=blank)
        found = [{"word": word, "start": self._seconds(of[0].start), "end": self._seconds(of[-1].end),
                  "confidence": _mean(of)} for word, of in words(self.units, [(span.label, span) for span in spans])]
        return {"seconds": round(len(samples) / audio.RATE, 3), "text": " ".join(self.units.decode(labels).split()),
                "confidence": _mean(spans), "words": found}

    def _seconds(self, frame: int) -> float:
        return round(frame / float(self.model.rate), 3)


def _mean(spans: Sequence[Any]) -> float:
    return round(sum(span.confidence for span in spans) / len(spans), 4) if spans else 0.0


if __name__ == "__main__":
    sys.exit(config.answered(_main))
