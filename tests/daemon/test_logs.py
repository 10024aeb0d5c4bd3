"""Every line of a log bears its time; in the background nothing a process prints is lost."""

import re
import subprocess
import sys
from pathlib import Path

from stoker.daemon import logs

SOURCE = Path(logs.__file__).parents[2]
LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] (.*)")

SCRIPT = """
import logging, os, sys, warnings
from pathlib import Path
from stoker.daemon import logs
logs.to_console()
logging.info("before")
logs.to_file(Path(sys.argv[1]), background=sys.argv[2] == "background")
log = logging.getLogger("some.module")
log.info("one\\ntwo\\rthree")
log.info("")
log.warning("careful: %d", 3)
log.debug("too much")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
warnings.warn("old ways")
"""


def logged(path: Path, where: str, more: str = "") -> tuple[list[str], str]:
    """The log's lines without their times, and what came out on standard error."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT + more, str(path), where], check=True, capture_output=True,
                         text=True, env={"PYTHONPATH": str(SOURCE)})
    assert ran.stdout == ""
    matches = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    assert all(matches), path.read_text()
    return [match.group(1) for match in matches if match], ran.stderr


def test_every_line_has_its_time(tmp_path: Path) -> None:
    lines, console = logged(tmp_path / "log", "foreground")
    assert lines[:5] == ["one", "two", "three", "", "WARNING: careful: 3"]
    assert lines[5:7] == ["ERROR: it failed", "ERROR: Traceback (most recent call last):"]
    assert "ERROR: ZeroDivisionError: division by zero" in lines
    assert [line for line in lines if "UserWarning: old ways" in line]
    assert console.splitlines()[0].endswith("] before") and console.count("careful: 3") == 1


def test_no_line_is_a_command_to_a_terminal(tmp_path: Path) -> None:
    lines, console = logged(tmp_path / "log", "foreground",
                            'log.info("a\\x1b[2J\\tb\\u3000\\u202ec \\x9b \\udcff ü 本\\x00")')
    assert lines[-1] == "a\\x1b[2J\tb\u3000\\u202ec \\x9b \\udcff ü 本\\x00"
    assert console.rstrip("\n").endswith(lines[-1])


def test_in_the_background_everything_goes_to_the_log(tmp_path: Path) -> None:
    _, console = logged(tmp_path / "log", "background")
    assert len(console.splitlines()) == 1 and console.endswith("] before\n")


def test_what_a_library_prints_itself_is_kept_too(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT + 'os.write(1, b"from C"); os.write(2, b"fault")', tmp_path / "log",
                    "background"], check=True, capture_output=True, env={"PYTHONPATH": str(SOURCE)})
    assert (tmp_path / "log").read_text().endswith("from Cfault")
