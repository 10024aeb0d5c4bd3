"""Callbacks that the user adds, without a change of ours.

    FILE.py:CLASS                       a class in a file of the user's
    FILE.py:CLASS:key=value,other=3     the same with arguments
    NAME, NAME:key=value                of an installed package, which offers it as an entry point

Several stand with commas between them.
"""

import ast
import importlib.util
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from stoker import files
from stoker.config import UserError, listed
from stoker.training.core.callback import EVENTS, Callback
from stoker.training.core.outside import module_from
from stoker.training.core.stage import Stage

GROUP = "stoker.callbacks"  # of entry points
ARGUMENT = re.compile(r"[^\W\d]\w*=")


def load(text: str) -> list[Callback]:
    """New callbacks as an option names them. Raises UserError with every mistake."""
    made, problems = list[Callback](), list[str]()
    for written in _each(text):
        try:
            made.append(_made(written))
        except UserError as error:
            problems += [f"--callback {written}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return made


def problems(text: str) -> list[str]:
    """Mistakes in such an option. Where nothing is set up yet, what the files import is missing too: then only whether
    they are there, and the start itself asks again."""
    if importlib.util.find_spec("torch") is None:
        return [f"--callback {written}: not found" for written in _each(text)
                if (path := _file(written)) and not path.is_file()]
    try:
        check_keys(load(text))
    except UserError as error:
        return [*error.problems]
    return []


def absolute(text: str) -> str:
    """The same with absolute paths, so that it means the same when the run is resumed from another folder."""
    return ",".join(f"{path.resolve()}:{written.partition(':')[2]}" if (path := _file(written)) else written
                    for written in _each(text))


def check_keys(callbacks: Iterable[Callback]) -> None:
    """Raises UserError where two callbacks have one key."""
    for key, count in Counter(callback.key for callback in callbacks).items():
        if count > 1:
            raise UserError(f"{count} callbacks of this run are called {key}: give one of the classes another name, or "
                            "a `key` of its own")


def digests(plugged_in: Iterable[Stage | Callback]) -> dict[str, str]:
    """The SHA-256 of each file outside the package that declares one of these, or a class that it is derived from."""
    kinds = {kind for one in plugged_in for kind in type(one).__mro__ if issubclass(kind, (Stage, Callback))}
    found = [getattr(sys.modules[kind.__module__], "__file__", None) for kind in kinds]  # none if typed with -c
    paths = {Path(path).resolve() for path in found if path}
    return {str(path): files.sha256(path) for path in sorted(paths) if not path.is_relative_to(files.PACKAGE)}


def _each(text: str) -> Iterator[str]:
    """The callbacks of an option, each with its arguments."""
    found = list[str]()
    for part in listed(text):
        if ARGUMENT.match(part) and found and "=" in found[-1]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return iter(found)


def _file(written: str) -> Path | None:
    """The file that is named; None for one of an installed package."""
    source = written.partition(":")[0]
    return Path(source) if source.endswith(".py") else None


def _made(written: str) -> Callback:
    source, _, rest = written.partition(":")
    if path := _file(written):
        name, _, rest = rest.partition(":")
        kind = _in_file(path, name)
    else:
        kind = _installed(source)
    if not (inspect.isclass(kind) and issubclass(kind, Callback)):
        raise UserError(f"{getattr(kind, '__name__', kind)} is not a Callback: derive it from stoker.training.Callback")
    if unknown := [name for name in dir(kind) if name.startswith("on_") and name not in EVENTS]:
        raise UserError(f"{kind.__name__}.{unknown[0]} would never be called; the events are {', '.join(EVENTS)}")
    arguments = _arguments(kind, rest)
    try:
        made = kind(**arguments)
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{kind.__name__} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(made.order, int):
        raise UserError(f"order is {made.order!r}: it must be a whole number, such as OBSERVE")
    return made


def _in_file(path: Path, name: str) -> Any:
    module = module_from(path.resolve())
    if name not in vars(module):
        own = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Callback)
               and value.__module__ == module.__name__]
        raise UserError(f"there is no class {name!r} in it; callbacks there: {', '.join(own) or 'none'}" if name else
                        f"which class? callbacks there: {', '.join(own) or 'none'}")
    return vars(module)[name]


def _installed(name: str) -> Any:
    offered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in offered:
        raise UserError(f"no installed package offers a callback of this name (they offer: "
                        f"{', '.join(sorted(offered)) or 'none'}); one in a file is named FILE.py:CLASS")
    try:
        return offered[name].load()
    except Exception as error:  # whatever the package raises
        raise UserError(f"{offered[name].value} cannot be loaded: {type(error).__name__}: {error}") from error


def _arguments(kind: type[Callback], text: str) -> dict[str, Any]:
    """What `key=value,...` gives to a class: Python literals, and everything else as a string. Raises UserError where
    the class does not take it."""
    accepted = inspect.signature(kind)
    arguments = dict[str, Any]()
    for part in listed(text):
        name, equals, value = part.partition("=")
        if not equals or name in arguments:
            raise UserError(f"{part!r} must be key=value" if not equals else f"{name} is given twice")
        known = accepted.parameters.get(name)
        arguments[name] = value if known and known.annotation in (str, "str") else _value(value)
    try:
        accepted.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{kind.__name__}{accepted} does not take these arguments: {error}") from error
    return arguments


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
