"""One typed config a stage: defaults < preset < JSON file < flags, and the help and error texts for all of them.

A config is a flat dataclass, usually put together from groups by inheritance; each group's docstring is its
heading in `--help`. A field is declared by `opt`, and is all there is: the flag, the JSON key, the check, the
help line. Standard library only: `--help` answers on a machine where nothing is installed.
"""

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TextIO, TypeVar

C = TypeVar("C")
ENDLESS = sys.maxsize  # rows of training data without end, and the steps of an epoch of them
HARMLESS = "\t\u200c\u200d"  # the last two join letters, or keep them apart, in many scripts and in emoji


class UserError(Exception):
    """Mistakes of the user's, each one clear line: what is wrong, its value, what to do. Exit code 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class Damaged(UserError):
    """A file that Stoker keeps is not what it wrote. It has been removed: the next start makes it again."""


@dataclass(frozen=True)
class Spec:
    """What `opt` says of a field beside its default."""

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    usual: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    bare: str | None = None
    path: tuple[str, ...] | None = None
    may_change: bool = False
    follows: tuple[str, float] | None = None
    repeats: bool = False

    def problem(self, value: float) -> str:
        """Why a number is out of range or not finite, or ''. Written so that NaN is out of every range."""
        limits = [
            (self.ge, self.ge is None or value >= self.ge, "at least"),
            (self.gt, self.gt is None or value > self.gt, "above"),
            (self.le, self.le is None or value <= self.le, "at most"),
            (self.lt, self.lt is None or value < self.lt, "below"),
        ]
        if all(holds for _, holds, _ in limits):
            return "" if abs(value) < math.inf else "must be a finite number"
        return "must be " + " and ".join(f"{word} {bound:g}" for bound, _, word in limits if bound is not None)


def opt(default: Any, help: str, **spec: Any) -> Any:
    """Declare a config field.

    ge, gt, le, lt   bounds of a number; outside is an error
    usual            (low, high): outside is a warning
    choices          the words a string may be
    aliases          other names of the flag; one alias may set several fields
    bare             the value meant by the flag alone (`--resume`)
    path             names a file or folder, unless it is one of these words; kept as an absolute path, so that it
                     means the same when the run goes on from another folder
    may_change       may differ when a run goes on: it does not change what is computed
    repeats          the flag may be given several times: the values are joined by commas
    follows          (field, factor): where that field is given and this one is not, its value is factor x the other's
    """
    return field(default=default, metadata={"spec": Spec(help, **spec)})


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """A config, and where its values come from."""

    config: C
    typed: frozenset[str]  # the names given by flag or file: kept as they are, never adjusted
    preset: str


def fields(cls: type) -> dict[str, tuple[Any, Spec, Any]]:
    """name -> (type, spec, default) of every field, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f.metadata["spec"], f.default) for f in dataclasses.fields(cls)}


def names(cls: type) -> dict[str, list[str]]:
    """Every name a value may be given by -> the fields it sets."""
    table: dict[str, list[str]] = {}
    for name, (_, spec, _) in fields(cls).items():
        for known in (name, *spec.aliases):
            table.setdefault(known, []).append(name)
    return table


def current_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an earlier version under the names that their options have now: a former name is an alias."""
    known = names(cls)
    return {known.get(name, [name])[0]: value for name, value in values.items()}


def select(kind: type[C], config: Any) -> C:
    """An object of a dataclass, from the options that have the names of its fields."""
    return kind(**{field.name: getattr(config, field.name)
                   for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def listed(text: str) -> list[str]:
    """What stands between commas, in an option that names several."""
    return [name.strip() for name in text.split(",") if name.strip()]


# -- from the command line ------------------------------------------------------------------------------------------


def parse(cls: type[C], presets: Mapping[str, Mapping[str, Any]], argv: Sequence[str],
          further: Callable[[C], list[str]] = lambda config: [], words: list[str] | None = None) -> Parsed[C]:
    """The config that a command line asks for. `further` returns mistakes that the config itself cannot know.

    What stands beside flags and their values is put into `words`; without such a list it is a mistake.
    Raises UserError with every mistake at once.
    """
    problems: list[str] = []
    given = list(_flags(cls, argv, problems, words))
    flags = _without_contradictions(cls, given, problems)
    invalid = {flag.field for flag in given if flag.value is INVALID}
    path = flags.pop("config", "")
    typed = read_json(cls, Path(path), problems, invalid) if path else {}
    typed.update(flags)
    preset = typed.pop("preset", "")
    if preset and preset not in presets:
        problems.append(f"--preset: {preset!r} is none of {', '.join(presets) or 'no presets'}"
                        f"{_nearest(preset, presets)}")
    typed = {name: _absolute(fields(cls)[name][1], value) for name, value in typed.items()}
    computed = {name: value for name, (value, _) in following(cls, typed).items()}
    config = cls(**{**presets.get(preset, {}), **computed, **typed})
    problems += check(config, invalid) + further(config)
    if problems:
        raise UserError(*dict.fromkeys(problems))  # a flag that sets two fields has one mistake
    return Parsed(config, frozenset(typed), preset)


def following(cls: type, typed: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The fields whose values follow from those of fields that were given, each with its value and a line that says so.
    Of a value out of range nothing follows."""
    table = fields(cls)
    return {name: (value, f"{name} {value} ({factor:.3g} x the {other} given; --{name} sets another)")
            for name, (_, spec, _) in table.items() if spec.follows and name not in typed
            for other, factor in [spec.follows] if other in typed and not table[other][1].problem(typed[other])
            for value in [round(factor * typed[other])]}


def _absolute(spec: Spec, value: Any) -> Any:
    is_path = spec.path is not None and value and value not in spec.path and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value


class _Given(NamedTuple):
    """A value for a field: `flag` as it was typed, and whether that sets other fields as well."""

    field: str
    value: Any
    flag: str
    sets_several: bool


def _without_contradictions(cls: type, given: Sequence[_Given], problems: list[str], where: str = "") -> dict[str, Any]:
    """field -> value. A flag that sets this field alone wins over one that sets several. Two different values from
    flags of the same kind are a mistake, which is added to `problems`."""
    chosen: dict[str, _Given] = {}
    for now in sorted(given, key=lambda one: one.sets_several):
        before = chosen.setdefault(now.field, now)
        if _spec(cls, now.field).repeats and before is not now and INVALID not in (before.value, now.value):
            chosen[now.field] = before._replace(value=f"{before.value},{now.value}")
            continue
        values = {_absolute(_spec(cls, now.field), one.value) for one in (before, now)}
        if len(values) > 1 and before.sets_several == now.sets_several and INVALID not in values:
            problems.append(f"{where}{before.flag} and {now.flag} contradict each other: give one of them")
    return {field: one.value for field, one in chosen.items() if one.value is not INVALID}


class _Invalid:
    """Stands for a value that was already complained about, so that it is not complained about twice."""


INVALID = _Invalid()
META = {"preset": ("preset", "model_preset", "hardware"), "config": ("config",)}


def _flags(cls: type, argv: Sequence[str], problems: list[str],
           words: list[str] | None) -> Iterator[_Given]:
    """What each flag on the command line gives to each field that it sets, mistakes added to `problems`."""
    table = names(cls) | {alias: [meta] for meta, aliases in META.items() for alias in aliases}
    left = list(argv)
    while left:
        token = left.pop(0)
        if words is not None and token == "--":  # what follows are words, whatever they look like
            words += left
            return
        if words is not None and not _looks_like_flag(token):
            words.append(token)
            continue
        if not token.startswith("-"):
            problems.append(f"{token!r} is no flag; flags start with --")
            continue
        name, equals, text = token.lstrip("-").partition("=")
        name = name.replace("-", "_")
        value = text if equals else None
        negated = name.startswith("no_") and name not in table
        targets = table.get(name.removeprefix("no_") if negated else name)
        if targets is None or (negated and not _is_bool(cls, targets[0])):
            typed = token.partition("=")[0]
            problems.append(f"there is no flag {typed}{_nearest(name, _flag_names(cls, table), '--')}")
            if left and not _looks_like_flag(left[0]) and value is None:
                left.pop(0)  # most likely its value: one mistake, one line
            continue
        for target in targets:
            if _is_bool(cls, target):
                yield _Given(target, _bool_flag(name, value, negated, problems), token, len(targets) > 1)
                continue
            if value is None and left and not _looks_like_flag(left[0]):
                value = left.pop(0)
            typed = token if equals or value is None else f"{token} {value}"
            yield _Given(target, _flag_value(cls, target, name, value, problems), typed, len(targets) > 1)


def _flag_names(cls: type, table: Mapping[str, list[str]]) -> list[str]:
    return [*table, *(f"no_{name}" for name, targets in table.items() if _is_bool(cls, targets[0]))]


def _looks_like_flag(token: str) -> bool:
    return re.match(r"--?[a-zA-Z]", token) is not None


def without(argv: Sequence[str], *flags: str) -> list[str]:
    """A command line without some flags and their values."""
    left, dropped = list[str](), False
    for token in argv:
        if _looks_like_flag(token):
            dropped = token.lstrip("-").partition("=")[0].replace("-", "_") in flags
        left += [token] * (not dropped)
    return left


def _is_bool(cls: type, name: str) -> bool:
    return name not in META and _base(fields(cls)[name][0]) is bool


def _bool_flag(name: str, text: str | None, negated: bool, problems: list[str]) -> Any:
    if text is None:
        return not negated
    if negated:
        problems.append(f"--{name} takes no value, is {text!r}")
        return INVALID
    if text.lower() not in ("true", "false"):
        problems.append(f"--{name}: {text!r} is neither true nor false")
        return INVALID
    return text.lower() == "true"


def _flag_value(cls: type, target: str, name: str, text: str | None, problems: list[str]) -> Any:
    kind, spec = str if target in META else fields(cls)[target][0], _spec(cls, target)
    if text is None:
        text = spec.bare
    if text is None:
        problems.append(f"--{name} needs a value")
        return INVALID
    base = _base(kind)
    if base is str:
        return text
    try:
        return base(text)
    except ValueError:
        problems.append(f"--{name}: {text!r} is not {_describe(base)}")
        return INVALID


def _spec(cls: type, name: str) -> Spec:
    return Spec("") if name in META else fields(cls)[name][1]


def _base(kind: Any) -> type:
    """The type behind `T | None`."""
    arms = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return typing.cast(type, next(arm for arm in arms if arm is not type(None)))


def _describe(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]


def _nearest(name: str, known: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


# -- from a file ----------------------------------------------------------------------------------------------------


def read_json(cls: type, path: Path, problems: list[str], invalid: set[str]) -> dict[str, Any]:
    """field -> value from a partial JSON file; `//` comments are allowed.

    Mistakes are added to `problems`, the fields they concern to `invalid`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # to read it may never end
        problems.append(f"--config {path}: is a pipe or a device, not a file")
        return {}
    try:
        content = json.loads(_without_comments(path.read_text(encoding="utf-8")), object_pairs_hook=_without_repeats)
    except UserError as error:
        problems.extend(f"--config {path}: {problem}" for problem in error.problems)
        return {}
    except OSError as error:
        problems.append(f"--config {path}: {error.strerror}")
        return {}
    except (ValueError, RecursionError) as error:  # RecursionError: it is too deep
        problems.append(f"--config {path}: not JSON: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"--config {path}: must be an object {{...}}, is {type(content).__name__}")
        return {}
    return _known_values(cls, content, f"--config {path}", problems, invalid)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises UserError where one key has two values."""
    last = dict(pairs)
    if repeated := [key for key, value in pairs if value is not last[key] and value != last[key]]:
        raise UserError(*(f"{key} is given twice, with different values: leave one out" for key in repeated))
    return last


def _known_values(cls: type, content: dict[str, Any], where: str, problems: list[str],
                  invalid: set[str]) -> dict[str, Any]:
    table = names(cls) | {name: ["preset"] for name in META["preset"]}
    given: list[_Given] = []
    for key, value in content.items():
        targets = table.get(key.replace("-", "_"), [])
        if not targets:
            problems.append(f"{where}: there is no setting {key!r}{_nearest(key, table)}")
        for target in targets:
            kind = str if target == "preset" else fields(cls)[target][0]
            if _fits(kind, value):
                number = float(value) if _base(kind) is float and value is not None else value
                given.append(_Given(target, number, key, len(targets) > 1))
            else:
                problems.append(f"{where}: {key} is {json.dumps(value)}, not {_describe(_base(kind))}")
                invalid.add(target)
    return _without_contradictions(cls, given, problems, f"{where}: ")


def _fits(kind: Any, value: Any) -> bool:
    if value is None:
        return isinstance(kind, types.UnionType)
    if isinstance(value, bool):
        return _base(kind) is bool
    return isinstance(value, (int, float) if _base(kind) is float else _base(kind))


def _without_comments(text: str) -> str:
    """JSON without its // comments; strings that contain // are left alone."""
    return re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda match: match.group(1) or "", text)


def to_json(config: Any) -> dict[str, Any]:
    """What `--config` reads back to the same config."""
    return dataclasses.asdict(config)


def from_json(cls: type[C], content: dict[str, Any], where: str) -> C:
    """A config from a whole JSON object. Raises UserError."""
    problems: list[str] = []
    invalid: set[str] = set()
    config = cls(**_known_values(cls, content, where, problems, invalid))
    problems += check(config, invalid)
    if problems:
        raise UserError(*problems)
    return config


# -- checks ---------------------------------------------------------------------------------------------------------


def check(config: Any, invalid: Collection[str] = ()) -> list[str]:
    """Every value out of range, then what the groups' own `problems` find.

    `invalid` names the fields that were complained about already. A group with a mistake in one of its fields is
    not asked: what it would say follows from that mistake.
    """
    found, wrong = [], set(invalid)
    for name, (kind, spec, _) in fields(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if why := spec.problem(value):
                found.append(f"--{name} {why}, is {value}")
                wrong.add(name)
        elif spec.choices and value is not None and value not in spec.choices:
            found.append(f"--{name}: {value!r} is none of {', '.join(spec.choices)}{_nearest(value, spec.choices)}")
            wrong.add(name)
    for group in type(config).__mro__:
        if "problems" in vars(group) and not wrong & inspect.get_annotations(group).keys():
            found += vars(group)["problems"](config)
    return found


def unusual(config: Any) -> list[str]:
    """Values that are allowed, but outside what is common."""
    return [
        f"{name} {getattr(config, name):,} is outside the usual {spec.usual[0]:,} to {spec.usual[1]:,}"
        for name, (_, spec, _) in fields(type(config)).items()
        if spec.usual and getattr(config, name) is not None
        and not spec.usual[0] <= getattr(config, name) <= spec.usual[1]
    ]


# -- help -----------------------------------------------------------------------------------------------------------


def help_text(cls: type, presets: Mapping[str, Mapping[str, Any]], usage: str,
              flags: Mapping[str, Mapping[str, str]] = {}) -> str:
    """The page that `--help` prints: groups in the order of their declaration, one option a paragraph. `flags`: other
    flags with their help, by heading; these groups are printed last."""
    lines = [usage, "", "Choosing:"]
    if presets:
        lines += _entry("--preset NAME, --model_preset, --hardware",
                        f"one of {', '.join(presets)}"
                        + ("; auto: low, mid or high, as suits this machine" if "low" in presets else ""))
    lines += _entry("--config FILE", "values from a JSON file (partial; // comments allowed); flags win over it")
    table = fields(cls)
    groups: dict[str, list[str]] = {}
    for group in reversed(cls.__mro__):
        heading = (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")
        groups.setdefault(heading, []).extend(name for name in inspect.get_annotations(group) if name in table)
    for heading, own in groups.items():
        if own:
            lines += ["", f"{heading}:", *(line for name in own for line in _entry(*_option(name, *table[name])))]
    for heading, entries in flags.items():
        lines += ["", f"{heading}:", *(line for entry in entries.items() for line in _entry(*entry))]
    return "\n".join(lines)


def _option(name: str, kind: Any, spec: Spec, default: Any) -> tuple[str, str]:
    metavar = {int: " N", float: " X", str: " TEXT", bool: ""}[_base(kind)]
    if spec.choices:
        metavar = " {" + ",".join(spec.choices) + "}"
    if spec.bare is not None:
        metavar = f" [{metavar.strip()}]"
    aliases = "".join(f", {'-' if len(alias) == 1 else '--'}{alias}" for alias in spec.aliases)
    if _base(kind) is bool:
        shown = "off" if default is False else f"{'on' if default else 'auto'}; --no_{name} switches it off"
    else:
        shown = "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    if spec.follows:
        shown += f"; {spec.follows[1]:.3g} x {spec.follows[0]} where that is given"
    return f"--{name}{metavar}{aliases}", spec.help + (f" (default: {shown})" if shown else "")


def _entry(flag: str, help: str) -> list[str]:
    import textwrap

    body = textwrap.wrap(help, 84, break_on_hyphens=False)
    if len(flag) <= 30:
        return [f"  {flag:30s}  {body[0]}", *(" " * 34 + line for line in body[1:])]
    return [f"  {flag}", *(" " * 34 + line for line in body)]


def program() -> str:
    """The name of what the user called: a script of run/ says so, whatever it calls in turn."""
    return os.environ.get("STOKER_SCRIPT") or Path(sys.argv[0]).name


def printable(text: str) -> str:
    """A line for a terminal: control characters and others that cannot be seen are spelled out (`\\n`, `\\x1b`), since
    a name from elsewhere may hold commands to the terminal. Tabs, spaces of any width and joiners stay."""
    return "".join(letter if letter.isprintable() or letter in HARMLESS or unicodedata.category(letter) == "Zs"
                   else ascii(letter)[1:-1] for letter in text)


def complain(problems: Sequence[str], file: TextIO | None = None) -> None:
    """Print mistakes as a program does, one a line, on standard error or to `file`."""
    for problem in problems:
        print(printable(f"{program()}: {problem}"), file=file or sys.stderr)
