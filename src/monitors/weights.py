"""Size of the updates against the weights, by part of the model: about 1e-3 is healthy."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from monitors.alerts import log
from monitors.parts import by_part, part_of
from training.callback import Callback

if TYPE_CHECKING:
    from training.trainer import Trainer


@dataclass
class Weights(Callback):
    """Records `updates/<part>`: the norm of one step's change over the norm of the weights, on a sample of
    `sample_size` evenly spaced entries of each tensor, at every `interval`-th step.

    Warns once of a trainable part that does not move and of a frozen one that does.
    """

    interval: int
    sample_size: int
    _before: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _warned: set[str] = field(default_factory=set)

    def on_step_start(self, trainer: "Trainer") -> None:
        if (trainer.step + 1) % self.interval == 0:
            self._before = {name: sample.clone() for name, sample in self._samples(trainer)}

    def on_step_end(self, trainer: "Trainer") -> None:
        if not self._before:
            return
        after = dict(self._samples(trainer))
        changes = by_part((name, after[name] - before) for name, before in self._before.items())
        weights = by_part(after.items())
        for part, change in changes.items():
            size = torch.linalg.vector_norm(torch.cat(weights[part])).clamp_min(1e-12)
            trainer.record(f"updates/{part}", torch.linalg.vector_norm(torch.cat(change)) / size)
        self._before = {}

    def _samples(self, trainer: "Trainer") -> list[tuple[str, Tensor]]:
        return [(name, p.detach().flatten()[::max(1, p.numel() // self.sample_size)][:self.sample_size].float())
                for name, p in trainer.model.named_parameters()]

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        trainable = {part_of(name) for name, p in trainer.model.named_parameters() if p.requires_grad}
        if metrics.get("health/dropped_share", 0) > 0:  # an update that was dropped moves nothing
            return
        for name, value in metrics.items():
            part = name.removeprefix("updates/")
            if part == name or part in self._warned or (part in trainable) == (value > 0):
                continue
            self._warned.add(part)
            log.warning("step %d: %s %s", trainer.step, part,
                        "is trainable and does not move" if part in trainable else "is frozen and moved")
