"""A program of ours called in this process, which has torch already: a process of its own imports it for seconds."""

import io
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from stoker import command
from stoker.daemon.rundir import STAGES
from stoker.training.assembly import launch
from stoker.training.core.stage import discover


def answer(name: str, program: Callable[[Sequence[str]], int], *argv: str, stdin: bytes = b"",
           env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[bytes]:
    """Its exit code and what it prints. `name` is what the user has typed; `program` takes the words after it."""
    streams = [io.TextIOWrapper(io.BytesIO(content), write_through=True) for content in (stdin, b"", b"")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv])
        patch.setenv("STOKER_SCRIPT", name)  # as the script sets it; run/test.sh sets its own
        for variable, value in env.items():
            patch.setenv(variable, value)
        for standard, stream in zip(("stdin", "stdout", "stderr"), streams):
            patch.setattr(sys, standard, stream)
        code = command.answered(program)
    _, out, told = (stream.buffer.getvalue() for stream in streams)  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(sys.argv, code, out, told)


def trained(stage: str, *argv: str, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """A whole start of the stage's script, from its command line to its exit code, as if in a process of its own."""
    with pytest.MonkeyPatch.context() as patch, _log_of_its_own(), _standard_error() as file:
        patch.chdir(Path.cwd())  # it may go elsewhere
        patch.setattr(sys, "argv", [str(STAGES / f"train_{stage}.py"), *argv])
        patch.setenv("STOKER_SCRIPT", f"run_train_{stage}.sh")
        patch.setattr(launch, "_faults", lambda descriptor: nullcontext())  # pytest has its own
        for variable, value in env.items():
            patch.setenv(variable, value)
        code = command.answered(lambda words: launch._main(discover()[stage], [*words]))
        told = Path(file).read_text()
    return subprocess.CompletedProcess(argv, code, "", told)


@contextmanager
def _log_of_its_own() -> Iterator[None]:
    """No handler of the log outlives the block."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        logging.captureWarnings(False)


@contextmanager
def _standard_error() -> Iterator[str]:
    """The file that Python's standard error, and that of the process, are."""
    with tempfile.NamedTemporaryFile("w", buffering=1) as file, pytest.MonkeyPatch.context() as patch:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        patch.setattr(sys, "stderr", file)
        try:
            yield file.name
        finally:
            os.dup2(kept, 2)
            os.close(kept)
