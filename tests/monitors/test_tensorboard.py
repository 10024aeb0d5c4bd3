"""The pages of TensorBoard beside the curves: options, overview."""

import re
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as Pages
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.stage import Stage
from stoker.training.trainer import Trainer
from toys import GAN, Buffers, Regression, StopAt, new_run, train, with_callbacks


def board_of(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"tensors": 0, "scalars": 0}).Reload()


@pytest.fixture
def resumed(tmp_path: Path) -> RunDir:
    """Stopped at step 5, then done, with another log interval."""
    run = new_run(tmp_path, Buffers)
    train(with_callbacks(Buffers, StopAt(5)), run)
    time.sleep(1.1)  # event files are named by the second
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True, log_interval=3)
    return run


def test_the_first_time_that_steps_are_done_again_they_stand_there_once(tmp_path: Path) -> None:
    """By what TensorBoard's own pages read with: it takes the first sign of a restart for the start."""
    class Falls(Callback):
        order = ACT

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 8:
                raise RuntimeError("fallen")

    run = new_run(tmp_path, Buffers)
    with pytest.raises(RuntimeError, match="fallen"):
        train(with_callbacks(Buffers, Falls()), run, rows=100)  # logged at 6, saved at 4
    time.sleep(1.1)
    train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    board = Pages(str(run.tensorboard), tensor_size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Tensors("train/loss")] == [1, 2, 4, 6, 8, 9]


def options_in(path: Path) -> dict[str, object]:
    content = board_of(path).PluginTagToContent("hparams")
    assert list(content) == ["_hparams_/session_start_info"]
    written = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in written.items()}


def test_the_options_stand_there_once_and_are_those_that_cannot_change(resumed: RunDir) -> None:
    first, second = sorted(resumed.tensorboard.iterdir())
    assert first.is_file() and second.is_file(), "no folders: TensorBoard would take them for runs"
    options = options_in(first)
    assert (options["stage"], options["batch_size"], options["lr"], options["max_steps"]) == ("buffers", 4, 0.01, 9)
    assert options["amp"] == "True" and not {"log_interval", "result_dir", "yes", "working_folder"} & options.keys()
    with pytest.raises(KeyError):
        options_in(second)


def test_beside_them_stand_the_best_and_the_last_evaluation(resumed: RunDir) -> None:
    board, rows = board_of(resumed.tensorboard), list(Journal(resumed.metrics).rows())
    evaluated = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert board.Scalars("eval/loss")[-1].value == pytest.approx(evaluated[-1], rel=1e-6)
    assert [event.value for event in board.Scalars("eval/best_loss")] == [
        pytest.approx(min(evaluated[:i + 1]), rel=1e-6) for i in range(len(evaluated))]


class Scored(Regression):
    best = ("eval/error", "max")


def test_for_a_score_the_best_is_the_highest(tmp_path: Path) -> None:
    run = new_run(tmp_path, Scored)
    trainer, _ = train(Scored, run)
    assert board_of(run.tensorboard).Scalars("eval/best_error")[-1].value == pytest.approx(trainer.best, rel=1e-6)


@pytest.mark.parametrize("stage", [Buffers, GAN, Scored])
def test_every_chart_of_the_overview_shows_something(tmp_path: Path, stage: type[Stage]) -> None:
    run = new_run(tmp_path, stage)
    train(stage, run)
    board = board_of(run.tensorboard)
    (tensor,) = board.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    (category,) = layout.category
    assert len(category.chart) == (7 if stage is Scored else 6)
    assert (category.chart[0].title == "eval/error") == (stage is Scored)
    tags = board.Tags()["scalars"]
    for chart in category.chart:
        assert any(re.search(pattern, tag) for pattern in chart.multiline.tag for tag in tags), chart.title
    (loss,) = (chart.multiline.tag for chart in category.chart if chart.title == "loss")
    assert all(any(re.search(pattern, tag) for tag in tags) for pattern in loss)
