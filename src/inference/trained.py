"""What the commands that use trained models share: their command line, which model, how well it did, which files."""

import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from stoker import config
from stoker.config import UserError
from stoker.files import hint
from stoker.training.core import pretrained
from stoker.training.core.pretrained import Pretrained

C = TypeVar("C")


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
    source = pretrained.find(named, stage)
    if source.stage not in ("", stage):
        raise UserError(f"--model {named}: {source} is of stage {source.stage}, not of {stage}, which {does}")
    return source


def require_torch(script: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"torch is not installed for this Python ({sys.executable}): use {hint(script)}")


def scored(source: Pretrained, names: Collection[str]) -> str:
    """How well a model did when it was evaluated: "wer 3.2%, cer 0.6% on validation data of spoken"."""
    rates = [f"{name} {source.scores[f'eval/{name}']:.1%}" for name in names if f"eval/{name}" in source.scores]
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


def tell(line: str) -> None:
    """On standard output, whatever bytes a file's name has; a terminal gets no control characters."""
    if sys.stdout.isatty():
        line = config.printable(line)
    sys.stdout.buffer.write(f"{line}\n".encode(errors="surrogateescape"))
    sys.stdout.buffer.flush()


def note(line: str) -> None:
    """Print a line on standard error, such as which model answers."""
    print(config.printable(line), file=sys.stderr, flush=True)
