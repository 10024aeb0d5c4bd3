"""Looks into a step that failed, when it is about to be done again, and leaves out the rows that made it so."""

import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files
from stoker.daemon.journal import Journal
from stoker.training.core import device as devices
from stoker.training.core import incident
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.figures import Batch
from stoker.training.core.incident import Incident

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)

RECENT = 20  # log lines kept with an incident


@dataclass
class Examination(Callback):
    """Before step `step` (from 1) the weights and the rows are what they were when it failed.

    Rows that alone are not finite are left out from then on; where there are none, and after a spike, all of the
    step's. A step that is finite when it is done again failed for another reason than its data: nothing is left out.
    """

    order = ACT
    step: int
    why: str
    incidents: Path
    metrics: Path
    done: bool = False  # a step may be begun more than once

    def on_step_start(self, trainer: "Trainer") -> None:
        if self.done or trainer.step + 1 != self.step:
            return
        self.done = True
        rows, items = trainer.order.rows(trainer.step), trainer.order.items(trainer.step)
        stage = trainer.stage
        dataset = stage.dataset("train")
        batches = [devices.move(stage.collate([dataset[item] for item in part]), trainer.device) for part in items]
        found = incident.examine(stage, trainer.model, batches, self.step, trainer.device, trainer.cfg.precision)
        bad = self._bad(trainer, found.where, dict(zip(chain.from_iterable(items), chain.from_iterable(rows))))
        if bad:
            trainer.leave_out(bad, self.why)
        what = f"NaN or Inf, first in {found.where}" if found.where else f"a loss of {float(found.loss):.4g}"
        then = f"rows {', '.join(map(str, bad))} are left out from now on" if bad else (
            "this time, so what failed was not the data: nothing is left out")
        log.warning("step %d: %s; %s", self.step, what, then)
        metrics = list(Journal(self.metrics).rows())[-RECENT:]
        self._keep(trainer, Incident(self.step, self.why, found.where, found.loss, rows, bad, metrics, trainer.ledger),
                   batches)

    def _bad(self, trainer: "Trainer", where: str, rows: dict[int, int]) -> list[int]:
        """`rows`: what the data set is asked for to give a row as it was in this step -> the row."""
        every = list(dict.fromkeys(rows.values()))  # one may come twice: at the end of an epoch, and in the next
        if self.why == incident.SPIKE or not where:
            return every if self.why == incident.SPIKE else []
        stage, model, cfg = trainer.stage, trainer.model, trainer.cfg
        bad = incident.bad_items(stage, model, rows, self.step, trainer.device, cfg.precision)
        return list(dict.fromkeys(rows[item] for item in bad)) or every

    def _keep(self, trainer: "Trainer", what: Incident, batches: list[Batch]) -> None:
        try:
            path = incident.write(self.incidents, what, trainer.model, batches)
            log.info("Do it again: %s", files.hint(f"replay {path}"))
        except OSError as error:  # no reason for a run to end
            log.error("the incident could not be kept: %s", error)
