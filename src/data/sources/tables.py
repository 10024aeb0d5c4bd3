"""Tables of a data set, CSV or TSV: what stands in their rows, and where the files lie that they name."""

import csv
import difflib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from stoker import files
from stoker.config import UserError

# Bytes. More would only take memory:
TABLE = 2**31  # of a table: ten million rows have less
TEXT = 2**20  # of the text of one recording or picture


def rows(path: Path, columns: Mapping[str, Sequence[str]], advice: str) -> Iterator[dict[str, str]]:
    """What stands in each row, by what it is; '' where nothing does.

    `columns`: what -> the names that its column may have. A first row that names a "path" and one more of them is a
    header; without one, a row is a "path" and a "text". A row is one line; those that begin with # are skipped.
    `advice` is what to do about mistakes. Raises UserError.
    """
    try:
        content = files.read(path, most=TABLE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset {path}: is not UTF-8 text ({error.reason}); {advice}") from error
    # splitlines() would part at more than line ends
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    table = ((number, _cells(path, number, line)) for number, line in enumerate(lines, 1)
             if line.strip() and not line.startswith("#"))
    begin = next(table, None)
    if begin is None:
        raise UserError(f"--dataset {path}: has no rows; {advice}")
    first = begin[1]
    places = _header(first, columns)
    if not places and not os.path.splitext(first[0].strip())[1]:  # the first cell is no file
        _check_header(path, first, columns)
    if not places and len(first) < 2:
        raise UserError(f"--dataset {path}: a row is `file,text`, the first is {','.join(first)!r}; {advice}")
    most = len(first) if places else 2
    for number, row in table if places else [begin, *table]:
        if len(row) > most:
            raise UserError(f"--dataset {path}: line {number} has {len(row)} cells instead of {most}: put a text that "
                            'has a comma in quotes, "1,234.50"')
        cells = {what: row[place].strip() for what, place in (places or {"path": 0, "text": 1}).items()
                 if place < len(row)}
        yield {what: cells.get(what, "") for what in columns}


def _cells(path: Path, number: int, line: str) -> list[str]:
    """Of a line, without empty ones at its end. Raises UserError."""
    if len(line) > csv.field_size_limit():
        raise UserError(f"--dataset {path}: line {number} has {len(line):,} characters, more than "
                        f"{csv.field_size_limit():,}: a row is one line")
    try:
        found = next(csv.reader([line.rstrip("\r")], delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    except csv.Error as error:
        raise UserError(f"--dataset {path}: line {number} has a cell that begins with a quote and does not end with "
                        f'one ({error}): write a quote in a quoted cell twice, "5"" x 7"""') from error
    while found and not found[-1].strip():
        found.pop()
    return found


def _header(row: Sequence[str], columns: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """What stands where; empty where the row is no header."""
    names = _names(row)
    found = {what: names.index(name) for what, known in columns.items() for name in reversed(known) if name in names}
    return found if "path" in found and len(found) > 1 else {}


def _check_header(path: Path, row: Sequence[str], columns: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where some cells of the first row are names of columns, but a needed one is missing."""
    names = set(_names(row))
    if known := {name for all_names in columns.values() for name in all_names} & names:
        lacking = "text" if names & set(columns["path"]) else "path"
        raise UserError(f"--dataset {path}: the first row, {','.join(row)!r}, has the column {min(known)} but none for "
                        f"the {'file' if lacking == 'path' else 'text'}, which is called "
                        f"{' or '.join(columns[lacking])}: rename it")


def _names(row: Sequence[str]) -> list[str]:
    """The cells of a header, as columns are called."""
    return [cell.strip().lower() for cell in row]


def located(named: str, folder: Path) -> str:
    """The path of a file that something in a folder names: beside it, or else in the working folder."""
    beside = folder / os.path.expanduser(named)  # an absolute one stays as it is
    exists = os.path.exists  # false also for names that no file can have
    return str(beside if exists(beside) or not exists(named) else Path(named).resolve())


def text(path: str, read: Callable[[], bytes]) -> str:
    """The text of a recording or picture, which stands in a file of its own. Raises UserError."""
    try:
        return read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset {path}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"--dataset {path}: {files.reason(error)}") from error


def problems(name: str, made: Collection[str], look: Callable[[], object], advice: str) -> list[str]:
    """What is wrong with a `--dataset`, which `look` finds by looking into it; nothing with those that are `made` here,
    since the packages for that may not be installed yet. `advice` is what to give instead."""
    if name in made:
        return []
    if not name:
        return [f"--dataset is empty; {advice}"]
    try:
        look()
    except UserError as error:
        return list(error.problems)
    except OSError as error:
        return [f"--dataset {name}: cannot be read ({error.strerror}); {advice}"]
    return []


def absent(path: Path, names: Collection[str]) -> str:
    """Why nothing can be read at a path where there is neither a file nor a folder. `names`: what else can be meant."""
    if path.exists():
        return "is a pipe, a socket or a device: save what it gives as a file"
    return f"there is no such file or folder{_nearest(path, names)}"


def _nearest(path: Path, names: Collection[str]) -> str:
    """What was meant by a path where nothing is, as " (did you mean ...?)": something beside it, or one of the
    `names`; or ''."""
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*beside, *names], n=1)
    return f" (did you mean {close[0] if close[0] in names else path.with_name(close[0])}?)" if close else ""


def files_below(folder: Path, suffixes: Sequence[str]) -> Iterable[Path]:
    """The files in a folder and those in it, in the order of their names, nothing hidden."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names)
                    if not name.startswith(".") and Path(name).suffix.lower() in suffixes)
