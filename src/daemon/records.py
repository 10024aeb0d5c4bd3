"""Dataclasses from the small JSON files of a run, which a power cut may have damaged or somebody else have written."""

import dataclasses
import functools
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from stoker import files

T = TypeVar("T")
MOST = 2**20  # bytes of such a file


def read(path: Path, cls: type[T]) -> T:
    """The dataclass that a file holds as JSON. Raises OSError where it cannot be read as a small file, and ValueError
    where it holds something else, or a single value has another type."""
    return build(cls, load(path))


def load(path: Path) -> Any:
    """The value that a file holds as JSON. Raises OSError where it cannot be read as a small file, else ValueError."""
    return parse(files.read(path, most=MOST))


def parse(content: bytes) -> Any:
    """A value from JSON in UTF-8. Raises ValueError."""
    try:
        return json.loads(content.decode())
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def build(cls: type[T], content: Any) -> T:
    """A dataclass from a JSON object. Raises ValueError where a name or the type of a value does not fit."""
    if not isinstance(content, dict):
        raise ValueError(f"is {type(content).__name__}, not an object")
    key: Any = cls  # mypy takes no type for hashable
    kinds, required = _kinds(key), _required(key)
    if unknown := content.keys() - kinds.keys():
        raise ValueError(f"has the unknown key {min(unknown)!r}: written by another version?")
    if missing := required - content.keys():
        raise ValueError(f"has no key {min(missing)!r}")
    for name, value in content.items():
        if not any(_fits(value, kind) for kind in kinds[name]):
            raise ValueError(f"has {str(value)[:40]!r} as its {name}, which is not valid")
    return cls(**content)


@functools.cache
def _kinds(cls: type) -> dict[str, tuple[Any, ...]]:
    """For each field, the types that it may have."""
    return {name: typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            for name, kind in typing.get_type_hints(cls).items()}


@functools.cache
def _required(cls: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls)
                     if field.default is field.default_factory is dataclasses.MISSING)


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if origin is float and type(value) is float:
        return True
    if origin in (int, float):  # JSON may spell 2.0 as 2; a number of 400 digits is neither
        return type(value) is int and abs(value) < 2**63
    return type(value) is origin
