"""Says texts with a talker that was trained here: into a file, or as raw sound on standard output while it speaks."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import command, files
from stoker.config import UserError, opt
from stoker.data.speech import audio, recordings
from stoker.data.text.read_out import read_out
from stoker.inference import trained
from stoker.training.core import pretrained
from stoker.training.core.options import device_problems
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import discover

if TYPE_CHECKING:
    import numpy as np

TALKER, VOCODER, GRIFFIN_LIM = "talker", "vocoder", "griffin-lim"
KINDS = {".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3", ".ogg": "OGG"}
BETWEEN = 0.3  # seconds of silence between two lines
USAGE = """usage: speak.sh TEXT... --out FILE [OPTIONS]

Says a text, or, for -, each line that comes from standard input. Without --out the sound goes to standard output while
it is spoken: 16 bits, little endian, mono, 16,000 samples a second."""


@dataclass
class How:
    """How"""

    out: str = opt("", f"file to write: {', '.join(KINDS)}, by its name (default: raw sound to standard output)",
                   aliases=("o",))
    lines: str = opt("", "a text file: each of its lines is said, with a short silence between")
    model: str = opt("newest", "a run of run_train_talker.sh, also one that still trains, a snapshot or a model "
                     "folder; newest: the newest finished run")
    vocoder: str = opt("newest", "a run of run_train_vocoder.sh, a snapshot or a model folder; newest: the newest "
                       "finished run, or griffin-lim where there is none; griffin-lim: no trained vocoder")
    voice: str = opt("", "whose voice, by the speaker's name in the training data (default: the first)")
    rate: float = opt(1.0, "speaking rate: 1.2 is a fifth faster", ge=0.3, le=3)
    temperature: float = opt(0.0, "0: the likeliest codes; 1: codes drawn by their probabilities", ge=0, le=2)
    seed: int = opt(0, "seed of what is drawn", ge=0)
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self) -> list[str]:
        found = device_problems(self.device)
        if self.out and Path(self.out).suffix.lower() not in KINDS:
            found.append(f"--out {self.out}: its name must end in {', '.join(KINDS)}")
        return found


def _main(argv: Sequence[str]) -> int:
    return trained.command(How, USAGE, argv, _work)


def _work(cfg: How, words: list[str], only_check: bool) -> int:
    if not cfg.out and sys.stdout.isatty() and not only_check:
        raise UserError("raw sound is nothing for a terminal: name a file with --out, or pipe it to a player")
    if cfg.out and not Path(cfg.out).absolute().parent.is_dir():
        raise UserError(f"--out {cfg.out}: there is no folder {Path(cfg.out).absolute().parent}")
    if cfg.lines and words or words.count("-") > 1 or ("-" in words and len(words) > 1):
        raise UserError("texts come from the command line, from --lines or from standard input (-): give one of these")
    if not words and not cfg.lines:
        raise UserError("say what? give a text, --lines FILE, or - for standard input")
    texts = _texts(cfg, words)
    source = trained.found(cfg.model, TALKER, "speaks")
    vocoder = _vocoder(cfg.vocoder)
    return 0 if only_check else _speak(cfg, source, vocoder, texts)


def _texts(cfg: How, words: list[str]) -> Iterator[str]:
    """The lines to say. Raises UserError where a file cannot be read."""
    if cfg.lines:
        try:
            lines = Path(cfg.lines).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--lines {cfg.lines}: cannot be read: {getattr(error, 'strerror', None) or error}"
                            ) from error
        return iter([line for line in lines if line.strip()])
    if words == ["-"]:
        return (line for line in sys.stdin if line.strip())
    return iter([" ".join(words)])


def _vocoder(named: str) -> Pretrained | None:
    """None: Griffin-Lim."""
    if named == GRIFFIN_LIM:
        return None
    try:
        return trained.found(named, VOCODER, "makes sound of spectrograms")
    except UserError:
        if named != "newest":
            raise
        return None


# -- answering ------------------------------------------------------------------------------------------------------


def _speak(cfg: How, source: Pretrained, vocoder: Pretrained | None, texts: Iterator[str]) -> int:
    trained.require_torch("speak")
    from stoker.training.core import device as devices

    speaker = Speaker(source, vocoder, devices.choose(cfg.device))
    trained.note(f"{source}; {trained.scored(source, ('wer', 'mel'))}")
    lacking = ("" if cfg.vocoder == GRIFFIN_LIM else ", since no vocoder was trained here: it sounds like a tin, and "
               f"nothing streams ({files.hint('run_train_vocoder')} trains one)")
    trained.note(f"vocoder: {vocoder or f'Griffin-Lim{lacking}'}")
    sound = _joined(speaker.say(text, cfg) for text in texts)
    if cfg.out:
        return _written(Path(cfg.out), sound)
    for block in sound:
        sys.stdout.buffer.write((block.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
        sys.stdout.buffer.flush()
    return 0


def _joined(said: "Iterator[Iterator[np.ndarray]]") -> "Iterator[np.ndarray]":
    """The blocks of several texts, with silence between them."""
    import numpy as np

    for number, blocks in enumerate(said):
        if number:
            yield np.zeros(round(BETWEEN * audio.RATE), np.float32)
        yield from blocks


def _written(path: Path, blocks: "Iterator[np.ndarray]") -> int:
    """Write the sound into a file, which is there once it is whole. Raises UserError where that fails."""
    import numpy as np
    import soundfile  # type: ignore[import-untyped]

    samples = np.concatenate([np.zeros(0, np.float32), *blocks])
    half = path.with_name(f".{path.name}.half")
    try:
        soundfile.write(half, samples.clip(-1, 1), audio.RATE, format=KINDS[path.suffix.lower()])
        half.replace(path)
    except (OSError, soundfile.LibsndfileError) as error:
        half.unlink(missing_ok=True)
        raise UserError(f"--out {path}: cannot be written: {error}") from error
    print(f"{path}: {len(samples) / audio.RATE:.2f} s")
    return 0


# -- speaking -------------------------------------------------------------------------------------------------------


class Speaker:
    """A trained talker, and what makes sound of its spectrograms."""

    def __init__(self, source: Pretrained, vocoder: Pretrained | None, device: Any):
        from stoker.model.griffin_lim import GriffinLim

        self.stage, self.model = pretrained.opened(source, discover()[TALKER], device)
        self.device = device
        self.make = (pretrained.opened(vocoder, discover()[VOCODER], device)[1].generator if vocoder
                     else GriffinLim(self.model.mel))

    def symbols(self, text: str) -> list[int]:
        """The symbols of a text as it is read out. Raises UserError where the talker cannot say it."""
        from stoker.data.text.labels import unspelled

        said = recordings.normalised(read_out(text))
        if unknown := unspelled(self.stage.tokenizer, [self.stage.spelled(said)]):
            raise UserError(f"the talker cannot say {' '.join(unknown)} in {text.strip()!r}: write it in the letters "
                            "of its training texts")
        if not said:
            raise UserError(f"there is nothing to say in {text.strip()!r}")
        return self.stage.encode(said)  # type: ignore[no-any-return]

    def voice(self, name: str) -> int:
        """The number of a voice. Raises UserError where there is none of that name."""
        known = self.stage.voices
        if name and name not in known:
            raise UserError(f"--voice {name}: the talker has {', '.join(known) or 'one voice without a name'}")
        return known.get(name, 0)  # type: ignore[no-any-return]

    def say(self, text: str, cfg: How) -> "Iterator[np.ndarray]":
        """The sound of a text, block by block (N,), float32. Raises UserError before the first where the talker cannot
        say it."""
        import torch

        from stoker.model.speaking import Drawn, likeliest

        symbols, voice = self.symbols(text), self.voice(cfg.voice)
        drawn = Drawn(cfg.temperature, torch.Generator(self.device).manual_seed(cfg.seed))
        choose = drawn if cfg.temperature else likeliest  # a parallel talker then decodes what is to be expected
        with torch.inference_mode():
            for block in self.model.stream(torch.tensor([symbols], device=self.device),
                                           torch.tensor([voice], device=self.device), choose, self.make,
                                           rate=cfg.rate):
                yield block[0].float().cpu().numpy()


if __name__ == "__main__":
    sys.exit(command.answered(_main))
