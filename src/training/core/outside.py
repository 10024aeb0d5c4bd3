"""Stages and callbacks from files of the user's, outside the package."""

import dataclasses
import functools
import hashlib
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from stoker import files
from stoker.config import UserError
from stoker.daemon.rundir import RunDir
from stoker.training.core.options import Options
from stoker.training.core.stage import Stage, discover

LONGEST = 2**24  # bytes of a file that is loaded


def of_run(run: RunDir) -> type[Stage]:
    """The stage of a run, be it one of ours or in a script of the user's. Raises UserError where there is none."""
    name, found = run.status().stage, discover()
    if name not in found:
        script = run.script()
        found = {getattr(kind, "name", ""): kind for kind in vars(module_from(script)).values()
                 if inspect.isclass(kind) and issubclass(kind, Stage)}
        if name not in found:
            raise UserError(f"run {run.name} is of stage {name}, which {script} does not declare")
    return found[name]


def check_declared(kind: type[Stage]) -> None:
    """Raises UserError where the class of a stage lacks what every start needs, or has a name of one of ours."""
    name, options = getattr(kind, "name", None), getattr(kind, "Config", None)
    path = Path(getattr(sys.modules[kind.__module__], "__file__", None) or "-")  # none if typed with -c
    problems = list[str]()
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
        problems.append(f"name is {name!r}: give the class a name of lower case letters, digits and _, such as "
                        'name = "series"')
    elif not path.resolve().is_relative_to(files.PACKAGE) and name in discover():
        problems.append(f"there is a stage {name} already, and commands on its runs would take that one: choose "
                        "another name")
    if not (inspect.isclass(options) and issubclass(options, Options) and dataclasses.is_dataclass(options)):
        problems.append("it has no Config: declare its options in a dataclass derived from Options, Config = ...")
    else:
        known = {field.name for field in dataclasses.fields(options)}
        if "dataset" not in known:
            problems.append("its Config has no option dataset, which the name of a run has in it")
        problems += [f"its preset {preset} has an option {option}, which its Config does not have"
                     for preset, values in kind.presets.items() for option in values if option not in known]
    if problems:
        raise UserError(*(f"stage {kind.__name__}: {problem}" for problem in problems))


@functools.cache
def module_from(path: Path) -> ModuleType:
    """The module in a file outside the package, loaded once. It may import what lies beside it. Raises UserError where
    that fails, with the line."""
    module = ModuleType(f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that it hides nothing
    try:
        exec(compile(files.read(path, most=LONGEST), path, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        del sys.modules[module.__name__]
        if isinstance(error, OSError) and error.filename == str(path):
            raise UserError(f"{path}: {files.reason(error)}") from error
        raise UserError(f"{path} cannot be loaded: {_where(error, path)}{type(error).__name__}: {error}") from error
    return module


def _where(error: BaseException, path: Path) -> str:
    """The last line of a file that an error came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"line {lines[-1]}: " if lines else ""
