"""An exponential moving average (EMA) of the weights, which is evaluated and exported in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stoker.training.core.callback import ACT, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer


@dataclass
class EMA(Callback):
    """Exponential moving average (Polyak & Juditsky 1992) of the trainable weights.

    After update n the average moves by 1 - min(decay, (1 + n) / (10 + n)) toward the weights, so that it does not
    start from noise. Training sees the weights themselves; evaluations and what follows from them see the average.
    """

    order = ACT
    decay: float
    updates: int = 0
    average: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _held: list[Tensor] = field(default_factory=list, repr=False)

    def on_start(self, trainer: "Trainer") -> None:
        self.average = {name: self.average.get(name, p).detach().to(p.device, copy=True)
                        for name, p in trainable(trainer.model)}

    @torch.no_grad()
    def on_step_end(self, trainer: "Trainer") -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [p for _, p in trainable(trainer.model)], 1 - decay)

    def on_eval_start(self, trainer: "Trainer") -> None:
        self._swap_in(trainer.model)

    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self._swap_out(trainer.model)

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the average for its weights."""
        self._swap_in(model)
        try:
            yield
        finally:
            self._swap_out(model)

    @torch.no_grad()
    def _swap_in(self, model: nn.Module) -> None:
        self._held = [p.clone() for _, p in trainable(model)]
        for name, p in trainable(model):
            p.copy_(self.average[name])

    @torch.no_grad()
    def _swap_out(self, model: nn.Module) -> None:
        for (_, p), held in zip(trainable(model), self._held, strict=True):
            p.copy_(held)
        self._held = []

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.updates, self.average = state["updates"], state["average"]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
