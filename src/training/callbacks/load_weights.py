"""Starts a run with trained weights."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.training.core.callback import SHAPE, Callback
from stoker.training.core.pretrained import Pretrained

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class LoadWeights(Callback):
    """Fills the model before anything else shapes it. A snapshot restored later replaces these weights."""

    order = SHAPE
    weights: Pretrained

    def on_build(self, trainer: "Trainer") -> None:
        self.weights.load(trainer.stage, trainer.model)
        log.info("Weights loaded from %s, SHA-256 %s", self.weights, self.weights.identity["sha256"])
