"""What a finished run leaves to be looked at, with the scripts of run/ and real processes."""

from pathlib import Path

import pytest
from PIL import Image

from desk import Desk, until


@pytest.fixture(scope="module")
def finished(desk: Desk) -> str:
    """The log of a run that came to its end, its figures kept for Weights & Biases too."""
    desk.begun(desk.train("--max_steps", "30", "--eval_interval", "10", "--run_name", "seen", "--use_wandb"))
    until(lambda: (row := desk.run("seen"))["state"] == "finished" and row["pid"] is None)
    return (desk.results / "seen" / "logs" / "latest.log").read_text()


def test_it_came_to_its_end_and_is_not_resumed(desk: Desk, finished: str) -> None:
    row = desk.run("seen")
    assert (row["step"], row["of"]) == (30, 30)
    assert "Training completed" in finished and "Best model saved" in finished
    again = desk.call("resume.sh", "seen", "--yes")
    assert again.returncode == 2 and "run seen is finished" in again.stderr


def test_its_page_of_plots_is_drawn_by_itself(desk: Desk, finished: str) -> None:
    page = desk.results / "seen" / "plots.png"
    assert f"Plots: {page}\n" in finished
    with Image.open(page) as image:
        assert image.width == 1400


def test_the_page_is_drawn_when_asked_for(desk: Desk, finished: str) -> None:
    page = desk.results / "seen" / "plots.png"
    page.unlink()
    drawn = desk.call("board.sh", "seen", "--png", cwd=Path("/"))
    assert (drawn.returncode, drawn.stdout) == (0, f"{page}\n"), drawn.stderr
    page.unlink()
    assert f"{page}\n" in desk.call("board.sh", "--png").stdout and page.exists()


def test_its_samples_are_kept(desk: Desk, finished: str) -> None:
    assert [path.name for path in sorted((desk.results / "seen" / "samples").iterdir())] == [
        "step_00000010", "step_00000020", "step_00000030"]


def test_without_a_key_weights_and_biases_is_kept_on_disk_and_says_so(desk: Desk, finished: str) -> None:
    """And nothing that wandb prints stands in the log without a time."""
    told = next(line for line in finished.splitlines() if "Weights & Biases" in line)
    assert "kept on disk (there is no API key" in told and f"wandb sync {desk.results}/seen/wandb/" in told
    assert list((desk.results / "seen" / "wandb").glob("offline-run-*/*.wandb"))
    assert all(line.startswith("[20") for line in finished.splitlines())
