"""Text -> documents -> training and validation texts that share nothing.

A document is a file, a piece of a file between explicit `<|endoftext|>` marks, or an article of WikiText, which
has splits of its own. The split draws no random numbers: the same documents always give the same two sides.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stoker.config import UserError
from stoker.data.sources import hub, tables

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
VALID_SHARE = 0.05
VALID_SHARE_AT_MOST = 0.10
DOCUMENTS_TO_SPLIT_BY = 20
HEAD_BYTES = 64 * 1024
REFUSALS_NAMED = 20
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
NAMES = (*hub.CONFIGS, "pydocs")
WHAT_TO_GIVE = f"give a text file, a folder of text files, or one of {', '.join(NAMES)}"


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents to judge by; what repeats stands on one side only."""

    train: list[str]
    valid: list[str]
    fingerprint: str
    test: list[str] = field(default_factory=list)  # of data that come with one

    def leaked(self) -> int:
        """How many documents of the validation and test sets occur in training as well: none, or the split is wrong."""
        held_out = {each.strip() for each in self.valid + self.test}
        return len({text for each in self.train if (text := each.strip()) in held_out})


class NotText(Exception):
    """A file that cannot be read as text; the message says why, without the file's name."""


def documents(dataset: str, *, by_line: bool = False) -> Corpus:
    """The corpus that `--dataset` names: one of NAMES, a text file, or a folder of text files (read recursively).
    `by_line`: each line that is not blank is a document.

    In a folder, files that are not UTF-8 text are left out and named in the log.
    Raises UserError where there is nothing to read.
    """
    if problems := check(dataset):
        raise UserError(*problems)
    if dataset in hub.CONFIGS:
        articles = hub.articles(dataset)
        return published(**({split: _lines(each) for split, each in articles.items()} if by_line else articles))
    try:
        found = [document for text in _texts(dataset) for document in _between_marks(text)]
    except OSError as error:
        raise UserError(f"--dataset {dataset}: {_reason(error)}; {WHAT_TO_GIVE}") from error
    if not found:
        raise UserError(f"--dataset {dataset}: holds nothing but blanks; {WHAT_TO_GIVE}")
    found = _lines(found) if by_line else found
    _log_size(dataset, found)
    return split(found)


def published(train: list[str], validation: list[str], test: list[str]) -> Corpus:
    """Splits as they were published. A document that stands in two is taken out of training first, then out of
    validation, so that a figure on the test text means what it means elsewhere."""
    for name, documents in (("training", train), ("validation", validation), ("test", test)):
        _log_size(f"the {name} split", documents)
    valid = _without(validation, test, "validation")
    train = _without(train, [*valid, *test], "training")
    return Corpus(train, valid, fingerprint(map(fingerprint, (train, valid, test))), test)


def check(dataset: str) -> list[str]:
    """What is wrong with a `--dataset`, found before anything is started: reads the first 64 kB at most a file."""
    if dataset in NAMES:
        return []  # packages may not be installed yet: set-up comes after this check
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


def _lines(documents: list[str]) -> list[str]:
    return [line for document in documents for line in document.splitlines() if line.strip()]


# -- reading --------------------------------------------------------------------------------------------------------


def _path(dataset: str) -> Path:
    return Path(os.path.expanduser(dataset))


def _texts(dataset: str) -> list[str]:
    if dataset == "pydocs":
        from stoker.data.text import pydocs

        return [pydocs.build()]
    path = _path(dataset)
    return _folder_texts(path) if path.is_dir() else [_file_text(path)]


def _path_problem(path: Path) -> str:
    """Why nothing can be read at a path, or ''. May raise OSError."""
    if path.is_dir():
        files, _ = _files(path)
        if any(not _head_problem(file) for file in files):
            return ""
        return f"none of its {len(files)} files can be read as text" if files else "the folder has no files in it"
    return _head_problem(path) if path.is_file() else tables.absent(path, NAMES)


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
        raise _not_text(content, f"a zero byte at offset {offset:,}")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if whole or error.reason != "unexpected end of data":
            raise _not_text(content, f"byte 0x{content[error.start]:02x} at offset {error.start:,}") from error
        return content[: error.start].decode()


def _not_text(content: bytes, why: str) -> NotText:
    packed = next((name for start, name in PACKED.items() if content.startswith(start)), "")
    return NotText(f"is not text but a {packed} file: unpack it first" if packed else f"is not UTF-8 text ({why})")


def _between_marks(text: str) -> list[str]:
    """The documents of a text: what stands between the marks, blank ones left out."""
    return [piece for piece in re.split(re.escape(END_OF_TEXT) + r"(?:\r?\n)?", text) if piece.strip()]


# -- the split ------------------------------------------------------------------------------------------------------


def _log_size(what: str, documents: list[str]) -> None:
    log.info("Read %s: %.1f MB, documents: %s", what, sum(map(_bytes, documents)) / 1e6, f"{len(documents):,}")


def _without(documents: list[str], others: list[str], what: str) -> list[str]:
    known = {each.strip() for each in others}
    kept = [each for each in documents if each.strip() not in known]
    if len(kept) < len(documents):
        log.warning("Left out of %s: %s documents that occur in a split to judge by", what,
                    f"{len(documents) - len(kept):,}")
    return kept


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _by_document(documents: list[str]) -> tuple[list[str], list[str]]:
    """In the order of their hashes, whole documents with all their copies until 5 % is reached; blanks around them
    make no difference.

    One that would bring validation over 10 % is passed over, so that a single huge file cannot be all of it.
    """
    hashes = [hashlib.sha256(document.strip().encode()).digest() for document in documents]
    sizes: dict[bytes, int] = {}
    for document, digest in zip(documents, hashes):
        sizes[digest] = sizes.get(digest, 0) + _bytes(document)
    total, taken, chosen = sum(sizes.values()), 0, set()
    for digest in sorted(sizes):
        if taken + sizes[digest] <= VALID_SHARE_AT_MOST * total:
            taken += sizes[digest]
            chosen.add(digest)
        if taken >= VALID_SHARE * total:
            break
    return ([document for document, digest in zip(documents, hashes) if digest not in chosen],
            [document for document, digest in zip(documents, hashes) if digest in chosen])


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
