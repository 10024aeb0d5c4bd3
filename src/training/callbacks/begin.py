"""Marks the point from which a run has begun."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker import config, files
from stoker.daemon.rundir import RunDir
from stoker.training.core import copied
from stoker.training.core.callback import SHAPE, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer


@dataclass
class Begin(Callback):
    """From here on nothing can be refused any more: the resolved config is written, the stage's own files are
    there, and result/<stage>_<dataset> points at the run if it is the newest."""

    order = SHAPE
    run: RunDir
    begun: threading.Event

    def on_start(self, trainer: "Trainer") -> None:
        files.write_json(self.run.config_file, config.to_json(trainer.cfg))
        copied.copy_sources(trainer.stage, self.run.path)
        trainer.stage.begin()
        self.run.announce(trainer.stage.name, self.run.status().dataset)
        self.begun.set()
