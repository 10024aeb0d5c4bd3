"""What the commands that use trained models share: their command line, which model, how well it did, which files, and
what is printed of each."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stoker import config
from stoker.config import UserError
from stoker.daemon.table import figure
from stoker.data.pictures import images
from stoker.files import hint
from stoker.training.core import pretrained
from stoker.training.core.pretrained import Pretrained

if TYPE_CHECKING:
    from torch import Tensor

ESCAPED = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})  # in paths: an answer is a line of two columns
C = TypeVar("C")
T = TypeVar("T")


def command(cls: type[C], usage: str, argv: Sequence[str], work: Callable[[C, list[str], bool], int]) -> int:
    """The exit code of a command line: of its help, or of `work`, given the options, the words beside them, and whether
    mistakes alone are looked for."""
    if {"--help", "-h"} & set(argv):
        print(config.help_text(cls, {}, usage))
        return 0
    words: list[str] = []
    cfg = config.parse(cls, {}, [word for word in argv if word != "--check"], words=words).config
    return work(cfg, words, "--check" in argv)


def found(named: str, stage: str, does: str) -> Pretrained:
    """The weights that --model names. Raises UserError where they are not of the stage, the one that `does` something:
    "hears"."""
    source = pretrained.held(lambda: pretrained.find(named, (stage,)))
    if source.stage not in ("", stage):
        raise UserError(f"--model {named}: {source} is of stage {source.stage}, not of {stage}, which {does}")
    return source


def require_torch(script: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"torch is not installed for this Python ({sys.executable}): use {hint(script)}")


def scored(source: Pretrained, names: Collection[str]) -> str:
    """How well a model did when it was evaluated: "wer 3.2%, cer 0.6% on validation data of spoken"."""
    rates = [f"{name} {figure(name, source.scores[f'eval/{name}'])}" for name in names
             if f"eval/{name}" in source.scores]
    data = Path(str(source.options.get("dataset", ""))).name
    return f"{', '.join(rates)} on validation data of {data}" if rates else "not evaluated at that step"


def files(words: Sequence[str], suffixes: Collection[str], what: str) -> Iterator[str]:
    """The files that words mean, those of a folder in the order of their names; - as it is. Raises UserError for all
    mistakes."""
    problems = []
    for word in words:
        inside = sorted(str(path) for path in Path(word).rglob("*")
                        if path.suffix.lower() in suffixes and not path.is_dir())
        if word == "-" or Path(word).is_file():
            yield word
        elif inside:
            yield from inside
        elif Path(word).is_dir():
            problems.append(f"{word} has no {what} files ({', '.join(suffixes)}) in it")
        elif os.path.exists(word):
            problems.append(f"{word} is a pipe, a socket or a device, not a file; give - to read standard input")
        else:
            problems.append(f"{word}: there is no such file or folder")
    if problems:
        raise UserError(*problems)


def inputs(words: Sequence[str], suffixes: Collection[str], what: str) -> list[str]:
    """The files to read, see `files`. Raises UserError where the user named none."""
    if not words:
        raise UserError(f"which {what}? give files, folders, or - for standard input")
    if words.count("-") > 1:
        raise UserError("- is given twice, but standard input can be read once: leave one out")
    return list(files(words, suffixes, what))


def answer(paths: Sequence[str], read: Callable[[str], T], error: type[Exception],
           answers: Callable[[list[T]], Iterable[dict[str, Any]]], lines: Callable[[dict[str, Any]], Iterable[str]], *,
           as_json: bool, at_once: int = 1) -> int:
    """Print the model's answer to each file: a line of JSON, or `lines` of the answer, each after the file's path where
    there are several files. Returns the exit code: 1 where a file could not be read, which is reported.

    `read` opens a file, or raises `error`. `answers` returns the model's answers to the files of a group, which has at
    most `at_once`.
    """
    unread = 0
    for part in (paths[start:start + at_once] for start in range(0, len(paths), at_once)):
        opened: list[tuple[str, T]] = []
        for path in part:
            try:
                opened.append((path, read(path)))
            except error as problem:
                config.complain([f"{path} {problem}"])
                unread += 1
        for (path, _), found in zip(opened, answers([content for _, content in opened])):
            if as_json:
                write_line(json.dumps({"file": path, **found}, ensure_ascii=False))
                continue
            for line in lines(found):
                write_line(line if len(paths) == 1 else f"{path.translate(ESCAPED)}\t{line}")
    return 1 if unread else 0


def picture(path: str) -> "Tensor":
    """(3, H, W) uint8; - reads standard input. Raises images.ImageError."""
    from stoker.data.pictures import resized

    return resized.opened(sys.stdin.buffer.read(images.BYTES + 1) if path == "-" else path)


def write_line(line: str) -> None:
    """Write a line to standard output, whatever bytes a file's name has; on a terminal without control characters."""
    if sys.stdout.isatty():
        line = config.printable(line)
    sys.stdout.buffer.write(f"{line}\n".encode(errors="surrogateescape"))
    sys.stdout.buffer.flush()


def note(line: str) -> None:
    """Print a line on standard error, such as which model answers."""
    print(config.printable(line), file=sys.stderr, flush=True)
