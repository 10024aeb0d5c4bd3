"""Make the environment hold what the project needs: called by run/lib.sh.

    python -m stoker.environment STAMP [EXTRA]

STAMP is the file whose name says what the environment holds; it is written last. EXTRA is one of setup.cfg's.
`STOKER_VERSIONS=newest` takes the newest releases that setup.cfg admits instead of those in run/lock/.
"""

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stoker.command import answered
from stoker.config import UserError
from stoker.environment import folder
from stoker.environment.installer import Installer, Terminal, reason

DETAILS = "setup.log"


def main(words: Sequence[str]) -> int:
    stamp, extra = Path(words[0]), "".join(words[1:])
    venv = stamp.parent.resolve()
    with _alone(venv):
        if not (venv / stamp.name).exists():
            _set_up(venv, extra)
            for old in venv.glob(".ready-*"):  # of another setup.cfg or lock
                old.unlink()
            (venv / stamp.name.removesuffix(f"-{extra}")).touch()  # an extra brings all the rest with it
            (venv / stamp.name).touch()
    return 0


@contextmanager
def _alone(venv: Path) -> Iterator[None]:
    """One set-up of an environment at a time: another one waits. Raises UserError where there is no such folder."""
    try:
        parent = os.open(venv.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"the packages cannot be installed in {venv}: {venv.parent}: {error.strerror}; name another "
                        "folder in STOKER_VENV") from error
    try:
        try:
            fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another set-up of {venv}", file=sys.stderr, flush=True)
            fcntl.flock(parent, fcntl.LOCK_EX)
        yield
    finally:
        os.close(parent)


def _set_up(venv: Path, extra: str) -> None:
    """Install the packages. Raises UserError where that fails; the same command then tries again."""
    folder.prepare(venv)
    print(f"Setting up {venv}, once; details: {venv / DETAILS}", file=sys.stderr, flush=True)
    with open(venv / DETAILS, "w+", encoding="utf-8") as details, Terminal() as terminal:
        installer = Installer(venv, details, terminal)
        installer.make()
        (venv / folder.UNFINISHED).write_text(folder.fingerprint(venv))  # no packages yet, but usable
        newest = os.environ.get("STOKER_VERSIONS") == "newest"
        if not ((installer.newest(extra) if newest else installer.locked(extra)) and installer.loads()):
            details.seek(0)
            raise UserError(f"the set-up failed: {reason(details.readlines())}; details: {venv / DETAILS}; the same "
                            "command tries again")
    (venv / folder.UNFINISHED).unlink()
    print(f"Set up in {terminal.seconds:.0f} s by {'uv' if installer.uv else 'pip'}: "
          f"{folder.build_of_torch(venv)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(answered(main, "\nThe set-up was interrupted; the same command continues it"))
