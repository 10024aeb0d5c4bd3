"""Writes down what is said in sound files. Standard output carries the transcripts and nothing else."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker import command
from stoker.config import opt
from stoker.data.speech import audio
from stoker.inference import trained
from stoker.training.core import language, pretrained
from stoker.training.core.options import device_problems
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import discover

if TYPE_CHECKING:
    import numpy as np

    from stoker.model.fusion import Fusion, Weights

STAGE = "audio_enc"
LONGEST = 2 * 3600  # seconds of a recording, half a gigabyte as samples
BYTES = 2**32  # of standard input: a WAV file cannot have more
USAGE = """usage: transcribe.sh FILE... [OPTIONS]

Writes down what is said in sound files of any kind, up to two hours long, in all those of a folder, or, for -, in one
that comes from standard input."""


@dataclass
class How:
    """How"""

    model: str = opt("newest", "a run of run_train_audio_enc.sh, also one that still trains, a snapshot or a model "
                     "folder; newest: the newest finished run")
    json: bool = opt(False, "a line of JSON for each file: text, confidence, and words with their times in seconds")
    window_seconds: float = opt(10.0, "a longer recording is heard in windows of this length", ge=1)
    overlap_seconds: float = opt(2.0, "by which windows overlap", ge=0)
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self) -> list[str]:
        found = device_problems(self.device)
        if self.overlap_seconds >= self.window_seconds:
            found.append(f"--overlap_seconds {self.overlap_seconds:g} must be less than --window_seconds "
                         f"{self.window_seconds:g}")
        return found


@dataclass
class Config(language.LanguageModel, How):
    """The options."""


def _main(argv: Sequence[str]) -> int:
    return trained.command(Config, USAGE, argv, _work)


def _work(cfg: Config, words: list[str], only_check: bool) -> int:
    paths = trained.inputs(words, audio.SUFFIXES, "sound")
    source = trained.found(cfg.model, STAGE, "hears")
    lm = language.found(cfg.lm) if cfg.lm else None
    return 0 if only_check else _transcribe(cfg, source, lm, paths)


# -- hearing --------------------------------------------------------------------------------------------------------


def _transcribe(cfg: Config, source: Pretrained, lm: Pretrained | None, paths: Sequence[str]) -> int:
    trained.require_torch("transcribe")
    from stoker.training.core import device as devices

    listener = Listener(source, devices.choose(cfg.device), lm)
    trained.note(f"{source}; {trained.scored(source, ('wer', 'cer'))}")
    if lm:
        trained.note(f"with the language model {lm}; {_weights(cfg)} --beam {cfg.beam or language.BEAM}")
    return trained.answer(paths, _read, audio.AudioError, lambda sounds: [listener.hear(each, cfg) for each in sounds],
                          lambda found: [found["text"]], as_json=cfg.json)


def _read(path: str) -> "np.ndarray":
    """(N,) at 16 kHz. Raises AudioError."""
    if path != "-":
        return audio.read(path, longest=LONGEST)
    with tempfile.NamedTemporaryFile() as file:  # formats are told apart by looking to and fro
        while part := sys.stdin.buffer.read(2**20):
            file.write(part)
            if file.tell() > BYTES:
                raise audio.AudioError(f"has more than {BYTES:,} bytes: cut it into parts")
        file.flush()
        return audio.read(file.name, longest=LONGEST)


class Listener:
    """A trained model, and what it hears; with a language model, if there is one."""

    fusion: "Fusion | None" = None

    def __init__(self, source: Pretrained, device: Any, lm: Pretrained | None = None):
        from stoker.data.text.spelling import spelled
        from stoker.model.fusion import Fusion

        stage, self.model = pretrained.opened(source, discover()[STAGE], device)
        self.tokenizer, self.device = stage.tokenizer, device
        if lm:
            tokenizer, model = language.opened(lm, device)
            self.fusion = Fusion(spelled(self.tokenizer), self.tokenizer.end_of_text, model, spelled(tokenizer),
                                 tokenizer.end_of_text)

    def hear(self, samples: "np.ndarray", cfg: Config) -> dict[str, Any]:
        """{"seconds", "text", "confidence", "words": [{"word", "start", "end", "confidence"}]}; times in seconds,
        confidences between 0 and 1: the mean probability of the labels, in the frames in which they stand."""
        import torch

        from stoker.data.text.labels import words
        from stoker.model import ctc

        blank = self.tokenizer.end_of_text
        heard = self.model.log_probs(torch.from_numpy(samples).to(self.device), window_seconds=cfg.window_seconds,
                                     overlap_seconds=cfg.overlap_seconds).cpu()
        if self.fusion:
            labels = self.fusion.search(heard.numpy(), _weights(cfg), cfg.beam or language.BEAM)[0].labels
        elif cfg.beam and cfg.beam > 1:
            labels = ctc.beam_search(heard.numpy(), blank=blank, width=cfg.beam)[0][0]
        else:
            labels = ctc.greedy(heard[None], torch.tensor([len(heard)]), blank=blank)[0]
        spans = ctc.align(heard.numpy(), labels, blank=blank)
        spelled = words(self.tokenizer, [(span.label, span) for span in spans])
        found = [{"word": word, "start": self._seconds(of[0].start), "end": self._seconds(of[-1].end),
                  "confidence": _mean(of)} for word, of in spelled]
        return {"seconds": round(len(samples) / audio.RATE, 3), "text": " ".join(self.tokenizer.decode(labels).split()),
                "confidence": _mean(spans), "words": found}

    def _seconds(self, frame: int) -> float:
        return round(frame / float(self.model.rate), 3)


def _weights(cfg: Config) -> "Weights":
    from stoker.model.fusion import Weights

    return Weights(language.WEIGHT if cfg.lm_weight is None else cfg.lm_weight,
                   language.BONUS if cfg.lm_bonus is None else cfg.lm_bonus)


def _mean(spans: Sequence[Any]) -> float:
    return round(sum(span.confidence for span in spans) / len(spans), 4) if spans else 0.0


if __name__ == "__main__":
    sys.exit(command.answered(_main))
