"""Which snapshots stay: by a policy that can be replaced, and never without those that the run itself needs."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.config import UserError
from stoker.daemon.rundir import RunDir
from stoker.training.callbacks.rotation import Rotation
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.snapshots import Snapshots, pack
from stoker.training.trainer import Trainer
from toys import Regression, StopAt, new_run, train, with_callbacks

LOSSES = {2: 5.0, 4: 1.0, 6: 4.0, 8: 3.0, 10: 2.0, 12: 6.0}  # by the step of the evaluation


class Scored(Regression):
    """Its evaluations come out as LOSSES says."""

    step = 0

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        return {"loss": Ratio(LOSSES.get(self.step, 9.0), 1)}


class Count(Callback):
    order = ACT

    def on_step_end(self, trainer: Trainer) -> None:
        type(trainer.stage).step = trainer.step  # type: ignore[attr-defined]


def steps(run: RunDir) -> list[int]:
    return Snapshots(run.snapshots, {}).steps()


def trained(tmp_path: Path, *callbacks: Callback, **options: Any) -> RunDir:
    run = new_run(tmp_path, Scored)
    train(with_callbacks(Scored, Count(), *callbacks), run, **{
        "rows": 200, "max_steps": 13, "eval_interval": 2, "snapshot_interval": 1, "keep_last_n_snapshots": 2} | options)
    return run


@pytest.mark.parametrize("options, kept", [
    ({}, [4, 12, 13]),
    ({"keep_best_k_snapshots": 3}, [4, 8, 10, 12, 13]),
    ({"keep_every_n_steps": 5}, [4, 5, 10, 12, 13]),
    ({"keep_every_n_steps": 3, "keep_best_k_snapshots": 2, "keep_last_n_snapshots": 1}, [3, 4, 6, 9, 10, 12, 13]),
    ({"keep_last_n_snapshots": 0}, [*range(14)]),
    ({"keep_last_n_snapshots": 0, "keep_best_k_snapshots": 2}, [*range(14)]),
    ({"snapshot_interval": 0, "keep_best_k_snapshots": 3, "keep_last_n_snapshots": 1}, [4, 8, 10, 13]),
])
def test_the_last_the_best_and_every_nth(tmp_path: Path, options: dict[str, Any], kept: list[int]) -> None:
    """The last case takes snapshots only where an evaluation is among the best so far."""
    assert steps(trained(tmp_path, **options)) == kept


def test_what_was_among_the_best_is_known_when_the_run_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(snapshot_interval=0, keep_best_k_snapshots=2, keep_last_n_snapshots=1)
    run = trained(tmp_path, StopAt(7), **options)
    assert steps(run) == [4, 6, 7]
    train(with_callbacks(Scored, Count(), StopAt(-1)), run, resume=True)
    assert steps(run) == [4, 10, 13]


def test_a_metric_that_shall_be_large(tmp_path: Path) -> None:
    rotation = Rotation(1, 2)
    trainer: Any = SimpleNamespace(stage=SimpleNamespace(best=("eval/acc", "max")), ask=lambda *given: None)
    for trainer.step, value in enumerate([0.5, 0.9, float("nan"), 0.1, 0.9, 0.7], start=1):
        rotation.on_eval_end(trainer, {"eval/acc": value})
    rotation.on_eval_end(trainer, {})  # abandoned
    assert [*rotation.scores] == [2, 5] and rotation.keep(trainer, [1, 2, 3, 4, 5, 6]) == {2, 5, 6}


class Nothing(Rotation):
    """A policy of the user's: no snapshot is worth anything."""

    def keep(self, trainer: Trainer, steps: Sequence[int]) -> set[int]:
        return set()


@pytest.mark.parametrize("stop, options, kept", [(-1, {}, [4, 13]),
                                                  (12, {"log_interval": 10, "eval_interval": 0}, [9, 12])])
def test_a_stage_replaces_the_policy_but_the_run_keeps_what_it_needs(tmp_path: Path, stop: int, options: dict[str, Any],
                                                                     kept: list[int]) -> None:
    """The newest, the best, and the newest of a step that was found to be well: by the log line of step 10 here, so a
    spike in step 11 could still be gone back for."""
    assert steps(trained(tmp_path, Nothing(99), StopAt(stop), snapshot_interval=3, **options)) == kept


def test_the_best_stays_until_its_successor_is_on_disk(tmp_path: Path) -> None:
    """Step 4 is better than step 2; but as long as the newest whole snapshot is that of step 3, a run that is resumed
    from it needs that of step 2."""
    run = new_run(tmp_path, Regression)
    trainer, _ = train(with_callbacks(Regression, StopAt(1)), run)
    saver, kept = trainer.saver, Snapshots(run.snapshots, {})
    for step in (2, 3):
        kept.save(pack(f"snapshot_step_{step:08d}", step, {}, {}))
    saver._last_whole = 2, -1  # as told with step 3
    trainer.best_step = 4
    saver.keep_only(set())
    assert steps(run) == [2, 3]


def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             caplog: pytest.LogCaptureFixture) -> None:
    def refuse(self: Snapshots, steps: object) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Snapshots, "keep_only", refuse)
    run = trained(tmp_path)
    assert steps(run) == [*range(14)] and "an older snapshot could not be deleted" in caplog.text


@pytest.mark.parametrize("option, value", [("keep_best_k_snapshots", "0"), ("keep_every_n_steps", "-1")])
def test_bad_options_are_refused(option: str, value: str) -> None:
    from stoker.training.assembly import pages

    with pytest.raises(UserError, match=f"--{option}"):
        pages.parse(Regression, [f"--{option}", value])
