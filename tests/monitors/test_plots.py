"""The page of plots: what is drawn, of which runs, and what becomes of a run whose page cannot be drawn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.monitors import plots
from stoker.training.assembly import session as sessions
from stoker.training.core.stage import Stage
from toys import GAN, Buffers, StopAt, new_run, session, train, with_callbacks

DRAW = sessions._draw  # as long as no test runs


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """title -> the panel, of the page drawn last."""
    panels: dict[str, Axes] = {}
    draw = plots.Panel.draw

    def keep(panel: plots.Panel, ax: Axes) -> None:
        draw(panel, ax)
        panels[panel.title] = ax

    monkeypatch.setattr(plots.Panel, "draw", keep)
    return panels


def lines(ax: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): list(zip(*map(np.ndarray.tolist, map(np.asarray, line.get_data()))))
            for line in ax.get_lines()}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Stopped, and gone on with; 9 steps, evaluated at 4, 8 and 9."""
    run = new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(5)), run)
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    return run


def test_the_curves_are_those_of_the_journal_each_step_once(run: RunDir, drawn: dict[str, Axes]) -> None:
    assert plots.draw(run) == run.plots
    with Image.open(run.plots) as image:
        assert image.width == 1400
    rows = list(Journal(run.metrics).rows())
    shown = lines(drawn["Loss"])
    assert shown["train/loss"] == [(row["step"], row["train/loss"]) for row in rows]
    assert shown["eval/loss"] == [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    assert lines(drawn["Learning rate"])["lr"] == [(row["step"], row["lr"]) for row in rows]
    assert {"grad_norm", "0", "1", "3"} == set(lines(drawn["Norm of the gradients before clipping, all and by part"]))
    assert set(lines(drawn["Shares of time and of the machine's peak (%)"])) == {"data_share", "peak_share", "goodput"}


@pytest.mark.parametrize("value", ['"nbn"', "null", "[1]"])
def test_a_damaged_figure_is_a_gap_in_its_curve(tmp_path: Path, value: str) -> None:
    run = new_run(tmp_path, Buffers)
    run.metrics.write_text(f'{{"step": 1, "lr": {value}}}\n{{"stfp": 2, "lr": 1}}\n{{"step": 3, "lr": "nan"}}\n'
                           '{"step": 4, "lr": 0.5}\n')
    steps, values = plots.read(run)["lr"]
    assert steps == [1, 3, 4] and math.isnan(values[0]) and math.isnan(values[1]) and values[2] == 0.5


def test_the_best_evaluation_is_marked(run: RunDir, drawn: dict[str, Axes]) -> None:
    plots.draw(run)
    best = min((row["eval/loss"], row["step"]) for row in Journal(run.metrics).rows() if "eval/loss" in row)
    (star,) = [line for line in drawn["Loss"].get_lines() if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (best[1], best[0])
    assert [text.get_text() for text in drawn["Loss"].texts] == [f"best: {best[0]:.4g} at step {best[1]}"]
    assert not [line for line in drawn["Learning rate"].get_lines() if line.get_marker() == "*"]


def test_rows_that_were_written_twice_are_shown_once(run: RunDir, drawn: dict[str, Axes]) -> None:
    """As when a run was killed between journal and snapshot, and is looked at before it goes on and forgets them."""
    Journal(run.metrics).append({"step": 8, "train/loss": 77.0, "lr": 1.0})
    plots.draw(run)
    steps = [step for step, _ in lines(drawn["Loss"])["train/loss"]]
    assert steps == sorted(set(steps)) and dict(lines(drawn["Loss"])["train/loss"])[8] == 77.0


def test_what_is_not_finite_leaves_a_gap(run: RunDir, drawn: dict[str, Axes]) -> None:
    Journal(run.metrics).append({"step": 10, "train/loss": math.nan, "lr": math.inf})
    plots.draw(run)
    assert math.isnan(lines(drawn["Loss"])["train/loss"][-1][1])
    assert math.isnan(lines(drawn["Learning rate"])["lr"][-1][1])


def test_a_stage_of_several_phases(tmp_path: Path, drawn: dict[str, Axes]) -> None:
    run = new_run(tmp_path, GAN)
    train(GAN, run)
    plots.draw(run)
    assert {"train/discriminator/loss", "train/generator/loss", "eval/loss"} <= set(lines(drawn["Loss"]))


def test_a_run_that_logged_nothing_is_refused_and_passed_over(
        tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    empty = new_run(tmp_path, Buffers)
    with pytest.raises(UserError, match="has not logged a step yet"):
        plots.draw(empty)
    monkeypatch.setattr(plots.registry, "runs", lambda: [empty, run])
    assert plots.main([]) == 0 and capsys.readouterr().out == f"{run.plots}\n" and not empty.plots.exists()
    assert plots.main([str(empty.path)]) == 2 and "nothing to draw" in capsys.readouterr().err
    assert plots.main(["no such run"]) == 2


def trained(tmp_path: Path, stage: type[Stage] = Buffers, **options: Any) -> tuple[RunDir, str]:
    run = new_run(tmp_path, stage)
    sitting = session(stage, run, **options)
    with run.lock():
        return run, sitting.train().state


def test_a_page_that_cannot_be_drawn_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sessions, "_draw", DRAW)
    caplog.set_level("INFO")
    run, state = trained(tmp_path)
    assert state == "finished" and f"Plots: {run.plots}" in caplog.messages
    monkeypatch.setattr(plots, "read", lambda run: {"train/loss": "nonsense"})
    run, state = trained(tmp_path)
    assert state == "finished" and (run.models / "final").exists() and not run.plots.exists()
    assert "the plots could not be drawn" in caplog.text
