"""Norms of the gradients, by part of the model."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from monitors.alerts import log
from monitors.parts import by_part, gradients
from training import optim
from training.callback import Callback

if TYPE_CHECKING:
    from training.trainer import Trainer

VANISHING, EXPLODING = 1e-7, 1e3


@dataclass
class Gradients(Callback):
    """Records `gradients/<part>` (norm before clipping) and `gradients/zeros` (share of entries that are 0).

    Looks at every `interval`-th step, in one fused pass on the device; what it found is read at the log step, and
    each part whose norm is below 1e-7 or above 1e3 is warned of once.
    """

    interval: int
    _warned: set[str] = field(default_factory=set)

    def on_grad(self, trainer: "Trainer", phase: str) -> None:
        if (trainer.step + 1) % self.interval:
            return
        named = gradients(trainer.model, optim.parameters(trainer.optimizers[phase]))
        parts = by_part(zip([name for name, _ in named], torch._foreach_norm([grad for _, grad in named])))
        for part, norms in parts.items():
            trainer.record(f"gradients/{part}", torch.linalg.vector_norm(torch.stack(norms)))
        zeros = torch.stack([(grad == 0).sum() for _, grad in named]).sum()
        trainer.record("gradients/zeros", zeros / sum(grad.numel() for _, grad in named))

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            part = name.removeprefix("gradients/")
            if part in (name, "zeros") or part in self._warned or VANISHING <= value <= EXPLODING:
                continue
            self._warned.add(part)
            log.warning("step %d: the gradients of %s are %s (norm %.2g)", trainer.step, part,
                        "vanishing" if value < VANISHING else "exploding", value)
