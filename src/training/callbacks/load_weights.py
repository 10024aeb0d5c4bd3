"""Starts a run with the weights of a snapshot."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.callback import SHAPE, Callback
from training.snapshots import load_weights

if TYPE_CHECKING:
    from training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class LoadWeights(Callback):
    """Fills the model before anything else shapes it. A snapshot restored later replaces these weights."""

    order = SHAPE
    snapshot: Path

    def on_build(self, trainer: "Trainer") -> None:
        load_weights(self.snapshot, trainer.model)
        log.info("Weights taken from %s", self.snapshot)
