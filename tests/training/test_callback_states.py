"""States of callbacks and figures that no snapshot could hold: refused before a run begins, or converted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.training.core.callback import ACT, OBSERVE, Callback
from stoker.training.core.figures import Ratio
from stoker.training.core.snapshots import Snapshots, pack, unsavable
from stoker.training.trainer import Trainer
from toys import Regression, StopAt, new_run, session, train, with_callbacks


class Kept:
    """Of no kind that a snapshot may hold."""

    def __repr__(self) -> str:
        return "<kept>"


@pytest.mark.parametrize("state, found", [
    ({"a": [1, (2.5, None, "x", b"y", True, torch.ones(2))], 3: {}}, ""), ({"a": nn.Parameter(torch.ones(1))}, ""),
    ({"a": torch.float32}, ""),
    ({"a": {"b": [0, Kept()]}}, "state['a']['b'][1] is <kept>"), ({"f": lambda: 1}, "state['f'] is <function"),
    ({Kept(): 1}, "the key <kept> of state is <kept>")])
def test_what_a_snapshot_cannot_hold_is_found(state: Any, found: str) -> None:
    assert unsavable(state, "state").startswith(found) and bool(unsavable(state, "state")) == bool(found)


class Holding(Callback):
    """Its state cannot be saved, from the beginning or from `on_start` on."""

    def __init__(self, order: int, late: bool = False):
        self.order, self.late = order, late  # type: ignore[misc]
        if not late:
            self.state: dict[str, Any] = {"seen": Kept()}

    def on_start(self, trainer: Trainer) -> None:
        self.state = {"seen": Kept()}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


WHY = r"callback Holding: state_dict\(\)\['seen'\] is <kept>, which no snapshot can hold"


def test_a_state_that_cannot_be_saved_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    sitting = session(with_callbacks(Regression, Holding(ACT)), run)
    with run.lock(), pytest.raises(UserError, match=WHY):
        sitting.train()
    assert not sitting.begun.is_set() and not Snapshots(run.snapshots, {}).found()


def test_one_that_comes_later_is_found_before_the_first_step(tmp_path: Path) -> None:
    class Trained(Callback):
        order = ACT

        def on_step_end(self, trainer: Trainer) -> None:
            raise AssertionError("a step was made")

    with pytest.raises(UserError, match=WHY):
        train(with_callbacks(Regression, Holding(ACT, late=True), Trained()), new_run(tmp_path, Regression))


def test_a_state_that_cannot_be_loaded_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    class Counting(Callback):
        order = ACT

        def state_dict(self) -> dict[str, Any]:
            return {"seen": 1}

    with pytest.raises(UserError, match=r"callback Counting has state_dict\(\) but no load_state_dict\(\)"):
        train(with_callbacks(Regression, Counting()), new_run(tmp_path, Regression))


def test_numbers_of_numpy_do_not_spoil_a_snapshot(tmp_path: Path) -> None:
    """Neither those that a callback records nor those of a stage, between two log lines."""
    class Recording(Callback):
        order = ACT

        def on_step_end(self, trainer: Trainer) -> None:
            trainer.record("mine", Ratio(np.float64(trainer.step), np.int64(2)))

    kind, run = with_callbacks(Regression, Recording(), StopAt(5)), new_run(tmp_path, Regression)
    train(kind, run, log_interval=4, max_steps=8)
    train(with_callbacks(Regression, Recording()), run, resume=True)
    assert [row["mine"] for row in Journal(run.metrics).rows()] == [1 / 2, (2 + 3 + 4) / 6, (5 + 6 + 7 + 8) / 8]


def test_a_state_that_could_not_be_read_again_is_not_saved() -> None:
    with pytest.raises(UserError, match=r"no snapshot can be made: the trainer's state\['optimizer'\]\['lr'\] is"):
        pack("snapshot", 1, {"w": torch.ones(1)}, {"optimizer": {"lr": np.float64(1.0)}})


def test_a_monitor_whose_state_cannot_be_saved_is_switched_off(tmp_path: Path,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    trainer, ending = train(with_callbacks(Regression, Holding(OBSERVE)), new_run(tmp_path, Regression))
    assert ending.state == "finished" and trainer.switched_off == ["Holding"]
    assert "Holding failed; it is switched off" in caplog.text and "state_dict()['seen'] is <kept>" in caplog.text
