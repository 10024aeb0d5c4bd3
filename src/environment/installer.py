"""uv, or pip where uv cannot be had: both install the same releases. What they print goes into a file, and is read for
progress.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from stoker.config import UserError
from stoker.daemon.rundir import PROJECT
from stoker.environment import pip_settings

UV = "uv >=0.9, <1"  # knows --torch-backend, and checks hashes where the lock has them
OLDEST_UV = (0, 9)
LOCK = PROJECT / "run/lock"
LOADED = ("import stoker.training.assembly.session, PIL.Image, rapidfuzz, soundfile, soxr, tiktoken, tokenizers; "
          "from stoker import wheels; wheels.torchaudio(); wheels.torchvision()")
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 60.0  # where there is no terminal; then twice as long, and so on
MEGABYTES = {"kB": 0.001, "MB": 1.0, "GB": 1000.0, "KiB": 2**10 / 1e6, "MiB": 2**20 / 1e6, "GiB": 2**30 / 1e6}
SIZE = re.compile(r"^ *Downloading (\S+) \(([\d.]+) ?([kMGi]+B)\)")  # uv and pip both write it like this


@dataclass
class Progress:
    """What an installer's lines say: packages in all and so far, megabytes to fetch and fetched."""

    packages: int = 0
    done: int = 0
    sizes: dict[str, float] = field(default_factory=dict)
    fetched: float = 0.0

    def read(self, line: str) -> None:
        if found := SIZE.match(line):
            self.sizes[found[1]] = float(found[2]) * MEGABYTES[found[3]]
        elif line.startswith(" Downloaded "):
            self.fetched += self.sizes.get(line.split()[1], 0.0)
        elif found := re.match(r"Resolved (\d+) package", line):
            self.packages = int(found[1])
        elif line.startswith("Collecting "):  # only pip: it fetches one after the other, and knows no total
            self.done += 1
            self.fetched = sum(self.sizes.values())
        elif line.startswith("Installing collected packages:"):
            self.packages = line.count(",") + 1

    def text(self) -> str:
        if self.done and not self.packages:
            return f"Fetching packages: {self.done}, {self.fetched:,.0f} MB"
        total = sum(self.sizes.values())
        count = f"{self.packages} packages" if self.packages else "packages"
        return f"Installing {count}" + (f", {total:,.0f} MB to fetch: {self.fetched:,.0f} MB" if total else "")


class Terminal(threading.Thread):
    """Shows `progress` on standard error while the block runs: one line in a terminal, else a line now and then."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.progress, self.over, self.started = Progress(), threading.Event(), time.monotonic()

    def __enter__(self) -> "Terminal":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def run(self) -> None:
        if not sys.stderr.isatty():
            pause = SECONDS_BETWEEN_LINES
            while not self.over.wait(pause):
                print(f"{self.progress.text()}, {self.seconds:.0f} s", file=sys.stderr, flush=True)
                pause *= 2
            return
        width = 0
        while not self.over.wait(SECONDS_BETWEEN_LOOKS):
            text = f"{self.progress.text()}, {self.seconds:.0f} s"
            print(f"\r{text:{width}}", end="", file=sys.stderr, flush=True)
            width = len(text)
        print(f"\r{'':{width}}\r", end="", file=sys.stderr, flush=True)  # the line is free for others


@dataclass
class Installer:
    """Fills the environment `venv`. `details` takes what the programs print."""

    venv: Path
    details: IO[str]
    terminal: Terminal
    uv: str = ""

    def __post_init__(self) -> None:
        try:
            self.options = pip_settings.read()
        except (OSError, configparser.Error) as error:
            raise UserError(f"pip's settings cannot be read: {' '.join(str(error).split())}; mend that file") from error

    @property
    def python(self) -> str:
        return str(self.venv / "bin/python")

    def make(self) -> None:
        """An environment with pip in it, where there is none. Raises UserError where Python cannot make one."""
        self.uv = next((path for path in (shutil.which("uv"), str(self.venv / "bin/uv")) if path and _is_new(path)), "")
        if not Path(self.python).exists():
            if not self._run([system_python(), "-m", "venv", str(self.venv)]):
                raise UserError(f"{system_python()} cannot make a virtual environment; on Debian: apt install "
                                f"python3-venv; details: {self.details.name}")
        if "extra-index-url" in self.options:
            self.options.setdefault("index-url", self._default_index())
        if not self.uv and self._run([self.python, "-m", "pip", "install", "--retries", "1", UV]):
            self.uv = str(self.venv / "bin/uv")

    def _default_index(self) -> str:
        """The index that pip asks where none is configured, as its help names it."""
        page = subprocess.run([self.python, "-m", "pip", "install", "--help"], capture_output=True, text=True).stdout
        found = re.search(r"--index-url.*?\(default\s+(\S+?)\)", page, re.DOTALL)
        return found[1] if found else ""

    def locked(self, extra: str) -> bool:
        """Install the releases of run/lock/, then the project itself."""
        base = [LOCK / "base.txt", *([LOCK / f"{extra}.txt"] if extra else [])]
        project = ["--no-deps", "--no-build-isolation", "--editable", str(PROJECT)]
        if self.uv:
            return self._install_torch(*_each("-r", [LOCK / "torch.txt", *base])) and self._install(*project)
        # pip checks either all hashes of a call or none; without dependencies, what torch brings is left to torch
        return (self._install("--no-deps", "--require-hashes", *_each("-r", base))
                and self._install(*_each("-r", [LOCK / "torch.txt"])) and self._install(*project))

    def newest(self, extra: str) -> bool:
        """Install the newest releases that setup.cfg admits."""
        return self._install_torch("--upgrade", "--editable", str(PROJECT) + (f"[{extra}]" if extra else ""))

    def loads(self) -> bool:
        """Whether what a run imports can be loaded. This also writes its byte code: without it the first start of a run
        would take twice as long."""
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return self._run([self.python, "-P", "-c", LOADED], env | {"PYTHONPATH": str(PROJECT / "run/python")})

    def _install_torch(self, *words: str) -> bool:
        """Install packages with the build of torch for this machine's GPU, or for CPUs, unless the user has configured
        where packages come from."""
        chosen = "UV_TORCH_BACKEND" in os.environ or pip_settings.names_sources(self.options)
        if not self.uv or chosen:
            return self._install(*words)
        if self._install(*words, UV_TORCH_BACKEND="auto"):
            return True
        print("The builds of torch for CPUs or for one kind of GPU are not available here: installing the build of the "
              "package index, which is for CUDA", file=sys.stderr, flush=True)
        return self._install(*words)

    def _install(self, *words: str, **variables: str) -> bool:
        if not self.uv:
            return self._run([self.python, "-m", "pip", "install", "--no-compile", *words])
        command = [self.uv, "pip", "install", "--python", self.python]
        if pip_settings.no_index(self.options):
            command.append("--no-index")
        return self._run([*command, *words], os.environ | pip_settings.for_uv(self.options) | variables)

    def _run(self, command: Sequence[str], env: Mapping[str, str] = os.environ) -> bool:
        """Run a program and write what it prints to the file of details. Returns whether it succeeded."""
        print("$", *command, file=self.details, flush=True)
        self.terminal.progress = Progress()
        with subprocess.Popen(command, env={**env, "NO_COLOR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, text=True,
                              cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              errors="replace") as program:
            assert program.stdout
            for line in program.stdout:
                self.details.write(line)
                self.details.flush()
                self.terminal.progress.read(line)
        return program.returncode == 0


def _each(option: str, values: Sequence[object]) -> list[str]:
    return [word for value in values for word in (option, str(value))]


def _is_new(uv: str) -> bool:
    """Whether this is a uv that starts and is not too old."""
    try:
        answer = subprocess.run([uv, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False
    found = re.match(r"uv (\d+)\.(\d+)", answer)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_UV


def system_python() -> str:
    """The Python that this one's environment was made with: the environment may be the one to be made again."""
    found = Path(sys.base_prefix, f"bin/python{sys.version_info.major}.{sys.version_info.minor}")
    return str(found) if found.exists() else sys.executable


def reason(lines: Sequence[str]) -> str:
    """The line in which uv or pip says why it failed."""
    errors = [line.strip() for line in lines if re.match(r"\s*(ERROR|error|×|cause|Caused by|╰─▶|\w+Error)[: ]", line)]
    return re.sub(r"^(ERROR|error|×|cause|Caused by|╰─▶)[: ]*", "", errors[-1]) if errors else "it does not say why"
