"""Writes down what is said in sound files. Standard output carries the transcripts and nothing else."""

import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import command, files
from stoker.config import UserError, opt
from stoker.daemon.rundir import PROJECT
from stoker.data.sources.names import SPOKEN
from stoker.data.speech import audio
from stoker.inference import subtitles, trained
from stoker.training.core import language, pretrained
from stoker.training.core.options import device_problems
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import discover

if TYPE_CHECKING:
    import numpy as np

    from stoker.model.fusion import Fusion, Weights

STAGE = "audio_enc"
LONGEST = 24 * 3600  # seconds of a recording
BYTES = 2**32  # of standard input: a WAV file cannot have more
USAGE = """usage: transcribe.sh FILE... [OPTIONS]

Writes down what is said in sound files of any kind, up to 24 hours long, in all those of a folder, or, for -, in one
that comes from standard input."""


@dataclass
class How:
    """How"""

    model: str = opt("newest", "a run of run_train_audio_enc.sh, also one that still trains, a snapshot or a model "
                     "folder; newest: the newest finished run")
    json: bool = opt(False, "a line of JSON for each file: text, confidence, words with their times in seconds, notes")
    srt: bool = opt(False, "subtitles in the format SubRip; of several files, each beside its recording as NAME.srt")
    vtt: bool = opt(False, "the same in the format WebVTT, NAME.vtt")
    cut: str = opt("pauses", "how a recording longer than --window_seconds is heard: pauses: cut where it is quiet; "
                   "silero: cut where the package silero-vad hears no speech; windows: in windows that overlap, as is "
                   "any speech without pauses", choices=("pauses", "silero", "windows"))
    window_seconds: float = opt(10.0, "length of a window", ge=1, le=600)
    overlap_seconds: float = opt(2.0, "by which windows overlap", ge=0)
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self) -> list[str]:
        found = device_problems(self.device)
        if self.overlap_seconds >= self.window_seconds:
            found.append(f"--overlap_seconds {self.overlap_seconds:g} must be less than --window_seconds "
                         f"{self.window_seconds:g}")
        formats = [f"--{name}" for name in ("json", *subtitles.FORMATS) if getattr(self, name)]
        if len(formats) > 1:
            found.append(f"{' and '.join(formats)} exclude one another: choose one")
        if self.cut == "silero" and importlib.util.find_spec("silero_vad") is None:
            found.append("--cut silero: the package silero-vad is not installed; install it, or leave --cut out: "
                         f"{sys.executable} -m pip install --editable '{PROJECT}[vad]'")
        return found

    @property
    def subtitles(self) -> str:
        """The format of the subtitles, or ''."""
        return next((name for name in subtitles.FORMATS if getattr(self, name)), "")


@dataclass
class Config(language.LanguageModel, How):
    """The options."""


def _main(argv: Sequence[str]) -> int:
    return trained.command(Config, USAGE, argv, _work)


def _work(cfg: Config, words: list[str], only_check: bool) -> int:
    if tables := [word for word in words if Path(word).suffix.lower() in (".csv", ".tsv")]:
        raise UserError(f"{tables[0]} is a table, not a recording: {files.hint('evaluate')} RUN --dataset {tables[0]} "
                        "--split all evaluates a model on the recordings that it names")
    paths = trained.inputs(words, audio.SUFFIXES, "sound")
    if cfg.subtitles and len(paths) > 1:
        _check_targets(paths, cfg.subtitles)
    source = trained.found(cfg.model, STAGE, "hears")
    lm = language.found(cfg.lm) if cfg.lm else None
    return 0 if only_check else _transcribe(cfg, source, lm, paths)


# -- answering ------------------------------------------------------------------------------------------------------


def _transcribe(cfg: Config, source: Pretrained, lm: Pretrained | None, paths: Sequence[str]) -> int:
    trained.require_torch("transcribe")
    from stoker.training.core import device as devices

    listener = Listener(source, devices.choose(cfg.device), lm)
    trained.note(f"{source}; {trained.scored(source, ('wer', 'cer'))}")
    if _heard_no_people(source.options):
        trained.note("it was trained on synthetic speech alone: of what people say it gets most words wrong, unless it "
                     "learns from their recordings (docs/train_audio_enc.md, Your own voice)")
    if lm:
        trained.note(f"with the language model {lm}; {_weights(cfg)} --beam {cfg.width}")

    def heard(path: str) -> dict[str, Any]:
        with _file(path) as name:
            found = listener.transcribe(name, cfg)
        for line in found["notes"]:
            trained.note(f"{path} {line}")
        if cfg.subtitles:
            lines = list(subtitles.written(subtitles.subtitles(found["words"]), cfg.subtitles))
            found["lines"] = lines if len(paths) == 1 else [_saved(_beside(path, cfg.subtitles), lines)]
        return found

    return trained.answer(paths, heard, audio.AudioError, lambda found: found,
                          lambda found: found.get("lines", [found["text"]]), as_json=cfg.json)


def _heard_no_people(options: Mapping[str, Any]) -> bool:
    """Whether a model was trained, with these options, on synthetic speech alone."""
    data = {options.get("dataset"), options.get("extra_dataset") or SPOKEN[0]}
    return data <= {*SPOKEN} and not options.get("init_from")


@contextmanager
def _file(path: str) -> Iterator[str]:
    """The name of a file with the sound; - reads standard input. Raises AudioError."""
    if path != "-":
        yield path
        return
    with tempfile.NamedTemporaryFile() as file:  # libsndfile seeks to detect the format
        while part := sys.stdin.buffer.read(2**20):
            file.write(part)
            if file.tell() > BYTES:
                raise audio.AudioError(f"has more than {BYTES:,} bytes: cut it into parts")
        file.flush()
        yield file.name


# -- subtitles of several files -------------------------------------------------------------------------------------


def _check_targets(paths: Sequence[str], kind: str) -> None:
    """Raises UserError where the subtitles of several files cannot be written beside them."""
    if "-" in paths:
        raise UserError(f"--{kind} writes the subtitles of several files beside them, which standard input does not "
                        "have: give - alone")
    targets = [_beside(path, kind) for path in paths]
    problems = [f"{target} would have the subtitles of several recordings: name them in two calls"
                for target in dict.fromkeys(targets) if targets.count(target) > 1]
    if there := [target for target in targets if target.exists()]:
        problems.append(f"{there[0]} and {len(there) - 1} more exist already: move them away" if there[1:] else
                        f"{there[0]} exists already: move it away")
    problems += [f"{folder} cannot be written to: --{kind} writes the subtitles of several files beside them"
                 for folder in dict.fromkeys(target.parent for target in targets) if not os.access(folder, os.W_OK)]
    if problems:
        raise UserError(*problems)


def _beside(path: str, kind: str) -> Path:
    return Path(path).with_suffix(f".{kind}")


def _saved(target: Path, lines: Sequence[str]) -> str:
    files.write(target, "".join(f"{line}\n" for line in lines))
    return str(target)


# -- hearing --------------------------------------------------------------------------------------------------------


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

    def transcribe(self, path: str, cfg: Config) -> dict[str, Any]:
        """What is said in a file, piece by piece: as `hear`, and "notes" about the recording, each the end of a
        sentence that begins with its name. Raises AudioError."""
        from stoker.data.speech import cuts

        survey = audio.survey(path, longest=LONGEST)
        find_pauses = cuts.PAUSES[cfg.cut if survey.seconds > cfg.window_seconds else "windows"](survey.peak)
        heard = []
        if survey.peak >= audio.SILENT:
            for piece in cuts.pieces(audio.blocks(path, survey), find_pauses,
                                     longest=round(cfg.window_seconds * audio.RATE)):
                if piece.speech:
                    heard.append(_later(self.hear(piece.samples, cfg), piece.start / audio.RATE))
        text = " ".join(each["text"] for each in heard if each["text"])
        return {"seconds": round(survey.seconds, 3), "text": text, "confidence": _joint_confidence(heard),
                "words": [word for each in heard for word in each["words"]], "notes": list(_notes(survey, text))}

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
            labels = self.fusion.search(heard.numpy(), _weights(cfg), cfg.width)[0].labels
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


def _later(heard: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What was heard in a piece that begins at so many seconds."""
    return heard | {"words": [word | {at: round(word[at] + seconds, 3) for at in ("start", "end")}
                              for word in heard["words"]]}


def _joint_confidence(heard: Sequence[dict[str, Any]]) -> float:
    """The mean confidence of pieces, each counted by the length of its text."""
    length = sum(len(each["text"]) for each in heard)
    return round(sum(each["confidence"] * len(each["text"]) for each in heard) / length, 4) if length else 0.0


def _notes(survey: audio.Survey, text: str) -> Iterator[str]:
    """What the user should know about a recording."""
    if survey.channel is not None:
        yield (f"has channels that cancel each other out: only channel {survey.channel + 1} of {survey.channels}, the "
               "loudest, is heard")
    if survey.clipped > audio.CLIPPED:
        yield f"is clipped: {survey.clipped:.1%} of its samples are at full scale"
    if not survey.count:
        reason = "holds no samples"
    elif survey.peak < audio.SILENT:
        reason = f"is silent: no sample is above {20 * math.log10(audio.SILENT):.0f} dB of full scale"
    elif survey.seconds < audio.SHORT:
        reason = f"is too short for a word: {survey.seconds:.2f} s"
    elif not text:
        reason = "has no speech that the model recognizes"
    else:
        return
    yield reason + ("" if text else "; no text")


def _weights(cfg: Config) -> "Weights":
    from stoker.model.fusion import Weights

    return Weights(*cfg.weight_and_bonus)


def _mean(spans: Sequence[Any]) -> float:
    return round(sum(span.confidence for span in spans) / len(spans), 4) if spans else 0.0


if __name__ == "__main__":
    sys.exit(command.answered(_main))
