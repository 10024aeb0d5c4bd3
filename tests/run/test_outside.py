"""A stage and a callback of the user's own, those of docs/extend.md: started, listed, stopped, evaluated, resumed."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from desk import ENDLESS, ROOT, Desk, living, until

PAGE = (ROOT / "docs/extend.md").read_text()


@pytest.fixture(scope="module")
def own(desk: Desk) -> Path:
    """A folder with the files of docs/extend.md."""
    folder = desk.folder / "own"
    folder.mkdir()
    for name, code in re.findall(r"`(my_\w+\.py)`[^`]*```python\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(code)
    series = [math.sin(i / 7) + 0.5 * math.sin(i / 3) for i in range(600)]
    (folder / "series.txt").write_text("\n".join(f"{value:.6f}" for value in series) + "\n")
    return folder


def test_the_page_has_short_examples(own: Path) -> None:
    lines = {path.name: len([line for line in path.read_text().splitlines() if line.strip()])
             for path in own.glob("my_*.py")}
    assert lines.keys() == {"my_callbacks.py", "my_stage.py", "my_terms.py"} and max(lines.values()) < 60
    assert f"These are {lines['my_stage.py']} lines, without the empty ones." in PAGE


def start(desk: Desk, own: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return desk.call("start.sh", "my_stage.py", "--dataset", "series.txt", "--result_dir", str(desk.results),
                     "--threads", "1", "--no_compile", *argv, cwd=own)


def script(desk: Desk, run: str) -> str:
    return str(json.loads((desk.results / run / "status.json").read_text())["script"])


def test_a_run_of_a_stage_from_outside_lives_like_any_other(desk: Desk, own: Path) -> None:
    """Its script finds its files beside it, since it is started in their folder; later commands come from elsewhere."""
    ran = start(desk, own, *ENDLESS, "--run_name", "mine", "--callback",
                "my_callbacks.py:FreezeUntil:step=20,word=free")
    pid = desk.begun(ran)
    assert re.search("Callbacks, in order: Begin, .*FreezeUntil, ", ran.stdout)
    until(lambda: desk.run("mine")["step"] > 20)
    row = desk.run("mine")
    assert row["state"] in ("training", "evaluating") and row["pid"] == pid
    assert script(desk, "mine") == str(own / "my_stage.py")
    until(lambda: "free\n" in desk.call("logs.sh", "mine").stdout)  # the log line comes after the step
    assert desk.call("stop.sh", "mine", cwd=Path("/")).returncode == 0 and not living(pid)
    step = desk.run("mine")["step"]
    evaluated = desk.call("evaluate.sh", "mine", cwd=Path("/"))
    rows = r"\(59 samples; all rows of the validation split of .*series.txt\)"
    assert re.fullmatch(rf"Validation: loss=[\d.]+ mae=[\d.]+ {rows}\n", evaluated.stdout), evaluated
    again = desk.call("resume.sh", "mine", "--yes", cwd=Path("/"))
    desk.begun(again)
    assert f"step {step}\n" in again.stdout and "same configuration, data, code" in again.stdout
    assert desk.call("stop.sh", "mine").returncode == 0


@pytest.mark.parametrize("argv, why", [
    (["--callback", "my_callbacks.py:Freeze"], "there is no class 'Freeze' in it; callbacks there: FreezeUntil"),
    (["--callback", "my_callbacks.py:FreezeUntil"], "missing a required argument: 'step'"),
    (["--lrr", "1"], "there is no flag --lrr; did you mean --lr?"),
])
def test_mistakes_end_in_one_line_and_nothing_is_started(desk: Desk, own: Path, argv: list[str], why: str) -> None:
    ran = start(desk, own, *argv, "--run_name", "wrong")
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("start.sh: ") and why in ran.stderr and not (desk.results / "wrong").exists()


def test_it_explains_itself(desk: Desk, own: Path) -> None:
    assert desk.call("start.sh", "my_stage.py", "--explain", cwd=own).stdout == (
        "Learns to continue a series of numbers.\n")
    page = desk.call("start.sh", "my_stage.py", "--help", cwd=own).stdout
    assert "Series:\n  --dataset TEXT" in page and "--snapshot_interval N" in page
    assert "./run/start.sh SCRIPT [OPTIONS]" in desk.call("start.sh", "--help").stdout
    missing = desk.call("start.sh", "gone.py")
    assert missing.returncode == 2 and missing.stderr == "start.sh: gone.py: there is no such script\n"


def test_info_measures_its_model(desk: Desk, own: Path) -> None:
    page = desk.call("start.sh", "my_stage.py", "--info", "--threads", "1", "--no_compile", cwd=own).stdout
    assert page.startswith("Learns to continue") and f"parameters       {16 * 32 + 32 + 32 + 1:,}\n" in page


def test_a_script_in_the_path_of_the_guide_works_from_any_folder(desk: Desk) -> None:
    """`export PYTHONPATH=.../src`, then `python .../src/training/train_lm.py`."""
    def python(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(ROOT / "src/training/train_lm.py"), *argv], cwd="/", text=True,
                              capture_output=True, env=desk.env | {"PYTHONPATH": str(ROOT / "src")}, timeout=120)

    assert "--gradient_monitor_interval" in python("--help").stdout
    ran = python("--dataset", str(desk.corpus), "--tokenizer", "bytes", "--model_preset", "nano", "--max_steps", "2",
                 "--batch_size", "2", "--max_seq_len", "16", "--threads", "1", "--no_compile", "--no_samples",
                 "--warmup_steps", "0", "--run_name", "guided", "--result_dir", str(desk.results))
    assert ran.returncode == 0, ran.stderr
    assert desk.run("guided")["state"] == "finished" and script(desk, "guided") == "train_lm.py"


def test_a_stage_may_import_what_lies_beside_it_and_what_pythonpath_names(desk: Desk, own: Path) -> None:
    elsewhere = desk.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.py").write_text("FAR = 'far'\n")
    (own / "near.py").write_text("NEAR = 'near'\n")
    (own / "importing.py").write_text("from far import FAR\nfrom near import NEAR\n" + (own / "my_stage.py").read_text(
        ).replace('"""Learns to continue a series of numbers."""', '__doc__ = f"{NEAR} and {FAR}"'))
    ran = subprocess.run([str(ROOT / "run/start.sh"), "importing.py", "--explain"], cwd=own, text=True,
                         capture_output=True, env=desk.env | {"PYTHONPATH": str(elsewhere)})
    assert ran.stdout == "near and far\n", ran.stderr
