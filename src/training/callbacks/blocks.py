"""Compiles the stage's blocks and checkpoints their gradients, as the options say."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.training.core import blocks
from stoker.training.core.callback import SHAPE, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer


@dataclass
class Blocks(Callback):
    """Comes after everything else that shapes the model."""

    order = SHAPE + 10

    def on_build(self, trainer: "Trainer") -> None:
        if trainer.cfg.compile:
            blocks.restart_compile_workers()
        blocks.shape(trainer.stage, trainer.model, trainer.cfg)
