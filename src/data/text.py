"""Text files -> documents -> training and validation texts that share nothing.

A document is a file, or a piece of a file between explicit `<|endoftext|>` marks. The split draws no random
numbers: the same documents always give the same two sides.
"""

import difflib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config import UserError

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
VALID_SHARE = 0.05
VALID_SHARE_AT_MOST = 0.10
DOCUMENTS_TO_SPLIT_BY = 20
HEAD_BYTES = 64 * 1024
REFUSALS_NAMED = 20
WHAT_TO_GIVE = "give a text file, a folder of text files, or pydocs"


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents to judge by; what repeats stands on one side only."""

    train: list[str]
    valid: list[str]
    fingerprint: str


class NotText(Exception):
    """A file that cannot be read as text; the message says why, without the file's name."""


def documents(dataset: str) -> Corpus:
    """The corpus that `--dataset` names: "pydocs", a text file, or a folder of text files (read recursively).

    In a folder, files that are not UTF-8 text are left out and named in the log.
    Raises UserError where there is nothing to read.
    """
    if problems := check(dataset):
        raise UserError(*problems)
    try:
        found = [document for text in _texts(dataset) for document in _between_marks(text)]
    except OSError as error:
        raise UserError(f"--dataset {dataset}: {_reason(error)}; {WHAT_TO_GIVE}") from error
    if not found:
        raise UserError(f"--dataset {dataset}: holds nothing but blanks; {WHAT_TO_GIVE}")
    log.info("Read %s: %.1f MB, documents: %s", dataset, sum(map(_bytes, found)) / 1e6, f"{len(found):,}")
    return split(found)


def check(dataset: str) -> list[str]:
    """What is wrong with a `--dataset`, found before anything is started: reads the first 64 kB at most a file."""
    if dataset == "pydocs":
        return []  # its packages may not be installed yet: set-up comes after this check
    if not dataset:
        return [f"--dataset is empty; {WHAT_TO_GIVE}"]
    try:
        why = _path_problem(_path(dataset))
    except OSError as error:
        why = _reason(error)
    return [f"--dataset {dataset}: {why}; {WHAT_TO_GIVE}"] if why else []


def fingerprint(documents: Iterable[str]) -> str:
    """SHA-256 over documents in their order; where one ends and the next begins counts too."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def split(documents: list[str]) -> Corpus:
    """About 5 % of the bytes for validation: whole documents where there are enough of them, otherwise the tail.

    Raises UserError where everything in the tail occurs in the training text as well.
    """
    distinct = len(set(documents))
    train, valid = _by_document(documents) if distinct >= DOCUMENTS_TO_SPLIT_BY else _by_tail(documents)
    if not train or not valid:
        raise UserError(
            f"the text ({sum(map(_bytes, documents)):,} bytes) is too short or too repetitive to set a part aside for "
            "validation that does not occur in training; give more text, or more varied text"
        )
    return Corpus(train, valid, fingerprint(documents))


# -- reading --------------------------------------------------------------------------------------------------------


def _path(dataset: str) -> Path:
    return Path(os.path.expanduser(dataset))


def _texts(dataset: str) -> list[str]:
    if dataset == "pydocs":
        from data import pydocs

        return [_read(pydocs.build())]
    path = _path(dataset)
    return _folder_texts(path) if path.is_dir() else [_file_text(path)]


def _path_problem(path: Path) -> str:
    """Why nothing can be read at a path, or ''. May raise OSError."""
    if not path.exists():
        return "there is no such file or folder" + _nearest(path)
    if path.is_dir():
        files, _ = _files(path)
        if any(not _head_problem(file) for file in files):
            return ""
        return f"none of its {len(files)} files can be read as text" if files else "the folder has no files in it"
    if not path.is_file():
        return "is neither a file nor a folder"
    return _head_problem(path)


def _nearest(path: Path) -> str:
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*beside, "pydocs"], n=1)
    return f" (did you mean {close[0] if close[0] == 'pydocs' else path.with_name(close[0])}?)" if close else ""


def _head_problem(path: Path) -> str:
    """Why a file's beginning cannot be read as text, or ''."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return _reason(error)
    try:
        _decode(head, whole=len(head) < HEAD_BYTES)
    except NotText as error:
        return str(error)
    return ""


def _reason(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def _files(folder: Path) -> tuple[list[Path], list[OSError]]:
    """Every regular file below a folder, sorted by path, nothing hidden; and what could not be looked into."""
    found: list[Path] = []
    errors: list[OSError] = []
    for where, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return [path for path in sorted(found) if path.is_file()], errors


def _file_text(path: Path) -> str:
    try:
        return _read(path)
    except NotText as error:
        raise UserError(f"--dataset {path}: {error}; {WHAT_TO_GIVE}") from error


def _folder_texts(folder: Path) -> list[str]:
    """The texts of a folder; those that cannot be read are named in the log."""
    files, errors = _files(folder)
    texts, refused = [], [f"{error.filename}: {_reason(error)}" for error in errors]
    for path in files:
        try:
            texts.append(_read(path))
        except NotText as error:
            refused.append(f"{path}: {error}")
    for line in refused[:REFUSALS_NAMED]:
        log.warning("Left out %s", line)
    if len(refused) > REFUSALS_NAMED:
        log.warning("Left out %d more files of %s", len(refused) - REFUSALS_NAMED, folder)
    if not texts:
        raise UserError(f"--dataset {folder}: none of its {len(refused)} files can be read as text; {WHAT_TO_GIVE}")
    return texts


def _read(path: Path) -> str:
    """A file's text as it stands, line ends and all, without the byte order mark. Raises NotText."""
    if why := _head_problem(path):
        raise NotText(why)  # found in the head, so that a huge binary file is not read whole
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotText(_reason(error)) from error
    return _decode(content, whole=True)


def _decode(content: bytes, *, whole: bool) -> str:
    """UTF-8 text; unless `whole`, a character may be cut at the end. Raises NotText."""
    if not content:
        raise NotText("is empty")
    if (offset := content.find(b"\0")) >= 0:
        raise NotText(f"is not UTF-8 text (a zero byte at offset {offset:,})")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if whole or error.reason != "unexpected end of data":
            raise NotText(f"is not UTF-8 text (byte 0x{content[error.start]:02x} at offset {error.start:,})") from error
        return content[: error.start].decode()


def _between_marks(text: str) -> list[str]:
    """The documents of a text: what stands between the marks, blank ones left out."""
    return [piece for piece in re.split(re.escape(END_OF_TEXT) + r"(?:\r?\n)?", text) if piece.strip()]


# -- the split ------------------------------------------------------------------------------------------------------


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _by_document(documents: list[str]) -> tuple[list[str], list[str]]:
    """In the order of their hashes, whole documents with all their copies until 5 % is reached.

    One that would bring validation over 10 % is passed over, so that a single huge file cannot be all of it.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document] = sizes.get(document, 0) + _bytes(document)
    total, taken, chosen = sum(sizes.values()), 0, set()
    for document in sorted(sizes, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if taken + sizes[document] <= VALID_SHARE_AT_MOST * total:
            taken += sizes[document]
            chosen.add(document)
        if taken >= VALID_SHARE * total:
            break
    return [each for each in documents if each not in chosen], [each for each in documents if each in chosen]


def _by_tail(documents: list[str]) -> tuple[list[str], list[str]]:
    """The last 5 %; a paragraph of it that occurs before goes over to training, so nothing is thrown away."""
    train, tail, unit = _cut(documents)
    wanted = {piece.strip() for text in tail for piece in _units(text, unit)}
    known = {piece.strip() for text in train for piece in _units(text, unit)} & wanted
    valid, moved = [], []
    for text in tail:
        pieces = list(_units(text, unit))
        valid.append("".join(piece for piece in pieces if piece.strip() not in known))
        moved.append("".join(piece for piece in pieces if piece.strip() in known))
    return train + [text for text in moved if text.strip()], [text for text in valid if text.strip()]


PARAGRAPH_END = re.compile(r"\n(?:[ \t\r]*\n)+")
LINE_END = re.compile(r"\n")
BLANK = re.compile(r"\s")


def _cut(documents: list[str]) -> tuple[list[str], list[str], re.Pattern[str]]:
    """Training documents, the tail's documents, and what ends the units that are compared between them."""
    room = (1 - VALID_SHARE) * sum(map(len, documents))
    index = 0
    while len(documents[index]) <= room:
        room -= len(documents[index])
        index += 1
    text = documents[index]
    last = index == len(documents) - 1
    place, unit = _boundary(text, int(room), (int(room) + len(text)) // 2 if last else len(text))
    train = [*documents[:index], text[:place]]
    return [each for each in train if each.strip()], [text[place:], *documents[index + 1:]], unit


def _boundary(text: str, start: int, stop: int) -> tuple[int, re.Pattern[str]]:
    """Where to cut between `start` and `stop`: after a paragraph, else a line, else a word, else at `start`."""
    for end in (PARAGRAPH_END, LINE_END, BLANK):
        if match := end.search(text, start, stop):
            return match.end(), PARAGRAPH_END if end is PARAGRAPH_END else LINE_END
    return start, LINE_END


def _units(text: str, end: re.Pattern[str]) -> Iterator[str]:
    """Paragraphs or lines, each with what separates it from the next: joined they are the text."""
    start = 0
    for match in end.finditer(text):
        yield text[start:match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]
