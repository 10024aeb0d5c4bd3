"""The folder of the environment: where it is, whether it is whole, and how a script restarts in it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from stoker.config import UserError
from stoker.daemon.rundir import PROJECT

UNFINISHED = ".unfinished"  # there while packages are installed; holds the `fingerprint` from before


def path() -> Path:
    """`$STOKER_VENV`, or `.venv` in the project."""
    return Path(os.environ.get("STOKER_VENV") or PROJECT / ".venv")


def restart_inside() -> None:
    """Replace this process by the same program in the environment, if this Python has no torch. Returns if it has, if
    there is no environment with torch, or if this Python is already that of the environment."""
    python = path() / "bin/python"
    if importlib.util.find_spec("torch"):
        return
    if (packages(path()) or Path()).joinpath("torch").exists() and Path(sys.prefix).resolve() != path().resolve():
        print(f"torch is not installed for this Python ({sys.executable}): continuing with {python}", file=sys.stderr,
              flush=True)
        os.execv(python, [str(python), *sys.orig_argv[1:]])


def packages(venv: Path) -> Path | None:
    """Where its packages are; None where there is no environment yet."""
    return next(venv.glob("lib/python3.*/site-packages"), None)


def build_of_torch(venv: Path) -> str:
    """The release of torch there, and what it computes on, without importing it."""
    found = packages(venv)
    version = found / "torch/version.py" if found else None
    if version is None or not version.exists():
        return "no torch"
    said = dict(re.findall(r"^(\w+)(?:: [^=]+)? = '(.+)'", version.read_text(), re.MULTILINE))
    kinds = [f"{name} {said[key]}" for key, name in (("cuda", "CUDA"), ("hip", "ROCm")) if key in said]
    return f"torch {said.get('__version__', '')} for {kinds[0] if kinds else 'CPUs'}"


def fingerprint(venv: Path) -> str:
    """A text that changes as soon as a package is installed or removed."""
    found = packages(venv)
    return str(found.stat().st_mtime_ns) if found else "none"


def is_usable(venv: Path) -> bool:
    """Whether its Python starts, and no set-up was ended in the middle of installing."""
    unfinished = venv / UNFINISHED
    if unfinished.exists() and unfinished.read_text() != fingerprint(venv):
        return False
    try:
        return subprocess.run([venv / "bin/python", "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def prepare(venv: Path) -> None:
    """Keep a usable environment, or make an empty folder in place of an unusable one. Raises UserError if the folder
    cannot be written, or holds something else than an environment, which is left alone."""
    try:
        if venv.exists() and not is_usable(venv) and any(venv.iterdir()):
            if venv.parent != PROJECT and not any((venv / name).exists() for name in ("pyvenv.cfg", UNFINISHED)):
                raise UserError(f"{venv} is no Python environment: move it away, or name another folder in STOKER_VENV")
            shutil.rmtree(venv)
        venv.mkdir(parents=True, exist_ok=True)
        (venv / UNFINISHED).write_text(fingerprint(venv))
    except OSError as error:
        raise UserError(f"the packages cannot be installed in {venv}: {error.strerror}; make that folder writable, or "
                        "name another one in STOKER_VENV") from error
