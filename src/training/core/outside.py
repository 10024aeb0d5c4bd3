"""Stages and callbacks from files of the user's, outside the package."""

import functools
import hashlib
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

from stoker import files
from stoker.config import UserError
from stoker.daemon.rundir import RunDir
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
