"""Norms of the gradients, by part of the model, and how their entries are distributed."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stoker.monitors import histograms
from stoker.monitors.alerts import Alerts
from stoker.monitors.parts import by_part, entries, gradients
from stoker.training.core import optim
from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

VANISHING, EXPLODING = 1e-7, 1e3
ADVICE = {
    "vanishing": "it hardly learns; is it used by the loss? else try a higher --lr",
    "exploding": "try a lower --lr or a longer --warmup_steps, and keep --gradient_clip at 1",
}


@dataclass
class Gradients(Callback):
    """Records `gradients/<part>` (norm before clipping) and `gradients/zeros` (share of entries that are 0), and shows
    a histogram of `sample_size` evenly spaced entries of each tensor.

    Looks at every `interval`-th step, in one fused pass on the device; what it found is read at the log step, and
    each part whose norm is below 1e-7 or above 1e3 is warned of once.
    """

    interval: int
    sample_size: int
    alerts: Path
    _entries: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _warned: set[str] = field(default_factory=set)

    def on_start(self, trainer: "Trainer") -> None:
        self._entries = {part: own.to(trainer.device) for part, own in self._entries.items()}

    def on_grad(self, trainer: "Trainer", phase: str) -> None:
        if (trainer.step + 1) % self.interval:
            return
        named = gradients(trainer.model, optim.parameters(trainer.optimizers[phase]))
        parts = by_part(zip([name for name, _ in named], torch._foreach_norm([grad for _, grad in named])))
        for part, norms in parts.items():
            trainer.record(f"gradients/{part}", torch.linalg.vector_norm(torch.stack(norms)))
        zeros = torch.stack([(grad == 0).sum() for _, grad in named]).sum()
        trainer.record("gradients/zeros", zeros / sum(grad.numel() for _, grad in named))
        sampled = by_part((name, entries(grad, self.sample_size)) for name, grad in named)
        self._entries |= {part: torch.cat(own) for part, own in sampled.items()}

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        histograms.show(trainer, "gradients", self._entries)
        self._entries = {}
        for name, norm in metrics.items():
            part = name.removeprefix("gradients/")
            if part in (name, "zeros") or part in self._warned or VANISHING <= norm <= EXPLODING or math.isnan(norm):
                continue  # NaN: no gradient of this interval was finite, which `Sanity` reports
            self._warned.add(part)
            what = "vanishing" if norm < VANISHING else "exploding"
            Alerts(self.alerts).report(trainer.step, "gradients", f"the gradients of {part} are {what} (norm "
                                     f"{norm:.2g}): {ADVICE[what]}", part=part, norm=norm)

    def state_dict(self) -> dict[str, Any]:
        return {"warned": sorted(self._warned), "entries": dict(self._entries)}  # those that no log line has shown yet

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._warned, self._entries = set(state.get("warned", ())), dict(state.get("entries", {}))
