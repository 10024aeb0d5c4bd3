"""A user's mistake: exit code 2, the reason in a line, nothing left behind; and what needs no set-up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from desk import ROOT, Desk
from stoker.daemon import rundir
from stoker.daemon.rundir import Status


@pytest.fixture(scope="module")
def texts(desk: Desk) -> Desk:
    """With texts that are none."""
    (desk.folder / "empty.txt").touch()
    (desk.folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (desk.folder / "short.txt").write_text("Too short to learn from.\n\nAnd to judge by.\n")
    (desk.folder / "file").touch()
    return desk


def refused(desk: Desk, *argv: str) -> list[str]:
    ran = desk.train("--max_steps", "5", *argv)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert not desk.results.exists() or os.listdir(desk.results) == [], "no run is left"
    assert not list(desk.folder.glob("stoker.*")), "no temporary file is left"
    listed = desk.folder / "home" / "runs"
    assert not listed.exists() or os.listdir(listed) == [], "none is listed"
    return ran.stderr.splitlines()


@pytest.mark.parametrize("argv, parts", [
    (["--batch_sise", "8"], ["no flag --batch_sise", "--batch_size?"]),
    (["--epochs", "many"], ["--epochs: 'many' is not a whole number"]),
    (["--dropout", "0.95"], ["--dropout must be at least 0 and at most 0.9, is 0.95"]),
    (["--num_heads", "3"], ["--num_heads 3 does not divide --d_model 16"]),
    (["--preset", "smal"], ["'smal' is none of nano", "did you mean small?"]),
    (["--dataset", "nowhere.txt"], ["nowhere.txt", "no such file"]),
    (["--dataset", "empty.txt"], ["empty.txt"]),
    (["--dataset", "binary.txt"], ["binary.txt"]),
    (["--resume", "nothing"], ["no run 'nothing'"]),
    (["--resume"], ["no unfinished run of lm"]),
    (["--config", "nowhere.json"], ["nowhere.json", "No such file"]),
    (["--result_dir", "/proc/result"], ["--result_dir /proc/result", "No such file or directory"]),
    (["--result_dir", "file"], ["--result_dir", "/file: no run can be written there"]),
    (["--result_dir", "file/inside"], ["--result_dir", "Not a directory"]),
    (["--dataset", "short.txt"], ["text"]),
    (["--checkpoint_file", "nowhere.pt"], ["--checkpoint_file", "nowhere.pt: no snapshot there"]),
])
def test_a_mistake_is_one_line_and_leaves_nothing(texts: Desk, argv: list[str], parts: list[str]) -> None:
    lines = refused(texts, *argv)
    assert len(lines) == 1 and lines[0].startswith("run_train_lm.sh: "), lines
    assert all(part in lines[0] for part in parts), lines


def test_all_mistakes_are_reported_at_once(texts: Desk) -> None:
    assert len(refused(texts, "--batch_sise", "8", "--epochs", "many", "--dropout", "2", "--preset", "smal")) == 4


@pytest.mark.parametrize("script, argv, part", [
    ("ps.sh", ["nothing"], "no run 'nothing'"), ("ps.sh", ["--jsno"], "--jsno"), ("logs.sh", ["nothing"], "no run"),
    ("logs.sh", [], "which run?"), ("logs.sh", ["-x"], "-x"), ("stop.sh", ["nothing"], "no run 'nothing'"),
    ("stop.sh", ["1"], "process 1 trains no run"), ("resume.sh", ["nothing", "--yes"], "no run 'nothing'"),
    ("board.sh", ["nothing"], "no run 'nothing'"), ("stop.sh", [], "which run?"), ("delete.sh", [], "which run?"),
    ("resume.sh", [], "which run?"), ("evaluate.sh", [], "which run?"), ("generate.sh", [], "which run?"),
    ("read.sh", [], "which picture?"), ("data.sh", [], "which of check"),
])
def test_asked_for_what_is_not_there(desk: Desk, script: str, argv: list[str], part: str) -> None:
    ran = desk.call(script, *argv)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"{script}: ") and ran.stderr.count("\n") == 1 and part in ran.stderr, ran.stderr


def test_a_log_is_shown_without_control_characters(desk: Desk) -> None:
    run = rundir.create(desk.folder / "elsewhere", "run", Status("lm", "train_lm.py", "corpus", ""))
    run.new_log().write_bytes(b"a\x1b[2Jb\x00\tc \xc2\x9b \xc3\xbc\rd\n")
    for argv in ([], ["-f"]):
        assert desk.call("logs.sh", str(run.path), *argv).stdout == "a?[2Jb?\tc ? ü\nd\n"
    run.latest_log.unlink()
    os.mkfifo(run.latest_log)
    ran = desk.call("logs.sh", str(run.path))
    assert ran.returncode == 2 and ran.stderr.startswith("logs.sh: ") and "has no log yet" in ran.stderr


@pytest.fixture(scope="module")
def fresh(desk: Desk) -> Path:
    """The project as it is cloned: nothing set up."""
    clone: Path = desk.folder / "clone"
    clone.mkdir()
    for folder in ("run", "src"):
        shutil.copytree(ROOT / folder, clone / folder, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return clone


def call(desk: Desk, clone: Path, script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(clone / "run" / script), *argv], env=desk.env, cwd="/", text=True, capture_output=True,
                          stdin=subprocess.DEVNULL)


SCRIPTS = sorted(path.name for path in (ROOT / "run").glob("*.sh") if path.name != "lib.sh")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_script_s_header_and_sets_nothing_up(desk: Desk, fresh: Path, script: str, flag: str) -> None:
    header = []
    for line in (ROOT / "run" / script).read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").removeprefix(" "))
    ran = call(desk, fresh, script, flag)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == header and f"./run/{script}" in ran.stdout
    assert not (fresh / ".venv").exists()


def test_a_mistake_is_reported_before_anything_is_set_up(desk: Desk, fresh: Path) -> None:
    ran = call(desk, fresh, "run_train_lm.sh", "--dataset", str(desk.corpus), "--batch_sise", "8")
    assert ran.returncode == 2 and "--batch_size?" in ran.stderr
    assert call(desk, fresh, "ps.sh").stdout.startswith("RUN ")
    assert not (fresh / ".venv").exists()


def test_closed_standard_streams_are_not_taken_for_files(desk: Desk) -> None:
    """Where they are closed Python has none at all, and what is printed fails."""
    script = (". ./run/lib.sh; python=\"$(any_python)\"; "
              "\"${python}\" -c 'import sys; sys.exit(None in (sys.stdin, sys.stdout, sys.stderr))'")
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        ran = subprocess.run(["bash", "-c", f"bash -c '{script.replace(chr(39), chr(39) + chr(92) + 2 * chr(39))}' "
                              + closed], cwd=ROOT, env=desk.env, capture_output=True, text=True)
        assert ran.returncode == 0, (closed, ran.stderr)


@pytest.mark.parametrize("script, argv", [
    ("ps.sh", []), ("data.sh", ["check", "digits"]), ("run_train_lm.sh", ["--print_config"]),
])
def test_output_that_finds_no_room_is_one_line(desk: Desk, script: str, argv: list[str]) -> None:
    """A device that is full, in place of a file on a disk that is."""
    with open("/dev/full", "w") as full:
        ran = subprocess.run([str(ROOT / "run" / script), *argv], cwd=desk.folder, env=desk.env, stdout=full,
                             stderr=subprocess.PIPE, text=True)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr
    assert last == f"{script}: stopped, since nothing more can be written: No space left on device"


@pytest.mark.parametrize("python, found", [
    (None, "none"), ("echo 'Python 3.9.1'; [ $1 = --version ]", "Python 3.9.1"),
    ("echo 'pyenv: python3: command not found' >&2; exit 127", "pyenv: python3: command not found"),
])
def test_without_a_python_that_fits_nothing_starts(desk: Desk, fresh: Path, tmp_path: Path, python: str | None,
                                                   found: str) -> None:
    for name in ("bash", "uname", "dirname", "readlink", "sed", "head", "cat", "sha256sum", "cut"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    if python:
        (tmp_path / "python3").write_text(f"#!{shutil.which('bash')}\n{python}\n")
        (tmp_path / "python3").chmod(0o755)
    for script, argv in (("ps.sh", []), ("run_train_lm.sh", ["--preset", "nano"]), ("data.sh", ["check", "x"])):
        ran = subprocess.run([str(fresh / "run" / script), *argv], env={**desk.env, "PATH": str(tmp_path)}, text=True,
                             capture_output=True, stdin=subprocess.DEVNULL)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == (f"{script}: needs Python 3.11 to 3.14, as python3 or python3.14 and so on; found: "
                              f"{found}\n")


@pytest.mark.parametrize("variables, part", [
    ({"STOKER_VENV": "/proc/nothing/.venv"}, "/proc/nothing: No such file or directory"),
    ({"STOKER_VENV": "/proc/.venv"}, "in /proc/.venv: "),
    ({"STOKER_VERSIONS": "old"}, "must be locked or newest, is old"),
])
def test_a_set_up_that_cannot_be_is_one_line(desk: Desk, variables: dict[str, str], part: str) -> None:
    ran = subprocess.run(["bash", "-c", ". ./run/lib.sh && setup"], cwd=ROOT, env=desk.env | variables, text=True,
                         capture_output=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and part in ran.stderr, ran.stderr


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose Python only says how it was called."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n")
    (tmp_path / "venv/bin/python").chmod(0o755)
    (tmp_path / "venv/lib/python3.11/site-packages/torch").mkdir(parents=True)
    return tmp_path / "venv"


@pytest.mark.parametrize("argv", [["--preset", "nano"], ["--info"], ["--eval_only", "--init_from", "gone"]])
def test_a_python_without_torch_restarts_in_venv(desk: Desk, venv: Path, argv: list[str]) -> None:
    """As the guides type it: python src/training/train_lm.py ..."""
    words = ["-S", str(ROOT / "src/training/train_lm.py"), "--dataset", str(desk.corpus), *argv]
    ran = subprocess.run([sys.executable, *words], env={**desk.env, "STOKER_VENV": str(venv)}, text=True,
                         capture_output=True, stdin=subprocess.DEVNULL)
    if "gone" in argv:
        assert ran.returncode == 2 and "gone" in ran.stderr, "mistakes come first"
        return
    assert (ran.returncode, ran.stdout.splitlines()) == (7, words), ran.stderr
    assert ran.stderr == (f"torch is not installed for this Python ({sys.executable}): continuing with "
                          f"{venv}/bin/python\n")


def test_without_torch_and_without_venv_it_says_what_to_do(desk: Desk, venv: Path) -> None:
    shutil.rmtree(venv / "lib")
    ran = subprocess.run([sys.executable, "-S", str(ROOT / "src/training/train_lm.py"), "--dataset", str(desk.corpus),
                          "--tokenizer", "bytes", "--result_dir", str(desk.results)], text=True,
                         env={**desk.env, "STOKER_VENV": str(venv)}, capture_output=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and f"{venv} is not set up" in ran.stderr
