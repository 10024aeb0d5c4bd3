"""A set-up, with programs that only write down how they were called in place of Python, pip and uv."""

import fcntl
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from stoker.config import UserError
from stoker.environment import __main__ as environment
from stoker.environment import folder, installer
from stoker.environment.installer import Progress, reason

# Makes an environment, or installs, as far as that shows; $STUB/fails names what is to fail.
PYTHON = """#!/bin/sh
echo "python $*" >>"$STUB/calls"
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
  *"install --help") echo "-i, --index-url <url>  Base URL (default"; echo "  https://index.example/simple). It" ;;
  *"install --retries 1 uv"*) [ ! -e "$STUB/no-uv" ] && cp "$STUB/uv" "${0%python}uv" ;;
  *"pip install"*) exec sh "$STUB/install" "$*" ;;
  *"stoker.training.assembly.session"*) [ ! -e "$STUB/broken" ] || { cat "$STUB/broken"; exit 1; } ;;
esac
"""
UV = """#!/bin/sh
[ "$1" = --version ] && echo "uv 0.13.9" && exit
echo "uv $* $(env | grep -E '^(UV_|SSL_)' | grep -v CACHE | sort | tr '\\n' ' ')" >>"$STUB/calls"
[ "$UV_TORCH_BACKEND" = auto ] && [ -e "$STUB/no-builds" ] && exit 2
exec sh "$STUB/install" "$*"
"""
INSTALL = """
if [ -e "$STUB/half" ]; then mkdir -p "$(dirname "$(find "$STUB/.venv" -name site-packages)")/site-packages/half"; fi
if [ -e "$STUB/fails" ]; then cat "$STUB/fails"; exit 1; fi
cd "$STUB"/.venv/lib/python3.11/site-packages && mkdir -p torch
printf "__version__ = '2.13.0+cpu'\\ncuda: Optional[str] = None\\n" >torch/version.py
"""


@dataclass(frozen=True)
class Machine:
    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    @property
    def packages(self) -> Path:
        return self.venv / "lib/python3.11/site-packages"

    def set_up(self, extra: str = "") -> int:
        name = ".ready-locked-0123456789abcdef"
        return environment.main([str(self.venv / (f"{name}-{extra}" if extra else name)), *([extra] if extra else [])])

    def calls(self) -> list[str]:
        """Since the last look."""
        path = self.folder / "calls"
        made = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [call.replace(f"{self.folder}/", "").replace(f"{folder.PROJECT}/", "") for call in made
                if not call.startswith(("python -c ", "python -P -c "))]

    def stamps(self) -> list[str]:
        return sorted(path.name for path in self.venv.glob(".ready-*"))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Without uv, and with nothing that pip is configured with."""
    for name, text in (("python", PYTHON), ("uv", UV), ("install", INSTALL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "STOKER_V", "SSL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("STUB", str(tmp_path))
    monkeypatch.setattr(installer, "system_python", lambda: str(tmp_path / "python"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    return Machine(tmp_path)


LOCKED = "-r run/lock/torch.txt -r run/lock/base.txt"
PROJECT = f"--no-deps --no-build-isolation --editable {folder.PROJECT}"
PIP = "python -m pip install --no-compile"


def test_uv_is_fetched_where_it_is_absent_and_installs(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.set_up() == 0
    made, fetched, packages, project = machine.calls()
    assert made == "python -m venv .venv" and fetched.startswith("python -m pip install --retries 1 uv >=")
    assert packages == (f"uv pip install --python .venv/bin/python {LOCKED} UV_INDEX_STRATEGY=unsafe-best-match "
                        "UV_TORCH_BACKEND=auto ")
    assert project.startswith(f"uv pip install --python .venv/bin/python {PROJECT} ")
    assert machine.stamps() == [".ready-locked-0123456789abcdef"] and not (machine.venv / ".unfinished").exists()
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"Setting up {machine.venv}, once; details: {machine.venv}/setup.log"
    assert last == "Set up in 0 s by uv: torch 2.13.0+cpu for CPUs"
    assert f"$ {machine.venv}/bin/uv pip install" in (machine.venv / "setup.log").read_text()


def test_a_uv_that_is_there_is_taken(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: str(machine.folder / name))
    assert machine.set_up("dev") == 0
    made, packages, _ = machine.calls()
    assert packages.startswith(f"uv pip install --python .venv/bin/python {LOCKED} -r run/lock/dev.txt ")
    assert machine.stamps() == [".ready-locked-0123456789abcdef", ".ready-locked-0123456789abcdef-dev"]
    assert machine.set_up() == machine.set_up("dev") == 0 and machine.calls() == []


@pytest.mark.parametrize("version", ["uv 0.4.30", "another program", ""])
def test_a_uv_that_is_too_old_is_not_taken(machine: Machine, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    old = machine.folder / "old/uv"
    old.parent.mkdir()
    old.write_text(f"#!/bin/sh\necho '{version}'\n")
    old.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(old))
    assert machine.set_up() == 0 and "pip install --retries 1 uv" in machine.calls()[1]


def test_pip_installs_the_same_where_uv_is_not_available(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """The hashes in a call of their own: pip checks those of all packages of a call, or none."""
    (machine.folder / "no-uv").touch()
    assert machine.set_up("dev") == 0
    assert machine.calls()[2:] == [
        f"{PIP} --no-deps --require-hashes -r run/lock/base.txt -r run/lock/dev.txt", f"{PIP} -r run/lock/torch.txt",
        f"{PIP} {PROJECT}"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("Set up in 0 s by pip: ")


def test_what_pip_is_configured_with_holds_for_uv(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then nobody else is asked for torch."""
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert machine.set_up() == 0
    assert machine.calls()[2] == (f"uv pip install --python .venv/bin/python --no-index {LOCKED} UV_FIND_LINKS=/wheels "
                                  "UV_INDEX_STRATEGY=unsafe-best-match ")


def test_the_index_comes_before_further_ones(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one release uv takes the file of the first that has it; a further one had soundfile without its library."""
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///more")
    assert machine.set_up() == 0
    assert ("UV_DEFAULT_INDEX=https://index.example/simple UV_INDEX=https://index.example/simple file:///more "
            in machine.calls()[3])


def test_a_build_of_torch_can_be_chosen(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_TORCH_BACKEND", "rocm7.2")
    assert machine.set_up() == 0 and "UV_TORCH_BACKEND=rocm7.2 " in machine.calls()[2]


def test_where_no_build_of_torch_is_available_the_index_serves(machine: Machine,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (machine.folder / "no-builds").touch()
    assert machine.set_up() == 0
    assert ["UV_TORCH_BACKEND=auto" in call for call in machine.calls()[2:]] == [True, False, False]
    assert "not available here: installing the build of the package index, which is for CUDA" in capsys.readouterr().err


def test_the_newest_are_those_that_setup_cfg_admits(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_VERSIONS", "newest")
    assert machine.set_up("dev") == 0
    [install] = machine.calls()[2:]
    assert f" --upgrade --editable {folder.PROJECT}[dev] " in install and "run/lock" not in install


def test_a_failure_is_one_line_and_the_same_command_tries_again(machine: Machine) -> None:
    (machine.folder / "fails").write_text("error: Failed to fetch: `x`\n  Caused by: the network is down\n")
    with pytest.raises(UserError) as told:
        machine.set_up()
    assert str(told.value) == (f"the set-up failed: the network is down; details: {machine.venv}/setup.log; the same "
                               "command tries again")
    assert machine.stamps() == [] and machine.calls()
    (machine.folder / "fails").unlink()
    assert machine.set_up() == 0
    assert [call.split()[:3] for call in machine.calls()] == [["uv", "pip", "install"]] * 2, "what is there is kept"


def test_a_half_set_up_is_made_again(machine: Machine) -> None:
    (machine.folder / "fails").touch()
    (machine.folder / "half").touch()
    with pytest.raises(UserError, match="it does not say why"):
        machine.set_up()
    assert (machine.packages / "half").exists()
    (machine.folder / "fails").unlink()
    (machine.folder / "half").unlink()
    machine.calls()
    assert machine.set_up() == 0
    assert machine.calls()[0] == "python -m venv .venv" and not (machine.packages / "half").exists()


def test_a_python_that_is_gone_is_made_again(machine: Machine) -> None:
    assert machine.set_up() == 0
    (machine.venv / "bin/python").unlink()
    (machine.venv / machine.stamps()[0]).rename(machine.venv / ".ready-locked-older")
    (machine.venv / "left").touch()
    machine.calls()
    assert machine.set_up() == 0 and "python -m venv .venv" in machine.calls() and not (machine.venv / "left").exists()


def test_what_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").touch()
    with pytest.raises(UserError, match=f"{machine.venv} is no Python environment: move it away, or name another"):
        machine.set_up()
    assert (machine.venv / "thesis.txt").exists() and machine.calls() == []


def test_where_nothing_can_be_written_is_said(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="Read-only file system; make that folder wri"):
        patch.setattr(Path, "mkdir", refuse)
        machine.set_up()
    (machine.folder / "file").touch()
    with pytest.raises(UserError, match="cannot be installed in .*file/venv: .*/file: Not a directory"):
        environment.main([str(machine.folder / "file/venv/.ready-locked-0")])


def test_a_second_set_up_waits_and_finds_the_work_done(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    first = os.open(machine.folder, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    second = threading.Thread(target=machine.set_up, daemon=True)
    second.start()
    while "Waiting for another set-up" not in capsys.readouterr().err:
        assert second.is_alive()
    machine.venv.mkdir()
    (machine.venv / ".ready-locked-0123456789abcdef").touch()
    os.close(first)
    second.join(30)
    assert machine.calls() == [] and not second.is_alive()


def test_what_cannot_be_loaded_is_no_success(machine: Machine) -> None:
    (machine.folder / "broken").write_text("Traceback (most recent call last):\nImportError: libgomp.so.1: not found\n")
    with pytest.raises(UserError, match="the set-up failed: ImportError: libgomp.so.1: not found; details: "):
        machine.set_up()
    assert machine.stamps() == []


def test_byte_code_is_written_for_what_a_run_imports(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (machine.folder / "python").write_text(PYTHON + 'env | grep -q PYTHONDONT || echo "writes $1" >>"$STUB/calls"\n')
    machine.set_up()
    assert [call for call in machine.calls() if call.startswith("writes")] == ["writes -P"]


def test_only_the_project_s_own_folder_needs_no_sign(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """.venv in the project is ours, also where a part of it was deleted."""
    monkeypatch.setattr(folder, "PROJECT", machine.folder)
    (machine.venv / "lib").mkdir(parents=True)
    assert machine.set_up() == 0 and not (machine.venv / "lib/left").exists()


def test_an_environment_is_not_made_by_its_own_python() -> None:
    """It would delete the Python that is to make it again."""
    made_by = Path(installer.system_python())
    assert made_by.exists() and not made_by.is_relative_to(sys.prefix) or sys.prefix == sys.base_prefix


# -- what the programs print ----------------------------------------------------------------------------------------


def shown(*lines: str) -> str:
    progress = Progress()
    for line in lines:
        progress.read(line + "\n")
    return progress.text()


def test_progress_of_uv() -> None:
    lines = ["Using Python 3.11.7 environment at: v1", "Resolved 40 packages in 629ms", "Downloading pillow (6.8MiB)",
             "Downloading torch (1.5GiB)", "Downloading xxhash (500.0KiB)", " Downloaded pillow"]
    assert shown(*lines[:1]) == "Installing packages" and shown(*lines[:2]) == "Installing 40 packages"
    assert shown(*lines) == "Installing 40 packages, 1,618 MB to fetch: 7 MB"


def test_progress_of_pip() -> None:
    lines = ["Collecting torch==2.13.0", "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (191.8 MB)",
             "Collecting numpy<3", "  Using cached numpy-2.4.6-cp311-linux_x86_64.whl (16.6 MB)", "Collecting idna"]
    assert shown(*lines[:2]) == "Fetching packages: 1, 0 MB" and shown(*lines) == "Fetching packages: 3, 192 MB"
    assert shown(*lines, "Installing collected packages: idna, numpy, torch").startswith("Installing 3 packages")


@pytest.mark.parametrize("lines, why", [
    ("Collecting a\nERROR: Could not find a version that satisfies the requirement a\nERROR: No matching distribution "
     "found for a==1\n", "No matching distribution found for a==1"),
    ("error: Failed to fetch: `https://x/`\n  Caused by: Could not connect\n  Caused by: dns error\n", "dns error"),
    ("  × No solution found when resolving dependencies:\n  ╰─▶ Because a was not found in the registry\n      and you "
     "require a\n", "Because a was not found in the registry"),
    ("error: No solution found when resolving dependencies\n  cause: Because a was not found and you require a==1, we "
     "can conclude\n", "Because a was not found and you require a==1, we can conclude"),
    ("Killed\n", "it does not say why"),
])
def test_the_reason_is_the_line_that_says_it(lines: str, why: str) -> None:
    assert reason(lines.splitlines(keepends=True)) == why


@pytest.mark.parametrize("text, build", [
    ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n",
     "torch 2.13.0+cpu for CPUs"),
    ("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "torch 2.13.0 for CUDA 13.0"),
    ("__version__ = '2.13.0+rocm7.2'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.2.1'\n",
     "torch 2.13.0+rocm7.2 for ROCm 7.2.1"),
])
def test_the_build_of_torch_is_named(tmp_path: Path, text: str, build: str) -> None:
    assert folder.build_of_torch(tmp_path) == "no torch"
    (tmp_path / "lib/python3.12/site-packages/torch").mkdir(parents=True)
    (tmp_path / "lib/python3.12/site-packages/torch/version.py").write_text(text)
    assert folder.build_of_torch(tmp_path) == build


def test_the_build_of_this_torch_is_named() -> None:
    import torch

    build = folder.build_of_torch(Path(sys.prefix))
    assert build.startswith(f"torch {torch.__version__} for ") and ("CUDA" in build) is bool(torch.version.cuda)
