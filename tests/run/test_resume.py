"""Resumes of runs that something has befallen: damage, code in a snapshot, other options, another text."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from desk import Desk
from stoker.training.core import manifest

NEWEST = "snapshots/snapshot_step_00000001"


@pytest.fixture(scope="module")
def stopped(desk: Desk) -> Path:
    """A run that was stopped after its first step, with snapshots of steps 0 and 1."""
    ran = desk.train_here("--run_name", "stopped", "--max_steps", "20", "--max_minutes", "0.00001")
    assert ran.returncode == 0, ran.stderr
    return desk.results / "stopped"


@pytest.fixture
def run(desk: Desk, stopped: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(stopped, desk.results / f"copy{abs(hash(request.node.name))}", symlinks=True))


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.target}'",)


def everything(run: Path) -> dict[str, bytes]:
    """What the files of a run hold, but the lock and the clocks of the status."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del found["run.lock"]
    status = json.loads(found["status.json"]) | {"heartbeat": 0, "awake": 0}
    return found | {"status.json": json.dumps(status).encode()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forge(folder: Path, file: str) -> None:
    """Put code into a file, and its checksum into the manifest."""
    content = pickle.dumps(Payload(folder / "ran"), protocol=2)
    (folder / file).write_bytes(content)
    known = manifest.read(folder)
    known["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write(folder, known["step"], known["files"], known["made_by"])


def edit(run: Path) -> None:
    path = run / "run_config.json"
    path.write_text(path.read_text().replace('"d_model": 16', '"d_model": 32'))


def test_a_damaged_snapshot_is_named_and_the_run_goes_on(desk: Desk, run: Path) -> None:
    (run / NEWEST / "state.pt").unlink()
    os.mkfifo(run / NEWEST / "state.pt")
    ran = desk.start_here("--resume", str(run), "--max_minutes", "0")
    assert ran.returncode == 0, ran.stderr
    assert "snapshot_step_00000001 is damaged and not used: state.pt is something else than a file" in ran.stderr
    assert "step 1 came out as recorded before: bit for bit" in ran.stderr
    assert (run / "snapshots" / "damaged_snapshot_step_00000001").is_dir()


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (lambda run: [flip(path) for path in run.glob("snapshots/*/model.safetensors")],
                "none of the 2 snapshots"),
    "code": (lambda run: forge(run / NEWEST, "state.pt"), "it was not run"),
    "shape": (edit, "made with (d_model 16 -> 32)"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_go_on_is_refused_and_left_as_it_is(desk: Desk, run: Path, what: str) -> None:
    befall, why = REFUSALS[what]
    befall(run)
    before = everything(run)
    ran = desk.start_here("--resume", str(run))
    told = [line for line in ran.stderr.splitlines() if not line.startswith("[")]
    assert ran.returncode == 2 and len(told) == 1 and why in told[0], ran.stderr
    assert "Traceback" not in ran.stderr and everything(run) == before and not list(run.rglob("ran"))


def test_an_older_snapshot_is_continued_in_a_folder_of_its_own(desk: Desk, run: Path) -> None:
    """All options are those of its run; what is refused leaves no folder; the run stays as it is, to the byte."""
    before, older = everything(run), run / "snapshots" / "snapshot_step_0.pt"
    config = json.loads((run / "run_config.json").read_text())
    ran = desk.start_here("--checkpoint_file", str(older), "--max_minutes", "0")
    assert ran.returncode == 0 and "This run continues from" in ran.stderr, ran.stderr
    new = run.with_name(f"{run.name}_from_step_00000000")
    status, written = (json.loads((new / name).read_text()) for name in ("status.json", "run_config.json"))
    assert (status["state"], status["step"]) == ("finished", 20) and status["origin"] == str(older.with_name(
        "snapshot_step_00000000"))
    assert {name for name in config if config[name] != written[name]} <= {"max_minutes", "run_name", "result_dir"}
    ps = desk.run(new.name)
    assert ps["state"] == "finished" and everything(run) == before

    edit(run)
    ran = desk.start_here("--checkpoint_file", str(older), "--run_name", "no")
    assert ran.returncode == 2 and "made with (d_model 16 -> 32)" in ran.stderr, ran.stderr
    assert not (desk.results / "no").exists()


@pytest.mark.slow
def test_code_in_weights_is_run_by_no_script(desk: Desk, run: Path) -> None:
    forge(run / NEWEST, "model.safetensors")
    for script, *argv in (["generate.sh", str(run / NEWEST), "abc"], ["evaluate.sh", str(run)],
                          ["run_train_lm.sh", "--init_from", str(run), "--dataset", str(desk.corpus), "--result_dir",
                           str(desk.results), "--run_name", "begun", "--max_steps", "2", "--foreground"]):
        ran = desk.call(script, *argv)
        assert ran.returncode == 2 and "model.safetensors holds no weights" in ran.stderr, ran.stderr
        assert "Traceback" not in ran.stderr
    assert not list(run.rglob("ran")) and not (desk.results / "begun").exists()
