"""A program of ours called in this process, which has torch already: a process of its own imports it for seconds."""

import io
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest

from stoker import command


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
