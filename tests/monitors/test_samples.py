"""What a model makes is shown and kept; making it changes nothing."""

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from stoker.daemon.rundir import RunDir
from stoker.monitors.samples import evaluating
from stoker.training.core.media import Media
from toys import Buffers, Showing, StopAt, Toy, assert_same, new_run, train, with_callbacks


class Maker(Showing):
    """Notes the mode and the weights that it was shown."""

    seen: list[tuple[bool, bool, torch.Tensor]] = []

    def samples(self, model: nn.Module) -> dict[str, Media]:
        first = next(model.parameters())
        self.seen.append((any(m.training for m in model.modules()), torch.is_grad_enabled(), first.detach().clone()))
        return super().samples(model)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run with evaluations at steps 4, 8 and 9."""
    Maker.seen.clear()
    run = new_run(tmp_path, Maker)
    trainer, _ = train(Maker, run)
    assert trainer.switched_off == []
    return run


def test_they_are_kept_as_files_that_people_open(run: RunDir) -> None:
    assert sorted(path.name for path in run.samples.iterdir()) == ["step_00000004", "step_00000008", "step_00000009"]
    folder = run.samples / "step_00000008"
    assert sorted(path.name for path in folder.iterdir()) == ["picture.png", "sound.wav", "text_0.txt"]
    assert (folder / "text_0.txt").read_text() == "# not a heading\n*two* lines <b>\n"
    with Image.open(folder / "picture.png") as picture:
        assert np.asarray(picture).flatten().tolist() == list(range(72))
    with wave.open(str(folder / "sound.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getnframes()) == (8000, 1, 800)
        heard = np.frombuffer(sound.readframes(800), dtype="<i2") / 32767
    assert np.abs(heard - np.clip(2 * np.sin(np.arange(800) / 10), -1, 1)).max() < 1e-4


def test_they_are_shown_on_the_board(run: RunDir) -> None:
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in board.Tensors("text/0")] == [4, 8, 9]
    shown = board.Tensors("text/0")[0].tensor_proto.string_val[0].decode()
    assert shown == "    # not a heading\n    *two* lines <b>", "indented, so Markdown leaves it alone"
    assert [(event.step, event.width, event.height) for event in board.Images("picture")] == [
        (4, 6, 4), (8, 6, 4), (9, 6, 4)]
    assert [(event.step, event.sample_rate) for event in board.Audio("sound")] == [(4, 8000), (8, 8000), (9, 8000)]


def test_making_them_changes_nothing(tmp_path: Path, run: RunDir) -> None:
    with_samples, _ = train(Maker, new_run(tmp_path, Maker))
    without, _ = train(Buffers, new_run(tmp_path, Buffers), samples=False)
    assert_same(with_samples.model.state_dict(), without.model.state_dict())
    assert all(seen[:2] == (False, False) for seen in Maker.seen), "no dropout, no gradients"


def test_each_module_is_in_its_mode_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_averaged_weights_are_the_ones_shown(tmp_path: Path) -> None:
    Maker.seen.clear()
    run = new_run(tmp_path, Maker)
    trainer, _ = train(Maker, run, ema_decay=0.9, snapshot_interval=1)
    state = torch.load(trainer.snapshots.at_step(8) / "state.pt", weights_only=True)  # type: ignore[operator]
    average = next(iter(state["callbacks"]["EMA"]["state"]["average"].values()))
    assert torch.equal(Maker.seen[-2][2], average)


def test_resumed_is_uninterrupted_and_an_abandoned_sample_is_made_again(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Maker), new_run(tmp_path, Maker)
    first, _ = train(with_callbacks(Maker, StopAt(-1)), whole)
    train(with_callbacks(Maker, StopAt(4)), run)
    second, _ = train(with_callbacks(Maker, StopAt(-1)), run, resume=True)
    assert_same(first.model.state_dict(), second.model.state_dict())
    assert (sorted(p.relative_to(whole.samples) for p in whole.samples.rglob("*"))
            == sorted(p.relative_to(run.samples) for p in run.samples.rglob("*")))


def test_a_stage_that_fails_to_make_them_trains_on(tmp_path: Path) -> None:
    class Fails(Toy):
        def samples(self, model: nn.Module) -> dict[str, Media]:
            raise RuntimeError("on purpose")

    stage = type("FailsToo", (Fails, Buffers), {})
    trainer, ending = train(stage, new_run(tmp_path, stage))
    good, _ = train(Buffers, new_run(tmp_path, Buffers))
    assert ending.state == "finished" and trainer.switched_off == ["Samples"]
    assert_same(trainer.model.state_dict(), good.model.state_dict())


def test_a_stage_that_makes_nothing_leaves_no_folders(tmp_path: Path) -> None:
    run = new_run(tmp_path, Buffers)
    train(Buffers, run)
    assert not list(run.samples.iterdir())
