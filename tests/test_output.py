"""The start and the end that all programs share."""

import gc
import os
import sys

import pytest

from stoker import command


def test_what_is_still_buffered_at_the_end_finds_no_room(monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Python itself would end with exit code 120 and two lines about an ignored exception."""
    with open(os.dup(os.open("/dev/full", os.O_WRONLY)), "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "argv", ["/x/program.py"])
        monkeypatch.delenv("STOKER_SCRIPT", raising=False)
        assert command.answered(lambda words: print("a line") or 0) == command.FAILED  # type: ignore[func-returns-value]
    said = "program.py: stopped, since nothing more can be written: No space left on device\n"
    assert capsys.readouterr().err == said


def collected(thing: object) -> bool:
    """Whether the garbage collector looks at it."""
    return any(found is thing for found in gc.get_objects())


def test_the_collector_passes_over_what_was_imported_and_all_that_is_there_at_the_end() -> None:
    early, late = [0], list[int]()
    with command.importing():
        assert not gc.isenabled()
    assert gc.isenabled() and not collected(early)
    later = [late]
    assert collected(later)
    assert command.answered(lambda words: 7) == 7 and not collected(later)
