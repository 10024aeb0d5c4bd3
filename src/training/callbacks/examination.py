"""Looks into a step that was not finite, when it is about to be done again, and leaves out the rows that made it so."""

import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.journal import Journal
from training import device as devices
from training import incident, rng
from training.callback import ACT, Callback
from training.incident import Incident

if TYPE_CHECKING:
    from training.trainer import Trainer

log = logging.getLogger(__name__)

RECENT = 20  # log lines kept with an incident


@dataclass
class Examination(Callback):
    """Before step `step` (from 1) the weights, the random state and the rows are what they were when it failed.

    Rows that alone are not finite are left out from then on; where there are none, all of the step's. A step that is
    finite when it is done again failed for another reason than its data: nothing is left out.
    """

    order = ACT
    step: int
    incidents: Path
    metrics: Path

    def on_step_start(self, trainer: "Trainer") -> None:
        if trainer.step + 1 != self.step:
            return
        rows, random = trainer.order.rows(trainer.step), rng.state_dict()
        stage, precision = trainer.stage, trainer.cfg.precision
        dataset = stage.dataset("train")
        batches = [devices.move(stage.collate([dataset[row] for row in part]), trainer.device) for part in rows]
        where = incident.examine(stage, trainer.model, batches, trainer.device, precision)
        flat = list(chain.from_iterable(rows))
        bad = incident.bad_rows(stage, trainer.model, flat, trainer.device, precision) or flat if where else []
        if bad:
            trainer.leave_out(bad)
        path = incident.write(self.incidents, Incident(self.step, where, rows, bad, list(Journal(self.metrics).rows())
                                                       [-RECENT:], trainer.ledger), trainer.model, batches, random)
        if bad:
            log.warning("step %d: NaN or Inf, first in %s; row%s %s left out from now on; do it again: "
                        "./run/replay.sh %s", self.step, where, "s" * (len(bad) > 1), ", ".join(map(str, bad)), path)
        else:
            log.warning("step %d is finite this time: what failed was not its data; nothing is left out (%s)",
                        self.step, path)
