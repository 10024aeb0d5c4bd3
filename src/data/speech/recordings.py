"""Speech: what was said, in which file, by whom; read from CSV files, folders and what is made here, and split.

What a stage does with it:

    splits = speech.read(cfg.dataset, ...)         # by name of the split: utterances, their files not opened yet
    splits, decoded, report = speech_check.checked(splits, keep=cfg.cache_audio, limits=Limits(...))  # each file once
    rows = Clips(splits["train"], decoded=decoded, augmentation=..., seed=...)     # data.clips: a torch data set
    order = LengthOrder(...)                       # data.loader: batches of like length, for Stage.order

Texts are labels: `normalised` (lower case, no punctuation) unless the caller wants them as they stand. Standard
library only, so that a mistake in `--dataset` is reported at once.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stoker import files
from stoker.config import UserError
from stoker.data import splits as parting
from stoker.data.sources import tables
from stoker.data.sources.names import LIBRISPEECH, RECORDINGS, SPOKEN
from stoker.data.speech import audio
from stoker.data.splits import SPLITS

log = logging.getLogger(__name__)

NAMES = (*SPOKEN, *LIBRISPEECH)
WHAT_TO_GIVE = ("give a CSV file (audio_path,transcription), a folder of sound files with their texts, or one of "
                + ", ".join(NAMES))


@dataclass(frozen=True)
class Utterance:
    """One recording. `seconds` is 0 where it is not known before the file is opened."""

    path: str
    text: str
    seconds: float = 0.0
    speaker: str = ""


Splits = dict[str, list[Utterance]]


def check(name: str) -> list[str]:
    """What is wrong with a `--dataset`, found before anything is started: opens no sound file."""
    return tables.problems(name, SPOKEN, lambda: next(listed(name), None), WHAT_TO_GIVE)


def read(name: str, *, held_out: Collection[str] = (), shared_texts: bool = False,
         normalise: bool = True) -> Splits:
    """The utterances of "train" and "validation", and of "test" where the data name one.

    Splits that the data name are kept; what they do not name is split off the training data: whole speakers where
    they are known, else whole texts, about 5 %. `held_out` names the speakers to validate on instead. A text of the
    validation or test set is left out of the training data unless `shared_texts`: for digits and commands, of which
    there are few. Raises UserError where nothing is left.
    """
    if problems := check(name):
        raise UserError(*problems)
    found: Splits = {split: [] for split in SPLITS}
    for split, utterance in listed(name):
        found[split].append(replace(utterance, text=normalised(utterance.text)) if normalise else utterance)
    splits = {split: rows for split, rows in found.items() if rows}
    if not splits:
        raise UserError(f"--dataset {name}: names no sound files; {WHAT_TO_GIVE}")
    return divided(splits, name, held_out=held_out, shared_texts=shared_texts)


def add_extra(splits: Splits, name: str, *, shared_texts: bool = False) -> None:
    """Add to the training rows those of another data set, without the speakers and texts of the other splits. Raises
    UserError."""
    others = [each for split, rows in splits.items() if split != "train" for each in rows]
    texts, speakers = {each.text for each in others}, {each.speaker for each in others} - {""}
    try:
        extra = read(name, shared_texts=shared_texts)["train"]
    except UserError as error:
        raise UserError(*of_extra(error.problems)) from error
    used = [each for each in extra if each.speaker not in speakers and (shared_texts or each.text not in texts)]
    log.info("Of --extra_dataset %s: %s recordings; %s of texts or speakers of the validation set are left out", name,
             f"{len(used):,}", f"{len(extra) - len(used):,}")
    splits["train"] += used


def of_extra(problems: Iterable[str]) -> list[str]:
    """What is wrong with --extra_dataset; a command that a line names stays as it is."""
    return [line.replace("--dataset", "--extra_dataset", 1) for line in problems]


def listed(name: str) -> Iterator[tuple[str, Utterance]]:
    """(split, utterance) of all that is named, as it stands there; the split is "train" where none is named.
    Raises UserError."""
    if name in NAMES:
        yield from _csv(_made(name))
        return
    path = Path(os.path.expanduser(name)).absolute()
    if path.is_dir():
        yield from _folder(path)
    elif path.is_file():
        yield from _csv(path)
    else:
        raise UserError(f"--dataset {name}: {tables.absent(path, NAMES)}; {WHAT_TO_GIVE}")


def normalised(text: str) -> str:
    """Lower case, letters, digits and apostrophes only, one blank between words: what is scored as words."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    return " ".join(re.sub(r"[^\w' ]|_", " ", text).split())


# -- the split ------------------------------------------------------------------------------------------------------


def divided(splits: Splits, name: str, *, held_out: Collection[str] = (), shared_texts: bool = False) -> Splits:
    """The same with a validation split, which shares neither speakers, where they are known, nor texts with training.
    Raises UserError."""
    splits = parting.divided(splits, _by_speaker, _by_text, held_out, name=name, kind="speaker")
    pool = splits["train"]
    train = pool if shared_texts else parting.without_shared_texts(splits)
    if len(train) < len(pool) / 2 or not train:
        raise UserError(f"--dataset {name}: {len(pool) - len(train):,} of {len(pool):,} training texts also occur in "
                        "validation; --shared_texts allows it (right for digits and commands)")
    return splits | {"train": train}


def _by_speaker(each: Utterance) -> str:
    return each.speaker


def _by_text(each: Utterance) -> str:
    return each.text


# -- reading --------------------------------------------------------------------------------------------------------


def _made(name: str) -> Path:
    """The manifest of a data set by name; those of espeak-ng are made when they are not there yet."""
    if name in SPOKEN:
        from stoker.data.speech import spoken

        return spoken.build(name)
    from stoker.data.sources import published

    return published.manifest(name)


def _csv(path: Path) -> Iterator[tuple[str, Utterance]]:
    """`audio_path,transcription` or `wav,text`, with a header or without. A header may name `speaker`, `split` and
    `seconds` too. Files lie beside the CSV, or in the working folder."""
    for row in tables.rows(path, RECORDINGS, WHAT_TO_GIVE):
        length = float(row["seconds"]) if row["seconds"].replace(".", "", 1).isdigit() else 0.0
        yield parting.of_cell(row["split"], path), Utterance(tables.located(row["path"], path.parent), row["text"],
                                                             length, row["speaker"])


def _folder(folder: Path) -> Iterator[tuple[str, Utterance]]:
    """Its manifest.csv or metadata.csv; else its sound files: the text of a.wav stands in a.txt, or in a line of
    *.trans.txt beside it, as in LibriSpeech. Folders called dev-*, test-* or by a split's name are splits."""
    for name in ("manifest.csv", "metadata.csv"):
        if (folder / name).is_file():
            yield from _csv(folder / name)
            return
    found = 0
    for path in tables.files_below(folder, audio.SUFFIXES):
        found += 1
        yield _split_of(path, folder), Utterance(str(path), _text_of(path), 0.0, _speaker_of(path))
    if not found:
        raise UserError(f"--dataset {folder}: has no sound files ({', '.join(audio.SUFFIXES)}) in it; {WHAT_TO_GIVE}")


LIBRISPEECH_FILE = re.compile(r"(\d+)-(\d+)-(\d+)")


def _split_of(path: Path, folder: Path) -> str:
    return next(filter(None, map(parting.named, path.relative_to(folder).parts[:-1])), "train")


def _text_of(path: Path) -> str:
    """"" where there is none: the data check reports it. Raises UserError."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return tables.text(str(beside), partial(files.read, beside, most=tables.TEXT))
    if match := LIBRISPEECH_FILE.fullmatch(path.stem):
        transcripts = path.with_name(f"{match[1]}-{match[2]}.trans.txt")
        if transcripts.is_file():
            return _transcripts(transcripts).get(path.stem, "")
    return ""


def _transcripts(path: Path) -> dict[str, str]:
    """`ID THE WORDS`, a line each."""
    content = tables.text(str(path), partial(files.read, path, most=tables.TABLE))
    pairs = (line.split(" ", 1) for line in content.splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _speaker_of(path: Path) -> str:
    match = LIBRISPEECH_FILE.fullmatch(path.stem)
    return match[1] if match else ""
