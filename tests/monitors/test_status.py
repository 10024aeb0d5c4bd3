"""What `ps.sh` shows of the figures: those of the log, by their names."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.daemon.journal import Journal
from stoker.monitors import status
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.stage import Stage
from stoker.training.train_lm import LanguageModel
from toys import GAN, Regression, Toy, new_run, train


class Sum(Regression):
    """As the stages with a CTC head: the loss is made of others, which are logged too."""

    name = "sum"
    best = ("eval/wer", "max")

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss, = super().loss(model, batch, moment).terms.values()
        return Loss({"loss": loss}, {"ctc_loss": Ratio(loss.detach() + 100, len(batch["x"])), "wer": Ratio(1.0, 2)})


@pytest.mark.parametrize("stage, figure", [(Sum, "train/loss"), (GAN, "train/generator/loss")])
def test_the_loss_is_that_of_the_log(tmp_path: Path, stage: type[Toy], figure: str) -> None:
    run = new_run(tmp_path, stage)
    train(stage, run)
    assert run.status().loss == list(Journal(run.metrics).rows())[-1][figure]


def test_the_best_is_kept_with_its_name_and_direction(tmp_path: Path) -> None:
    run = new_run(tmp_path, Sum)
    train(Sum, run)
    written = run.status()
    assert (written.best, written.best_metric, written.best_mode) == (0.5, "wer", "max")


def best(stage: type[Stage], value: float, step: int = 7) -> dict[str, Any]:
    trainer: Any = SimpleNamespace(best=value, best_step=step, stage=stage(stage.Config(), Path()))
    return status._best(trainer)


def test_a_language_model_s_is_its_perplexity() -> None:
    shown = best(LanguageModel, 4.25)
    assert shown == {"best": pytest.approx(math.exp(4.25)), "best_metric": "ppl", "best_mode": "min"}
    assert best(LanguageModel, 4.25, step=-1) == {"best": None}, "none yet"
