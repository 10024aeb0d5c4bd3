"""Speech from the Hugging Face hub, by name: fetched once, file by file, and gone on with where it was interrupted.

Kept as ordinary sound files with a manifest, official parts and all: what is called test there is never trained on.
"""

import csv
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import files
from config import UserError
from data import hub, splits
from data.speech import COLUMNS
from progress import announced, mark

if TYPE_CHECKING:
    from datasets import IterableDataset  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

AT_ONCE = 100  # recordings between two notes of how far it is


@dataclass(frozen=True)
class Source:
    """Where a data set lies; `splits`: their name of a part -> ours."""

    repository: str
    config: str | None
    splits: Mapping[str, str]
    gigabytes: float = 0.0


LIBRISPEECH = "openslr/librispeech_asr"
PARTS = {"train.clean.100": "train", "validation.clean": "validation", "test.clean": "test", "train.clean.360": "train",
         "train.other.500": "train"}
SOURCES = {
    "librispeech-100": Source(LIBRISPEECH, "all", dict(list(PARTS.items())[:3]), 7),
    "librispeech-460": Source(LIBRISPEECH, "all", dict(list(PARTS.items())[:4]), 31),
    "librispeech-960": Source(LIBRISPEECH, "all", PARTS, 63),
}


def manifest(name: str) -> Path:
    """The manifest (CSV) of what was fetched. Raises UserError where it was not, or not all of it."""
    path = _folder(name) / "manifest.csv"
    if not path.exists():
        begun = "only in part" if path.parent.exists() else "not"
        raise UserError(f"--dataset {name} is {begun} on this machine: ./run/data.sh download --dataset {name} fetches "
                        f"it, about {SOURCES[name].gigabytes:g} GB")
    return path


def download(name: str) -> Path:
    """Fetch what is not there yet; returns the manifest. Raises UserError where the hub cannot be reached, or does not
    give it out; what was fetched by then stays."""
    path = _folder(name) / "manifest.csv"
    with files.locked(path.parent.with_suffix(".lock")):
        if path.exists():
            return path
        if why := hub.away(SOURCES[name].repository):
            raise UserError(f"{name}: {why}; connect, and try again")
        _fetch_all(name, SOURCES[name], path)
    return path


def copy(repository: str, config: str | None, folder: Path) -> Path:
    """Any other data set with sound, of the hub or a folder in the hub's form, as sound files in `folder`; returns the
    manifest. Raises UserError."""
    path = folder / "manifest.csv"
    if path.exists():
        return path
    if not Path(repository).exists() and (why := hub.away(repository)):
        raise UserError(f"{repository}: {why}; connect, and try again")
    _fetch_all(repository, Source(repository, config, _splits_of(repository, config)), path)
    return path


def _splits_of(repository: str, config: str | None) -> dict[str, str]:
    from datasets import get_dataset_split_names

    hub.quieten()
    try:
        names = get_dataset_split_names(repository, config)
    except hub.errors() as error:
        raise UserError(f"{repository}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    ours = {name: splits.named(name) for name in names}
    if unknown := [name for name, split in ours.items() if not split]:
        raise UserError(f"{repository}: whether {', '.join(unknown)} is to train on or to judge by is not known")
    return ours


def _folder(name: str) -> Path:
    return files.home() / "speech" / name


def _fetch_all(name: str, source: Source, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.tidy(path.parent)
    parts = [_Part(path.parent, source, theirs, ours) for theirs, ours in source.splits.items()]
    size = f"about {source.gigabytes:g} GB; " if source.gigabytes else ""
    log.info("Fetching %s into %s (%sinterrupted, the same command goes on)", name, path.parent, size)
    try:
        with announced(lambda: f"Fetching {name}: {sum(part.count for part in parts):,} recordings so far"):
            for part in parts:
                part.fetch()
    except hub.errors() as error:
        if isinstance(error, OSError) and files.may_pass(error):
            raise UserError(f"{error.strerror} in {path.parent}: make room there, or set STOKER_HOME to another disk; "
                            "the same command goes on") from error
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name}: the download stopped ({why}); {sum(part.count for part in parts):,} recordings are "
                        "kept: the same command goes on") from error
    rows = [line for part in parts for line in part.rows.read_text(encoding="utf-8").splitlines()]
    files.write(path, "\n".join(["audio_path,transcription,speaker,split", *rows]) + "\n")
    log.info("Fetched %s: %s recordings", name, f"{len(rows):,}")


class _Part:
    """One part of a data set. Its note says how many rows are whole, and where the stream was then."""

    def __init__(self, folder: Path, source: Source, theirs: str, ours: str):
        self.folder, self.source, self.theirs, self.ours = folder, source, theirs, ours
        self.rows, self.note = folder / f"{theirs}.rows", folder / f"{theirs}.json"
        noted = json.loads(self.note.read_text()) if self.note.exists() else {}
        self.count, self.size, self.done = noted.get("count", 0), noted.get("size", 0), noted.get("done", False)
        self._state: dict[str, Any] | None = noted.get("state")

    def fetch(self) -> None:
        if self.done:
            return
        (self.folder / self.theirs).mkdir(exist_ok=True)
        with open(self.rows, "ab") as file:
            file.truncate(self.size)  # what was written after the note was
        stream = self._open()
        pending: list[str] = []
        for each in stream:
            pending.append(self._keep(each, self.count + len(pending)))
            if len(pending) == AT_ONCE:
                self._write_note(pending, stream.state_dict())
                pending = []
        self._write_note(pending, None, done=True)

    def _open(self) -> "IterableDataset":
        from datasets import Audio, load_dataset

        hub.quieten()
        stream = load_dataset(self.source.repository, self.source.config, split=self.theirs, streaming=True)
        stream = stream.cast_column("audio", Audio(decode=False))
        if self._state:
            stream.load_state_dict(self._state)
        return stream

    def _keep(self, each: Mapping[str, Any], number: int) -> str:
        """Write a recording as it came; its row of the manifest."""
        sound = each["audio"]
        name = f"{self.theirs}/{number:06d}{Path(sound['path'] or '.flac').suffix or '.flac'}"
        content = sound["bytes"] if sound["bytes"] is not None else Path(sound["path"]).read_bytes()
        (self.folder / name).write_bytes(content)
        mark()
        text, speaker = (next((each[key] for key in COLUMNS[what] if key in each), "") for what in ("text", "speaker"))
        return _csv_line([name, text, speaker, self.ours])

    def _write_note(self, pending: list[str], state: Any, *, done: bool = False) -> None:
        files.append(self.rows, "".join(pending), sync=True)
        self.count, self.size = self.count + len(pending), self.rows.stat().st_size
        files.write_json(self.note, {"count": self.count, "size": self.size, "done": done, "state": state})


def _csv_line(cells: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([" ".join(str(cell).split()) for cell in cells])
    return line.getvalue()
