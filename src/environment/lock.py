"""Write run/lock/ again from setup.cfg: .venv/bin/python -m stoker.environment.lock [--upgrade]

    torch.txt   written by hand: the releases of torch and of what is built for it. No hashes: each build (for CPUs,
                CUDA, ROCm) is another file with another hash, and a local version such as 2.13.0+cpu belongs to the
                same release. What torch itself brings (the libraries of CUDA) it names by exact version.
    base.txt    all other packages of a run, for every Python and machine of setup.cfg, with the hashes of their files
    dev.txt     what the extra `dev` needs beside them

Both uv and pip read these files. No index is named in them, so a mirror or a folder of wheels serves as well.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stoker.command import answered
from stoker.config import UserError
from stoker.daemon.rundir import PROJECT
from stoker.environment import folder
from stoker.environment.installer import LOCK

OF_TORCH = re.compile(r"(torch|torchaudio|torchvision|triton|(nvidia|cuda)-(?!ml-py)[\w-]+)==")


def main(words: Sequence[str]) -> int:
    if set(words) - {"--upgrade"}:
        raise UserError(f"{' '.join(words)}: the only option is --upgrade")
    base = _resolved([*words], LOCK / "base.txt")
    everything = _resolved([*words, "--extra", "dev", "--constraint", str(LOCK / "base.txt")], LOCK / "dev.txt")
    known = {_name(entry) for entry in base}
    _write(LOCK / "dev.txt", [entry for entry in everything if _name(entry) not in known])
    return 0


def _resolved(words: Sequence[str], path: Path) -> list[str]:
    """The entries that uv resolves, without those that belong to torch; written to `path`."""
    uv = folder.path() / "bin/uv"
    with tempfile.TemporaryDirectory() as aside:
        found = Path(aside, "found.txt")
        if path.exists() and "--upgrade" not in words:
            found.write_text(path.read_text())  # uv keeps the releases that it finds there
        subprocess.run([uv, "pip", "compile", PROJECT / "setup.cfg", "--universal", "--python-version", "3.11",
                        "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "--constraint",
                        LOCK / "torch.txt", "--output-file", found, *words], check=True)
        entries = re.findall(r"^\S.*(?:\n .*)*\n", found.read_text(), re.MULTILINE)
    entries = [entry for entry in entries if not OF_TORCH.match(entry)]
    _write(path, entries)
    return entries


def _write(path: Path, entries: Sequence[str]) -> None:
    path.write_text("# Written by: .venv/bin/python -m stoker.environment.lock\n" + "".join(entries))


def _name(entry: str) -> str:
    return entry.partition("==")[0]


if __name__ == "__main__":
    sys.exit(answered(main))
