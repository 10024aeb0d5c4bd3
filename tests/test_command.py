"""The command `stoker`, in a checkout and where the package is installed without one; the wheel that installs it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from desk import ENDLESS, ROOT, TINY, Desk, living
from stoker import __main__ as stoker
from stoker import files
from stoker.config import UserError
from stoker.daemon.rundir import STAGES


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have taken the place of this process."""
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: seen.append([path, *argv[1:]]))
    return seen


@pytest.mark.parametrize("typed, script, rest", [
    ("ps --json", "ps", "--json"), ("stop lm", "stop", "lm"), ("data check x.csv", "data", "check x.csv"),
    ("generate lm Hello", "generate", "lm Hello"), ("replay lm", "replay", "lm"),
    ("lm --preset nano", "run_train_lm", "--preset nano"), ("audio_enc", "run_train_audio_enc", ""),
])
def test_in_a_checkout_it_is_a_script_of_run(typed: str, script: str, rest: str, executed: list[list[str]]) -> None:
    stoker._main(typed.split())
    assert executed == [[str(ROOT / f"run/{script}.sh"), *rest.split()]]


@pytest.mark.parametrize("before", [[], ["start"]])
def test_a_script_of_the_user_s_is_started_by_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[str],
                                                    executed: list[list[str]]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_stage.py").touch()
    stoker._main([*before, "my_stage.py", "--lr", "1"])
    assert executed == [[str(ROOT / "run/start.sh"), str(tmp_path / "my_stage.py"), "--lr", "1"]]


def test_a_stage_that_has_no_script_in_run_is_started_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          executed: list[list[str]]) -> None:
    """A file dropped into src/training needs nothing else."""
    (tmp_path / "train_new.py").touch()
    (tmp_path / "helper_new.py").touch()
    monkeypatch.setattr(stoker, "STAGES", tmp_path)
    stoker._main(["new"])
    assert executed == [[str(ROOT / "run/start.sh"), str(tmp_path / "train_new.py")]]


def test_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert stoker._main([]) == 0
    page = capsys.readouterr().out
    assert all(path.stem.removeprefix("train_") in page for path in STAGES.glob("train_*.py"))
    scripts = {path.stem for path in (ROOT / "run").glob("*.sh")} - {"lib", "test", "start"}
    assert all(re.search(rf"\b{name}\b", page) for name in scripts if not name.startswith("run_train_"))
    with pytest.raises(UserError, match="'nonsense' is neither a command, nor a stage .*lm.*, nor a script"):
        stoker._main(["nonsense"])


@pytest.mark.parametrize("command, in_checkout, without", [
    ("ps", "./run/ps.sh", "stoker ps"), ("logs lm -f", "./run/logs.sh lm -f", "stoker logs lm -f")])
def test_a_hint_is_what_can_be_typed(command: str, in_checkout: str, without: str,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.hint(command) == in_checkout
    monkeypatch.setattr(files, "CHECKOUT", None)
    assert files.hint(command) == without


# -- without a checkout ---------------------------------------------------------------------------------------------


class Installed(Desk):
    """The package alone, in a folder that PYTHONPATH names; `call` calls `stoker`, in the folder of the desk."""

    @property
    def env(self) -> dict[str, str]:
        ours = {"STOKER_RESULTS", "PYTHONPATH"}
        return {name: value for name, value in super().env.items() if name not in ours} | {
            "PYTHONPATH": str(self.folder / "site")}

    def call(self, script: str, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-P", "-m", "stoker", script.removesuffix(".sh"), *argv], text=True,
                              cwd=cwd or self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    desk = Installed(tmp_path_factory.mktemp("installed"))
    shutil.copytree(ROOT / "src", desk.folder / "site/stoker", ignore=shutil.ignore_patterns("__pycache__"))
    yield desk
    for pid in desk.started:
        if living(pid) and str(desk.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def test_a_run_lives_without_the_scripts_of_run(installed: Installed) -> None:
    """Started in the background, listed, followed, stopped, evaluated, resumed, deleted; in result/ of this folder."""
    ran = installed.call("lm", "--dataset", str(installed.corpus), *TINY, *ENDLESS, "--run_name", "mine")
    pid = installed.begun(ran)
    assert os.getsid(pid) == pid and os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert (installed.folder / "result/mine/status.json").is_file()
    for line in ("Follow  stoker logs mine -f", "Check   stoker ps", "Stop    stoker stop mine"):
        assert line in ran.stdout
    assert re.search(rf"^mine +training +{pid} ", installed.call("ps").stdout, re.MULTILINE)
    command = [sys.executable, "-P", "-m", "stoker", "logs", "mine", "-f"]
    with subprocess.Popen(command, cwd=installed.folder, env=installed.env, stdout=subprocess.PIPE, text=True) as log:
        assert log.stdout and log.stdout.readline()
        assert "SIGTERM received\nResume: stoker resume mine\n" in installed.call("stop", "mine").stdout
        assert "Training stopped" in log.communicate(timeout=30)[0], "it ends with the run"
    assert not living(pid)
    evaluated = installed.call("evaluate", "mine")
    assert evaluated.returncode == 0 and evaluated.stdout.startswith("Validation: loss="), evaluated
    unsure = installed.call("resume", "mine")
    assert unsure.returncode == 2 and "add --yes" in unsure.stderr
    installed.begun(installed.call("resume", "mine", "--yes"))
    assert "Resuming from" in installed.call("logs", "mine").stdout
    assert installed.call("stop", "mine").returncode == 0
    assert installed.call("delete", "mine", "--yes").returncode == 0 and "mine" not in installed.call("ps").stdout


def test_mistakes_without_a_checkout(installed: Installed) -> None:
    for argv, why in ((["lm", "--lrr", "1"], "stoker lm: there is no flag --lrr; did you mean --lr?\n"),
                      (["logs", "gone"], "stoker logs: there is no run 'gone'; stoker ps lists the 0 there are, and "),
                      (["resume"], "stoker resume: which run? "),
                      (["generate", "gone", "x"], "stoker generate: there is no run 'gone'")):
        ran = installed.call(*argv)
        assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.startswith(why), ran
        assert ran.stderr.count("\n") == 1
    assert not (installed.folder / "result").exists() or not list((installed.folder / "result").iterdir())


def test_a_run_that_is_refused_late_is_reported_here(installed: Installed) -> None:
    """After the check: what the trainer printed on standard error, and its exit code."""
    ran = installed.call("lm", "--dataset", str(installed.corpus), *TINY, "--device", "cuda:99", "--run_name", "late")
    assert ran.returncode == 2 and "cuda:99" in ran.stderr and not (installed.folder / "result/late").exists()


# -- the wheel ------------------------------------------------------------------------------------------------------


def listed() -> list[str]:
    ran = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                         capture_output=True, text=True)
    return [name for name in ran.stdout.split("\0") if name]


@pytest.mark.slow
def test_the_wheel_holds_the_package_once_and_works(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in listed():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q",
                    "-w", tmp_path, source], check=True, capture_output=True, cwd=tmp_path)
    wheel, = tmp_path.glob("stoker-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = [name for name in archive.namelist() if ".dist-info/" not in name]
        code = {name for name in held if name.endswith(".py")}
        archive.extractall(tmp_path / "site")
    assert len(held) == len(set(held)) and all(name.startswith("stoker/") for name in held)
    assert code == {name.replace("src/", "stoker/", 1) for name in listed() if re.fullmatch(r"src/.*\.py", name)}
    pages = {name.replace("docs/", "stoker/docs/", 1) for name in listed() if re.fullmatch(r"docs/.*\.md", name)}
    assert set(held) - code == pages | {f"stoker/data/pictures/digits.{kind}" for kind in ("csv.gz", "LICENSE")}
    env = {name: value for name, value in os.environ.items() if name != "STOKER_RESULTS"} | {
        "PYTHONPATH": str(tmp_path / "site")}

    def call(*argv: str) -> str:
        return subprocess.run([sys.executable, "-P", "-m", "stoker", *argv], cwd=tmp_path, env=env, text=True,
                              capture_output=True, check=True).stdout

    assert "--gradient_monitor_interval" in call("lm", "--help") and call("ps").startswith("RUN ")
    assert "run_train_lm.sh" in call("lm", "--explain"), "the pages are there"
    corpus = Desk(tmp_path).corpus
    call("lm", "--dataset", str(corpus), *TINY, "--max_steps", "2", "--foreground", "--run_name", "wheeled")
    assert (tmp_path / "result/wheeled/models/best/model.safetensors").is_file()
