"""Figures of a whole validation set that are no ratios of sums."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from stoker.daemon.journal import Journal
from stoker.data import workers
from stoker.training.assembly import estimate
from stoker.training.core.evaluation import evaluate
from stoker.training.core.figures import Batch, Ratio
from toys import Contrastive, Points, new_run, planned, train


class Recall(Contrastive):
    """How many of each kind are nearest to their own, among all of the set."""

    name = "recall"
    best = "eval/recall", "max"

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        return {}

    def gather(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled() and not model.training
        return {side: F.normalize(model[side](x), dim=1) for side, x in (("left", batch["x"]), ("right", -batch["x"]))}

    def judge(self, gathered: Mapping[str, Tensor]) -> dict[str, float]:
        near = (gathered["left"] @ gathered["right"].T).argmax(1)
        return {"recall": float((near == torch.arange(len(near))).float().mean()), "rows": len(near)}


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_what_is_gathered_is_judged_whole_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    torch.manual_seed(0)
    stage = Recall(Recall.Config(batch_size=batch_size, num_workers=0, precision="fp32"), tmp_path)
    model, rows = stage.model(), stage.dataset("validation")
    done = evaluate(stage, model, rows, stage.cfg, torch.device("cpu"), lambda: False)
    with torch.no_grad():
        x = torch.stack([rows[i] for i in range(len(rows))])
        made = stage.gather(model, {"x": x})
        left, right = made["left"], made["right"]
    right_ones = [i for i in range(7) if all(left[i] @ right[i] >= left[i] @ right[j] for j in range(7))]
    assert done and done.metrics == {"eval/recall": pytest.approx(len(right_ones) / 7), "eval/rows": 7}
    assert done.size == {"samples": 7}


@pytest.mark.parametrize("stops", [False, True])
def test_a_stop_while_a_batch_is_awaited_abandons_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     stops: bool) -> None:
    """Of a worker that sends nothing, as if its data set hung."""
    stage = Recall(Recall.Config(batch_size=4, num_workers=1, precision="fp32"), tmp_path)
    rows = stage.dataset("validation")
    monkeypatch.setattr("stoker.data.loader.LOOK", 0.05)
    if stops:
        monkeypatch.setattr(Points, "__getitem__", lambda self, index: time.sleep(600 if get_worker_info() else 0))
        monkeypatch.setattr(Recall, "collate", lambda self, samples: {})
    done = evaluate(stage, stage.model(), rows, stage.cfg, torch.device("cpu"), lambda: stops)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds that it waits
    for batches in workers._left:
        batches._shutdown_workers()
    workers._left.clear()
    assert (done is None) == stops


def test_a_judged_figure_can_be_the_best_metric(tmp_path: Path) -> None:
    run = new_run(tmp_path, Recall)
    trainer, ending = train(Recall, run, max_steps=40, lr=3e-3)
    found = {row["step"]: row["eval/recall"] for row in Journal(run.metrics).rows() if "eval/recall" in row}
    assert ending.state == "finished" and trainer.best == max(found.values()) == found[trainer.best_step]
    assert found[40] > found[4]


def test_the_estimate_counts_what_is_gathered(tmp_path: Path) -> None:
    class Counted(Recall):
        def gather(self, model: Any, batch: Batch) -> dict[str, Tensor]:
            sizes.append(len(batch["x"]))
            return super().gather(model, batch)

    sizes: list[int] = []
    stage = Counted(Counted.Config(batch_size=4, precision="fp32"), tmp_path)
    assert estimate.measure(planned(stage)).scored_seconds["eval"] > 0 and set(sizes) == {4}
