"""Finds NaN and infinity: in the loss and the gradients at every step, in weights and optimizer at an interval."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import files
from monitors.alerts import Alerts
from monitors.parts import first_non_finite, gradients
from training.callback import Callback

if TYPE_CHECKING:
    from training.trainer import Trainer

LIMIT = 3  # updates dropped in a row, after which a run is not healthy any more


@dataclass
class Sanity(Callback):
    """Tells of updates that were dropped because they were not finite, and stops a run that keeps having them.

    The trainer never applies such an update; here its place is named and an incident written. On a CPU that is
    noticed at the step itself; on a GPU, where looking would make the host wait, at the next log step.
    """

    alerts: Path
    incidents: Path
    interval: int
    in_a_row: int = 0
    _dropped: Tensor | None = field(default=None, repr=False)
    _first: Tensor | None = field(default=None, repr=False)

    def on_step_end(self, trainer: "Trainer") -> None:
        self._note(trainer)
        if trainer.device.type == "cpu":
            self._look(trainer)
        if self.interval and trainer.step % self.interval == 0:
            self._scan(trainer)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self._look(trainer)

    def _note(self, trainer: "Trainer") -> None:
        """Count dropped updates and keep the step of the first, on the device."""
        if self._dropped is None or self._first is None:
            self._dropped, self._first = torch.zeros_like(trainer.dropped), torch.full_like(trainer.dropped, -1)
        is_first = (trainer.dropped > 0) & (self._dropped == 0)
        self._first = torch.where(is_first, float(trainer.step), self._first)
        self._dropped = self._dropped + trainer.dropped

    def _look(self, trainer: "Trainer") -> None:
        if self._dropped is None or self._first is None:
            return
        dropped, step = int(self._dropped), int(self._first)
        self._dropped = self._first = None
        self.in_a_row = self.in_a_row + dropped if dropped else 0
        if dropped:
            self._report(trainer, step, dropped)
        if self.in_a_row >= LIMIT:
            trainer.ask("stop", f"{self.in_a_row} updates in a row were not finite; a lower --lr or a longer "
                                "--warmup_steps may help", "halted")

    def _report(self, trainer: "Trainer", step: int, dropped: int) -> None:
        where = self._where(trainer)
        rows = trainer.order.rows(step - 1)
        Alerts(self.alerts).tell(step, "non-finite", f"NaN or Inf in {where}; {dropped} update(s) dropped, the weights "
                                 "are as before", where=where, rows=rows)
        files.write_json(self.incidents / f"step_{step:08d}.json",
                         {"step": step, "kind": "non-finite", "where": where, "rows": rows, "dropped": dropped})

    def _where(self, trainer: "Trainer") -> str:
        if name := first_non_finite(trainer.model.named_parameters()):
            return f"weight {name}"
        if name := first_non_finite(gradients(trainer.model, trainer.model.parameters())):
            return f"gradient of {name}"
        return "the loss"

    def _scan(self, trainer: "Trainer") -> None:
        """Weights, buffers and optimizer state, all of them."""
        named: list[tuple[str, Any]] = [(f"weight {n}", t) for n, t in trainer.model.state_dict().items()]
        names: dict[Tensor, str] = {p: n for n, p in trainer.model.named_parameters()}
        for optimizer in trainer.optimizers.values():
            named += [(f"optimizer's {key} of {names.get(p, '?')}", value)
                      for p, state in optimizer.state.items() for key, value in state.items()]
        if where := first_non_finite(named):
            Alerts(self.alerts).tell(trainer.step, "non-finite", f"NaN or Inf in {where}", where=where)
            trainer.ask("stop", f"NaN or Inf in {where}: go on from an earlier snapshot (--resume SNAPSHOT)", "halted")

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state.get("in_a_row", 0)
