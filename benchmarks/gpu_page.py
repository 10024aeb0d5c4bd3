"""A page of measurements: each section in a process of its own, with a time limit and its own line if it fails.

A section is a generator of lines. If it fails (by an exception, by an illegal access of the GPU, which no process
survives, or because it hangs), the lines that it has yielded are kept and the other sections are measured.
"""

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from failpoints import PR_SET_PDEATHSIG

from stoker import files
from stoker.training.core import device as devices

FORK = multiprocessing.get_context("fork")  # a new process would import torch again, for seconds
SLOWER = 10  # times as long a section may take on a CPU, which others may use too
NOT_ON_A_CPU = "not measured on a CPU"
POLL = 0.1  # seconds
CUDA_STARTED, TOO_LONG = 70, 71  # exit codes of a section: CUDA runs in the process that it was forked from; killed


class Failed(RuntimeError):
    """What was measured is not what it should be."""


@dataclass(frozen=True)
class Asked:
    """What the page is about; `folder` is shared by its sections and deleted afterwards."""

    device_name: str
    quick: bool
    folder: Path

    @cached_property
    def device(self) -> torch.device:
        """For sections only: the process that starts them must not start CUDA."""
        return devices.choose(self.device_name)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def presets(self) -> tuple[str, ...]:
        """The important one first, should there be no time for the others. A CPU only shows that the code works."""
        return ("medium", "small") if self.on_gpu else ("nano",)

    def options(self) -> dict[str, Any]:
        """The options with which a trainer of a text stage is measured."""
        if not self.on_gpu:
            return {"device": str(self.device), "threads": 1, "d_model": 32, "num_heads": 2, "num_layers": 2,
                    "d_ff": 64, "max_seq_len": 32, "batch_size": 4, "epochs": 100_000}
        gigabytes = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        fits = [size for size in (32, 16, 8, 4, 2) if size <= gigabytes / 2.5]  # the plain loop holds all logits
        return {"device": str(self.device), "threads": 0, "batch_size": (fits or [1])[0]}

    def kind(self, stage: type[Any]) -> type[Any]:
        """The stage; on a CPU, one with a vocabulary of 512 random tokens."""
        return stage if self.on_gpu else type(stage.__name__, (stage,), {"vocabulary": 512})

    def note(self, name: str, value: float) -> None:
        """Save a figure for the sections after this one."""
        (self.folder / f"{name}.json").write_text(json.dumps(value))

    def noted(self, name: str) -> float | None:
        """The figure that an earlier section saved; None where that section has failed."""
        path = self.folder / f"{name}.json"
        return float(json.loads(path.read_text())) if path.exists() else None


@dataclass(frozen=True)
class Section:
    """`seconds`: the time limit on a GPU."""

    title: str
    measure: Callable[[Asked], Iterator[str]]
    seconds: float

    def limit(self, asked: Asked) -> float:
        """Seconds."""
        return self.seconds * (SLOWER if asked.device_name == "cpu" else 1)


@dataclass(frozen=True)
class Page:
    """A file of Markdown; everything in it is printed too. Beside it, a log of what Stoker printed meanwhile."""

    path: Path

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def write(self, sections: Sequence[Section], asked: Asked, headline: str) -> list[str]:
        """Measure all sections; returns the titles of those that failed. The file is complete after each of them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        text, failed = f"# {headline}\n", list[str]()
        print(text, flush=True)
        for section in sections:
            began = time.monotonic()
            print(f"## {section.title}\n", flush=True)
            lines, problem = self._measured(section, asked)
            if problem:
                failed.append(section.title)
                lines.append(_shown(f"FAILED: {section.title}: {problem}; details in {self.log}"))
            lines.append(_shown(f"({time.monotonic() - began:.0f} s)\n"))
            text += "\n".join(["", f"## {section.title}", "", *lines])
            files.write(self.path, text)
        return failed

    def _measured(self, section: Section, asked: Asked) -> tuple[list[str], str]:
        """The lines of a section, and why it failed, if it did."""
        lines, code = self._run(section, asked, FORK)
        if code == CUDA_STARTED:
            lines, code = self._run(section, asked, multiprocessing.get_context("spawn"))
        reason = asked.folder / "reason"
        why = reason.read_text() if reason.exists() else f"the process ended with {code}"
        reason.unlink(missing_ok=True)
        return lines, {0: "", TOO_LONG: f"not done after {section.limit(asked):.0f} s"}.get(code, why)

    def _run(self, section: Section, asked: Asked, context: Any) -> tuple[list[str], int]:
        """Measure a section in a process of its own. Returns its lines, which are printed as they come, and its exit
        code."""
        output, lines, end = asked.folder / "lines", list[str](), time.monotonic() + section.limit(asked)
        output.write_text("")
        process = context.Process(target=_in_child, args=(section, asked, output, self.log))
        process.start()
        try:
            with open(output) as file:
                while process.is_alive() and time.monotonic() < end:
                    process.join(POLL)
                    lines += map(_shown, _whole_lines(file))
                in_time = not process.is_alive()
                process.kill()
                process.join()
                lines += map(_shown, file.read().splitlines())
        finally:
            _kill(process.pid)
        return lines, process.exitcode if in_time else TOO_LONG


def _shown(line: str) -> str:
    print(line, flush=True)
    return line


def _whole_lines(file: Any) -> Iterator[str]:
    """The lines written since the last call, without a last one that is not complete yet."""
    place = file.tell()
    while (line := file.readline()).endswith("\n"):
        yield line[:-1]
        place = file.tell()
    file.seek(place)


def _kill(group: int) -> None:
    """End a section's process and all that it started."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:  # all have ended; or it has not begun, and then it is no group yet
        pass


def _in_child(section: Section, asked: Asked, output: Path, log: Path) -> None:
    if asked.device_name != "cpu" and torch.cuda._is_in_bad_fork():
        sys.exit(CUDA_STARTED)
    os.setsid()  # a group that can be ended as a whole
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)  # what the product prints, and its progress bars
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.info("---- %s", section.title)
    if asked.device_name == "cpu":
        torch.set_num_threads(1)  # its models are too small for more
    try:
        with open(output, "a", buffering=1) as lines:
            for line in section.measure(asked):
                lines.write(f"{line}\n")
    except Exception as error:  # the other sections are measured all the same
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        first = next(iter(str(error).splitlines()), "")
        (asked.folder / "reason").write_text(first if isinstance(error, Failed) else f"{type(error).__name__}: {first}")
        raise SystemExit(1) from error
