"""Finds NaN and infinity: in loss and gradients at every step, in weights and optimizer at an interval."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stoker import files
from stoker.monitors.alerts import Alerts
from stoker.monitors.parts import first_non_finite
from stoker.training.core import optim
from stoker.training.core.callback import Callback
from stoker.training.core.figures import Ratio
from stoker.training.core.incident import NON_FINITE
from stoker.training.core.parts import kept

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

LIMIT = 3  # updates dropped in a row, after which a run is not healthy any more


@dataclass
class Sanity(Callback):
    """Reports updates that were dropped because they were not finite, and stops a run that keeps having them.

    The trainer never applies such an update; this monitor finds out where it came from. On a CPU it does so at the step
    itself; on a GPU, where the host would have to wait, at the next log step. Then the run goes back to before that
    step, as long as there are recoveries left, and `Examination` looks into it there.
    """

    alerts: Path
    incidents: Path
    interval: int
    turned_back: int = 0  # times that this sitting went back for it
    in_a_row: int = 0
    _seen: dict[str, Tensor] = field(default_factory=dict, repr=False)  # on the device, since the last look
    _losses: list[Tensor] = field(default_factory=list, repr=False)  # of the step in hand

    def on_step_start(self, trainer: "Trainer") -> None:
        self._losses = []

    def on_loss(self, trainer: "Trainer", phase: str, loss: Ratio) -> None:
        self._losses.append(loss.total.detach())

    def on_step_end(self, trainer: "Trainer") -> None:
        self._note(trainer)
        if trainer.device.type == "cpu":
            self._look(trainer)
        if self.interval and trainer.step % self.interval == 0:
            self._scan(trainer)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self._look(trainer)

    def _note(self, trainer: "Trainer") -> None:
        """Count dropped updates, in all and in a row, and keep the step of the first, on the device."""
        zero, dropped = torch.zeros_like(trainer.dropped), trainer.dropped
        seen = self._seen or {"all": zero, "row": zero + self.in_a_row, "worst": zero, "first": zero}
        row = (seen["row"] + dropped) * dropped
        is_first = (dropped > 0) & (seen["all"] == 0)
        self._seen = {"all": seen["all"] + dropped, "row": row, "worst": torch.maximum(seen["worst"], row),
                      "first": torch.where(is_first, float(trainer.step), seen["first"])}

    def _look(self, trainer: "Trainer") -> None:
        if not self._seen:
            return
        dropped, self.in_a_row, worst, step = (int(self._seen[name]) for name in ("all", "row", "worst", "first"))
        self._seen = {}
        if dropped:
            where = self._where(trainer) if step == trainer.step else "a gradient (later steps do not show which one)"
            self._recover(trainer, step, where)
            self._report(trainer, step, where, dropped)
        if worst >= LIMIT:
            trainer.ask("stop", f"{worst} updates in a row were not finite: start a new run from a snapshot's "
                                "weights (--init_from) with a lower --lr or a longer --warmup_steps", "halted")

    def _recover(self, trainer: "Trainer", step: int, where: str) -> None:
        times = max(self.turned_back, len([entry for entry in trainer.ledger if entry["why"] == NON_FINITE]))
        if times < trainer.cfg.nan_recoveries:
            trainer.go_back(step, NON_FINITE, f"NaN or Inf in {where} at step {step}")
        elif trainer.cfg.nan_recoveries:
            trainer.ask("stop", f"NaN or Inf in {where} at step {step}, though the run went back {times} times before "
                                "(--nan_recoveries): look at incidents/; mend the data, or start a new run with a "
                                "lower --lr or a longer --warmup_steps", "halted")

    def _report(self, trainer: "Trainer", step: int, where: str, dropped: int) -> None:
        rows = trainer.order.rows(step - 1)
        Alerts(self.alerts).report(
            step, "non-finite", f"NaN or Inf in {where}; {dropped} update(s) dropped, the weights are as before",
            where=where, rows=rows)
        files.write_json(self.incidents / f"step_{step:08d}.json",
                         {"step": step, "kind": "non-finite", "where": where, "rows": rows, "dropped": dropped})

    def _where(self, trainer: "Trainer") -> str:
        """What was bad first in the step just done: a weight, the loss, or the gradient nearest the output, since from
        there NaN spreads down. The gradients were since multiplied by a clip factor of NaN, so their norms from before
        are read."""
        if name := first_non_finite(trainer.model.named_parameters()):
            return f"weight {name}"
        if not all(loss.isfinite() for loss in self._losses):
            return "the loss"
        bad = {id(p) for phase, norms in trainer.grad_norms.items() for p, norm in zip(
            [p for p in optim.parameters(trainer.optimizers[phase]) if p.grad is not None], norms.tolist())
               if not math.isfinite(norm)}
        named = [f"gradient of {name}" for name, p in trainer.model.named_parameters() if id(p) in bad]
        return named[-1] if named else "the norm of all gradients together"

    def _scan(self, trainer: "Trainer") -> None:
        """Weights and buffers that a snapshot holds, and optimizer state."""
        named: list[tuple[str, Any]] = [(f"weight {n}", t) for n, t in kept(trainer.model).items()]
        names: dict[Tensor, str] = {p: n for n, p in trainer.model.named_parameters()}
        for optimizer in trainer.optimizers.values():
            named += [(f"optimizer's {key} of {names.get(p, '?')}", value)
                      for p, state in optimizer.state.items() for key, value in state.items()]
        if where := first_non_finite(named):
            trainer.ask("stop", f"NaN or Inf in {where}: go on from an earlier snapshot (--resume)", "halted")
            Alerts(self.alerts).report(trainer.step, "non-finite", f"NaN or Inf in {where}", where=where)

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "seen": {name: float(value) for name, value in self._seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state.get("in_a_row", 0)
        self._seen = {name: torch.tensor(value) for name, value in state.get("seen", {}).items()}
