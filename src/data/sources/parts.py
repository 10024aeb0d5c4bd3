"""Parts of a data set of the Hugging Face hub, kept as ordinary files: row by row, gone on with where it was left.

Sounds become files of their own; pictures, of which there may be millions, members of a TAR archive.
"""

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stoker import files
from stoker.config import UserError
from stoker.data import cache
from stoker.data.sources import archives, hub, names
from stoker.progress import mark

if TYPE_CHECKING:
    from datasets import IterableDataset  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

AT_ONCE = 100  # rows between two notes of how far it is


@dataclass(frozen=True)
class Source:
    """Where a data set lies; `splits`: their name of a part -> ours; none: as they are called."""

    repository: str
    config: str | None
    splits: Mapping[str, str] = field(default_factory=dict)
    gigabytes: float = 0.0
    columns: Mapping[str, str] = field(default_factory=dict)  # what -> its column, where another is called so


class Part:
    """One part. Its note says how many rows are whole, where the stream was then, and how long the files were."""

    feature: ClassVar[str]  # what `datasets` calls the kind of column that it keeps
    columns: ClassVar[Mapping[str, Sequence[str]]]
    header: ClassVar[str]  # of the manifest
    unit: ClassVar[str]

    def __init__(self, folder: Path, source: Source, theirs: str, ours: str):
        self.folder, self.source, self.theirs, self.ours = folder, source, theirs, ours
        self.rows, self.note = folder / f"{theirs}.rows", folder / f"{theirs}.note"
        noted = json.loads(cache.read(self.note) or "{}")
        self._digest = _sha256(self.rows, noted.get("size", 0))
        if noted and self._digest.hexdigest() != noted["digest"]:
            log.warning("%s is damaged: this part is fetched again", self.rows)
            noted, self._digest = {}, hashlib.sha256()
        self.count: int = noted.get("count", 0)
        self.size: int = noted.get("size", 0)
        self.stored: int = noted.get("stored", 0)
        self.done: bool = noted.get("done", False)
        self._state: dict[str, Any] | None = noted.get("state")

    def enough(self, most: int) -> bool:
        """Whether it is there whole, or `most` rows of it; 0: not but whole."""
        return self.done or 0 < most <= self.count

    def fetch(self, most: int = 0) -> None:
        if self.enough(most):
            return
        with open(self.rows, "ab") as file:
            file.truncate(self.size)  # what was written after the note was
        self.begin()
        try:
            self._fetch(self._open(), most)
        finally:
            self.close()

    def _fetch(self, stream: "IterableDataset", most: int) -> None:
        pending: list[str] = []
        for each in stream:
            pending.append(self.keep(each, self.count + len(pending)))
            mark()
            if len(pending) == AT_ONCE or self.count + len(pending) == most:
                self._write_note(pending, stream.state_dict())
                pending = []
                if self.enough(most):
                    return
        self.finish()
        self._write_note(pending, None, done=True)

    def begin(self) -> None:
        """Make what is stored as the note says it was."""

    def keep(self, each: Mapping[str, Any], number: int) -> str:
        """Store a row's file as it came; its lines of the manifest."""
        raise NotImplementedError

    def sync(self) -> None:
        """Make what is stored outlive a power cut."""

    def finish(self) -> None:
        """All of it is stored."""

    def close(self) -> None: ...

    def cells(self, each: Mapping[str, Any], what: str) -> list[Any]:
        """What stands in a column, which may hold several texts; of a class, its name."""
        column = self.source.columns.get(what, next((name for name in self.columns[what] if name in each), ""))
        value = each.get(column, "")
        values = value if isinstance(value, list) else [value]
        return [self._classes[column][one] if column in self._classes else one for one in values]

    def _open(self) -> "IterableDataset":
        from datasets import Audio, ClassLabel, Image

        stream = opened(self.source, self.theirs)
        self.column = _column(stream, self.feature)
        self._classes = {name: kind.names for name, kind in stream.features.items() if isinstance(kind, ClassLabel)}
        undecoded = {"Audio": Audio, "Image": Image}[self.feature](decode=False)
        stream = stream.cast_column(self.column, undecoded)
        if self._state:
            stream.load_state_dict(self._state)
        return stream

    def _write_note(self, pending: list[str], state: Any, *, done: bool = False) -> None:
        self.sync()
        files.append(self.rows, "".join(pending), sync=True)
        self._digest.update("".join(pending).encode())
        self.count, self.size, self.done = self.count + len(pending), self.rows.stat().st_size, done
        cache.write(self.note, json.dumps({"count": self.count, "size": self.size, "done": done, "stored": self.stored,
                                           "digest": self._digest.hexdigest(), "state": state}))


class Sounds(Part):
    """Each a file."""

    feature = "Audio"
    columns = names.RECORDINGS
    header = "audio_path,transcription,speaker,split"
    unit = "recordings"

    def begin(self) -> None:
        (self.folder / self.theirs).mkdir(exist_ok=True)

    def keep(self, each: Mapping[str, Any], number: int) -> str:
        content, suffix = _file(each[self.column])
        name = f"{self.theirs}/{number:06d}{suffix or '.flac'}"
        (self.folder / name).write_bytes(content)
        [text], [speaker] = self.cells(each, "text"), self.cells(each, "speaker")
        return _csv_lines([[name, text, speaker, self.ours]])


class Images(Part):
    """All in one archive; one that comes again, with another text, is stored once."""

    feature = "Image"
    columns = names.PICTURES
    header = "image,text,label,split"
    unit = "pictures"

    def begin(self) -> None:
        self._path = self.folder / f"{self.theirs}.tar"
        self._file = open(self._path, "ab")
        self._file.truncate(self.stored)
        self._names = set(archives.members(self._path)) if self.stored else set[str]()

    def keep(self, each: Mapping[str, Any], number: int) -> str:
        content, suffix = _file(each[self.column])
        name = hashlib.sha256(content).hexdigest()[:24] + (suffix or ".jpg")
        if name not in self._names:
            self._names.add(name)
            self.stored += self._file.write(archives.entry(name, content))
        [label] = self.cells(each, "label")
        return _csv_lines([f"{self._path.name}!{name}", text, label, self.ours] for text in self.cells(each, "text"))

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        self.stored += self._file.write(archives.END)

    def close(self) -> None:
        self._file.close()


def opened(source: Source, theirs: str) -> "IterableDataset":
    """A part as a stream, its columns known. Raises what `hub.errors` names."""
    from datasets import load_dataset

    hub.quieten()
    stream = load_dataset(source.repository, source.config, split=theirs, streaming=True)
    return stream if stream.features else stream._resolve_features()


def kind_of(source: Source, theirs: str) -> type[Part]:
    """Whether it holds sounds or pictures. Raises UserError, what `hub.errors` names."""
    stream = opened(source, theirs)
    if found := next((kind for kind in (Sounds, Images) if _column(stream, kind.feature)), None):
        return found
    raise UserError(f"{source.repository}: has no column of sounds or pictures, but {', '.join(stream.features)}")


def _column(stream: "IterableDataset", feature: str) -> str:
    """The column of such a kind, or one that is called so; or ''."""
    kinds = {name: type(kind).__name__ for name, kind in stream.features.items()}
    return next((name for name, kind in kinds.items() if feature in (kind, name.capitalize())), "")


def _sha256(path: Path, size: int) -> "hashlib._Hash":
    """The digest of the first `size` bytes of a file, to be updated with what is appended."""
    digest = hashlib.sha256()
    if size and path.exists():
        with open(path, "rb") as file:
            digest.update(file.read(size))
    return digest


def _file(found: Mapping[str, Any]) -> tuple[bytes, str]:
    """Its content, and how its name ends."""
    content = found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()
    return content, Path(found["path"] or "").suffix.lower()


def _csv_lines(rows: Iterable[list[Any]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([" ".join(str(cell).split()) for cell in row] for row in rows)
    return lines.getvalue()
