"""How gradients and weights are distributed, against what they are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stoker.daemon.journal import Journal
from stoker.monitors import histograms
from stoker.monitors.parts import entries
from stoker.training.core.callback import REPORT, Callback
from stoker.training.core.media import Histogram, Media
from stoker.training.trainer import Trainer
from toys import Regression, StopAt, new_run, train, with_callbacks

ALL: dict[str, Any] = dict(gradient_monitor_interval=4, weight_monitor_interval=4, weight_monitor_sample_size=10**6,
                           log_interval=4, max_steps=8, eval_interval=99)


@dataclass
class Witness(Callback):
    """Keeps the gradients and weights of step 4 as they are, and what is shown then."""

    order = REPORT
    gradients: np.ndarray = field(default_factory=lambda: np.zeros(0))
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    shown: dict[str, Media] = field(default_factory=dict)

    def on_grad(self, trainer: Trainer, phase: str) -> None:
        if trainer.step == 3:
            self.gradients = self.flat([p.grad.clone() for p in trainer.model[0].parameters()])

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.step == 4:
            self.weights = self.flat([p.detach() for p in trainer.model[0].parameters()])
            self.shown = dict(trainer.media)

    def flat(self, tensors: list[torch.Tensor]) -> np.ndarray:
        return torch.cat([t.flatten() for t in tensors]).double().numpy()


def test_they_are_those_of_the_gradients_before_clipping_and_of_the_weights(tmp_path: Path) -> None:
    witness, run = Witness(), new_run(tmp_path, Regression)
    train(with_callbacks(Regression, witness), run, gradient_clip=1e-3, **ALL)
    for name, true in (("gradients/0/histogram", witness.gradients), ("weights/0/histogram", witness.weights)):
        shown = witness.shown[name]
        assert isinstance(shown, Histogram)
        counts, edges = np.histogram(true, histograms.BINS)
        assert shown.counts.tolist() == counts.tolist() and np.allclose(shown.edges, edges, rtol=1e-6)
        assert counts.sum() == true.size == 16 * 8 + 16

    board = EventAccumulator(str(run.tensorboard), size_guidance={"histograms": 0}).Reload()
    assert set(board.Tags()["histograms"]) == {f"{kind}/{part}/histogram" for kind in ("gradients", "weights")
                                               for part in "02"}
    assert not set(board.Tags()["histograms"]) & set(board.Tags()["scalars"]), "a tag is one or the other"
    value = board.Histograms("weights/0/histogram")[0]
    assert value.step == 4 and value.histogram_value.num == witness.weights.size
    assert np.isclose(value.histogram_value.min, witness.weights.min())
    assert sum(value.histogram_value.bucket) == witness.weights.size


def test_a_sample_is_evenly_spaced_and_no_larger_than_asked() -> None:
    tensor = torch.arange(1000.0).reshape(10, 100)
    assert entries(tensor, 10).tolist() == [100.0 * i for i in range(10)]
    assert len(entries(tensor, 300)) == 300 and len(entries(tensor, 5000)) == 1000


def test_what_is_not_finite_or_all_the_same_is_shown_too() -> None:
    class Screen:
        shown: dict[str, Media] = {}

        def show(self, name: str, media: Media) -> None:
            self.shown[name] = media

    screen: Any = Screen()
    histograms.show(screen, "x", {"nan": torch.tensor([float("nan"), 1.0, 2.0]), "none": torch.tensor([float("inf")]),
                                  "same": torch.full((5,), 1.0), "close": torch.tensor([1.0, 1.0 + 2**-23])})
    assert set(screen.shown) == {"x/nan/histogram", "x/same/histogram", "x/close/histogram"}
    assert [int(media.counts.sum()) for media in screen.shown.values()] == [2, 5, 2]


def test_drift_is_the_distance_from_the_first_weights_also_after_a_resume(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run, **ALL)
    trainer, _ = train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    first = load_file(run.snapshots / "snapshot_step_00000000" / "model.safetensors")
    own = [name for name in first if name.startswith("0.")]
    now = dict(trainer.model.state_dict())
    change = torch.cat([(now[name] - first[name]).flatten() for name in own]).norm()
    expected = float(change / torch.cat([now[name].flatten() for name in own]).norm())
    row = next(row for row in Journal(run.metrics).rows() if row["step"] == 8)
    assert abs(row["weights/0/drift"] - expected) < 1e-6 * expected


def test_what_no_log_line_had_shown_when_a_run_stopped_is_shown_when_it_goes_on(tmp_path: Path) -> None:
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run, **ALL | dict(log_interval=6))  # looked at in step 4
    train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    board = EventAccumulator(str(run.tensorboard), size_guidance={"histograms": 0}).Reload()
    assert {tag: [event.step for event in board.Histograms(tag)] for tag in board.Tags()["histograms"]} == {
        f"{kind}/{part}/histogram": [6, 8] for kind in ("gradients", "weights") for part in "02"}
