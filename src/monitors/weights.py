"""Size of the updates against the weights, by part of the model, and how far they have come since the start."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stoker.monitors import histograms
from stoker.monitors.alerts import Alerts, log
from stoker.monitors.parts import by_part, entries, part_of
from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

ADVICE = {
    "is trainable and does not move": "does it belong to a phase's parameters, and does the loss depend on it?",
    "is frozen and moved": "something else writes to it; what was trained on it so far may be worth nothing",
}


@dataclass
class Weights(Callback):
    """Records `updates/<part>`, the norm of one step's change over the norm of the weights (about 1e-3 is healthy),
    and `weights/<part>/drift`, the same of the change since the run began, at every `interval`-th step; shows a
    histogram.

    All of it on a sample of `sample_size` evenly spaced entries of each tensor. Warns once of a trainable part that
    has not moved since the run began, and of a frozen one that moves. (Where the learning rate goes to 0, a part that
    has moved before may stand still: its updates are then smaller than the last digit of its weights.)
    """

    interval: int
    sample_size: int
    alerts: Path
    _first: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _before: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _entries: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _warned: set[str] = field(default_factory=set)

    def on_start(self, trainer: "Trainer") -> None:
        now = self._sampled(trainer)
        if {name: len(own) for name, own in now.items()} != {name: len(own) for name, own in self._first.items()}:
            if self._first:
                log.warning("drift counts from step %d on: other weights are sampled than before", trainer.step)
            self._first = now
        self._first = {name: own.to(trainer.device, copy=True) for name, own in self._first.items()}
        self._entries = {part: own.to(trainer.device) for part, own in self._entries.items()}

    def on_step_start(self, trainer: "Trainer") -> None:
        if (trainer.step + 1) % self.interval == 0:
            self._before = {name: own.clone() for name, own in self._sampled(trainer).items()}

    def on_step_end(self, trainer: "Trainer") -> None:
        if not self._before:
            return
        after = self._sampled(trainer)
        self._entries = {part: torch.cat(own) for part, own in by_part(after.items()).items()}
        for tag, since in (("updates/{}", self._before), ("weights/{}/drift", self._first)):
            changes = by_part((name, after[name] - then) for name, then in since.items())
            for part, change in changes.items():
                size = torch.linalg.vector_norm(self._entries[part]).clamp_min(1e-12)
                trainer.record(tag.format(part), torch.linalg.vector_norm(torch.cat(change)) / size)
        self._before = {}

    def _sampled(self, trainer: "Trainer") -> dict[str, Tensor]:
        return {name: entries(p, self.sample_size) for name, p in trainer.model.named_parameters()}

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        histograms.show(trainer, "weights", self._entries)
        self._entries = {}
        trainable = {part_of(name) for name, p in trainer.model.named_parameters() if p.requires_grad}
        if any(value > 0 for name, value in metrics.items() if name.endswith(("/dropped_share", "/overflow_share"))):
            return  # an update that was dropped moves nothing
        for name, value in metrics.items():
            part = name.removeprefix("updates/")
            if part == name or part in self._warned or (part in trainable) == (value > 0):
                continue
            if part in trainable and metrics.get(f"weights/{part}/drift"):
                continue
            self._warned.add(part)
            what = "is trainable and does not move" if part in trainable else "is frozen and moved"
            Alerts(self.alerts).report(trainer.step, "weights", f"{part} {what}: {ADVICE[what]}", part=part)

    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self._first), "warned": sorted(self._warned), "entries": dict(self._entries)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._warned = dict(state.get("first", {})), set(state.get("warned", ()))
        self._entries = dict(state.get("entries", {}))  # those that no log line has shown yet
