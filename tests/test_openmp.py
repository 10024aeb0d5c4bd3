"""How the threads of OpenMP wait: set before torch is loaded, by every program; what the user has set wins."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import command

SOURCE = Path(command.__file__).parent

LOAD = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import command
command.share_cores()
assert "torch" not in sys.modules
ctypes.CDLL(sys.argv[2])
"""


@pytest.mark.parametrize("own, spins, policy", [
    ({}, str(command.SPIN), "PASSIVE"),  # which libgomp prints where none is set
    ({"GOMP_SPINCOUNT": "77"}, "77", "PASSIVE"),
    ({"OMP_WAIT_POLICY": "active"}, "30000000000", "ACTIVE"),  # libgomp's own count
    ({"OMP_WAIT_POLICY": "passive"}, "0", "PASSIVE"),
])
def test_libgomp_sees_the_setting_and_that_of_the_user_wins(own: dict[str, str], spins: str, policy: str) -> None:
    """The library that torch brings with it prints what it has read."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    library = next(Path(spec.origin).parent.glob("lib/libgomp*"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ran = subprocess.run([sys.executable, "-c", LOAD, str(SOURCE), str(library)], check=True, capture_output=True,
                         text=True, env=clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | own)
    found = dict(line.strip().split(" = ") for line in ran.stderr.splitlines() if " = " in line)
    assert (found["GOMP_SPINCOUNT"], found["OMP_WAIT_POLICY"]) == (f"'{spins}'", f"'{policy}'")


PROGRAMS = [str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py")) if "__main__" in path.read_text()]
NOT_COMPUTING = ("daemon/__main__.py", "monitors/plots.py")  # they never import torch


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in NOT_COMPUTING])
def test_every_program_shares_the_cores(program: str, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Before it does anything else: here it finds a mistake."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a script puts src/ into it
    monkeypatch.setattr(sys, "argv", ["program", "--no_such_option"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SOURCE / program), run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err
    assert os.environ.get("GOMP_SPINCOUNT") == str(command.SPIN)


def test_the_programs_are_found() -> None:
    assert {"training/train_lm.py", "inference/generate.py", "data/__main__.py", *NOT_COMPUTING} <= {*PROGRAMS}
    assert not any("import torch" in (SOURCE / name).read_text() for name in NOT_COMPUTING)
