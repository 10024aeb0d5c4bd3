"""Looks after data from the command line: ./run/data.sh."""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import command, config
from stoker.config import UserError, opt
from stoker.data import splits
from stoker.data.pictures import images, table
from stoker.data.sources import archives, hub, names
from stoker.data.speech import recordings

if TYPE_CHECKING:
    from stoker.data.check import Report

DONE, REFUSED_ROWS = 0, 1
DOWNLOADS = {"text": "wikitext", "audio_asr": "librispeech-100", "image": "coco-captions", "ocr": "mjsynth"}
NAMES = (*names.LIBRISPEECH, *names.HUB_PICTURES, *hub.CONFIGS)
PIXELS_A_COLUMN = 4  # of a reader's output
LONGEST = 256  # characters that are spoken, or written on a picture; a description may be longer
MODALITIES = ("text", "audio_asr", "audio_tts", "image", "ocr")


@dataclass
class Check:
    """What is checked, against which limits"""

    modality: str | None = opt(None, "what it is for, where that does not show", choices=("audio_asr", "image", "ocr"))
    held_out: str = opt("", "speakers, or groups, to validate on, comma-separated")
    valid_share: float = opt(splits.SHARE, "share of the pictures to validate on where no split is named", gt=0, le=0.5)
    group_by: str = opt("", "a regular expression: what it, or its first group, matches in a path is a group")
    shared_texts: bool | None = opt(None, "texts of the validation set may be trained on")
    max_text_length: int | None = opt(None, "longest text, in characters", ge=1)
    max_mel_length: int = opt(2048, "longest recording, in frames of 10 ms", ge=1)
    downsample_time: int = opt(4, "frames of 10 ms to one of the model: 2, 4 or 8", ge=1)
    head_frames: int = opt(2, "frames of the model's head to one of the model (with BPE tokens 1)", ge=1)
    min_side: int = opt(2, "fewest pixels of a picture's shorter side", ge=1)
    max_side: int = opt(0, "most pixels of a picture's longer side; 0: any", ge=0)
    image_height: int = opt(32, "pixels that a line is high to a reader", ge=16, le=256)
    max_width: int = opt(1024, "widest line, in pixels at that height", ge=16)


@dataclass
class MelLengths:
    """What is measured"""

    csv: str = opt("", "the data, also without --csv")
    talker: bool = opt(False, "in the talker's frames, 12.5 a second")


@dataclass
class Download:
    """What is fetched"""

    dataset: str | None = opt(None, "which", choices=NAMES)
    modality: str | None = opt(None, "what for", choices=MODALITIES)
    repository: str = opt("", "any other data set with sounds or pictures: USER/NAME of the hub, or a folder as there")
    config_name: str | None = opt(None, "which of its configurations")
    max_samples: int = opt(0, "most rows of each of its parts; 0: all", ge=0)
    out: str = opt("", "the folder to put it into")


@dataclass
class Strings:
    """What is made"""

    count: int = opt(1000, "strings of each speaker", ge=1)
    longest: int = opt(7, "most words in a string", ge=1)
    pause: float = opt(0.1, "longest silence between two words, in seconds", ge=0, le=5)
    seed: int = opt(0, "the same seed makes the same strings", ge=0)


def _main(argv: Sequence[str]) -> int:
    """With --check first, only mistakes are looked for: with a Python that has nothing installed."""
    only_mistakes = list(argv[:1]) == ["--check"]
    name, *rest = argv[only_mistakes:] or [""]
    if name in NAMES:
        name, rest = "download", ["--dataset", name, *rest]
    if name not in COMMANDS:
        raise UserError(f"which of {', '.join(COMMANDS)}?" + (f" {name!r} is none of them" if name else ""))
    options, operands, problems, run = COMMANDS[name]
    words: list[str] = []
    cfg: Any = config.parse(options, {}, rest, words=words).config
    if name == "mel_lengths" and cfg.csv:
        words.append(cfg.csv)
    if len(words) != len(operands):
        given = f", not {len(words)}: {' '.join(words)}" if words else ""
        raise UserError(f"{name} takes {' and '.join(operands) or 'options only'}{given}")
    if found := problems(cfg, *words):
        raise UserError(*found)
    return DONE if only_mistakes else run(cfg, *words)


# -- the commands ---------------------------------------------------------------------------------------------------


def check(cfg: Check, data: str) -> int:
    modality = cfg.modality or ("image" if _of_pictures(data) else "audio_asr")
    return _check_speech(cfg, data) if modality == "audio_asr" else _check_pictures(cfg, data, modality)


def _check_speech(cfg: Check, data: str) -> int:
    from stoker.data.speech.check import Limits, examined, head_frames

    found = recordings.read(data, held_out=config.listed(cfg.held_out), shared_texts=bool(cfg.shared_texts))
    frames = 100 / cfg.downsample_time * cfg.head_frames
    _, _, report = examined(found, keep=False, limits=Limits(
        max_mel_length=cfg.max_mel_length, max_text_length=cfg.max_text_length or LONGEST,
        labels=lambda text: [ord(letter) for letter in text],
        frames=lambda samples: head_frames(samples, cfg.downsample_time, cfg.head_frames)))
    _say(*report.lines())
    print(f"CTC is asked to put a character in a frame of 1/{frames:g} s (--downsample_time {cfg.downsample_time} "
          f"--head_frames {cfg.head_frames})")
    return _listed(report)


def _check_pictures(cfg: Check, data: str, modality: str) -> int:
    from stoker.data.pictures.check import Limits, examined

    limits = Limits(min_side=cfg.min_side, max_side=cfg.max_side, max_text_length=cfg.max_text_length or 0)
    if modality == "ocr":
        limits = replace(limits, max_width=cfg.max_width, height=cfg.image_height, lines=True,
                         max_text_length=cfg.max_text_length or LONGEST,
                         labels=lambda text: [ord(letter) for letter in text],
                         columns=lambda width: -(-width // PIXELS_A_COLUMN))
    found = table.read(data, template="" if modality == "ocr" else "{}", group_by=cfg.group_by,
                          held_out=config.listed(cfg.held_out), share=cfg.valid_share,
                          shared_texts=cfg.shared_texts is not False)
    _, _, report = examined(found, {}, keep=False, limits=limits)
    _say(*report.lines())
    if modality == "ocr":
        print(f"CTC is asked to put a character in {PIXELS_A_COLUMN} columns of pixels (--image_height "
              f"{cfg.image_height})")
    return _listed(report)


def _listed(report: "Report") -> int:
    for row in report.listed():
        print("\t".join(map(config.printable, row)))
    return REFUSED_ROWS if report.refused else DONE


def _say(*lines: str) -> None:
    for line in lines:
        print(config.printable(line))


def _of_pictures(data: str) -> bool:
    """Whether a data set is one of pictures, as far as it can be listed: as its first row is."""
    if data in table.NAMES or archives.is_archive(data):
        return True
    try:
        first = None if data in recordings.NAMES else next(table.listed(data), None)
    except (UserError, OSError):
        return False
    return first is not None and first[1].path.lower().endswith(images.SUFFIXES)


def mel_lengths(cfg: MelLengths, data: str) -> int:
    from stoker.data.speech import audio
    from stoker.data.speech.check import FRAMES_A_SECOND, TALKER_FRAMES_A_SECOND
    from stoker.data.speech.check import mel_lengths as described

    found, unreadable = [], []
    for _, row in recordings.listed(data):
        try:
            found.append(row.seconds or audio.seconds(row.path))
        except audio.AudioError as error:
            unreadable.append(f"{row.path} {error}")
    if not found:
        raise UserError(f"{data}: none of its {len(unreadable):,} files can be read: {unreadable[0]}")
    print(f"{len(found):,} recordings, {sum(found) / 3600:.2f} h")
    print(described(sorted(found), TALKER_FRAMES_A_SECOND if cfg.talker else FRAMES_A_SECOND))
    _say(*unreadable)
    return REFUSED_ROWS if unreadable else DONE


def download(cfg: Download) -> int:
    from stoker.data.sources import published

    if cfg.repository:
        print(published.copy(cfg.repository, cfg.config_name, Path(cfg.out), cfg.max_samples))
        return DONE
    name = cfg.dataset or DOWNLOADS[str(cfg.modality)]
    if name in hub.CONFIGS:
        print(f"{name}: " + ", ".join(f"{len(texts):,} {split}" for split, texts in hub.articles(name).items())
              + " articles")
        return DONE
    print(f"--dataset {name}: {published.download(name, cfg.max_samples)}")
    return DONE


def strings(cfg: Strings, data: str, folder: str) -> int:
    from stoker.data.speech import strings as making

    words = [row for _, row in recordings.listed(data)]
    print(making.make(words, Path(folder), count=cfg.count, longest=cfg.longest, pause=cfg.pause, seed=cfg.seed))
    return DONE


def _known(cfg: Any, data: str, *others: str) -> list[str]:
    return [problem.replace("--dataset ", "", 1) for problem in recordings.check(data)]


def _checkable(cfg: Check, data: str) -> list[str]:
    if cfg.modality == "audio_asr" or not (cfg.modality or _of_pictures(data)):
        return _known(cfg, data)
    return [problem.replace("--dataset ", "", 1) for problem in table.check(data, group_by=cfg.group_by)]


def _fetched(cfg: Download) -> list[str]:
    if cfg.repository:
        return [] if cfg.out else [f"--repository {cfg.repository}: --out names the folder to put it into"]
    if cfg.dataset or cfg.modality in DOWNLOADS:
        return []
    if not cfg.modality:
        return [f"download what? --dataset {', '.join(NAMES)}; or --modality {', '.join(DOWNLOADS)}"]
    return [f"--modality {cfg.modality}: there is nothing to fetch by name for it; {', '.join(DOWNLOADS)} can be "
            "fetched, and each stage has data that are made here"]


COMMANDS: dict[str, tuple[type, tuple[str, ...], Callable[..., list[str]], Callable[..., int]]] = {
    "check": (Check, ("DATA",), _checkable, check),
    "mel_lengths": (MelLengths, ("DATA",), _known, mel_lengths),
    "download": (Download, (), _fetched, download),
    "strings": (Strings, ("DATA", "FOLDER"), _known, strings),
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(command.answered(_main, "interrupted: the same command goes on"))
