"""Decides which snapshots stay when a new one is whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stoker.training.core.callback import ACT, Callback

if TYPE_CHECKING:
    from pathlib import Path

    from stoker.training.trainer import Trainer


@dataclass
class Rotation(Callback):
    """Keeps the last `last` snapshots (0: all), those of the best `best` evaluations by the stage's metric, and those
    of every `every`th step (0: off). With `best` above 1 a snapshot is taken at each evaluation that is among the best
    so far.

    Whatever it decides, the saver keeps what the run itself may need (`Saver.keep_only`). A stage replaces this policy
    by a subclass with a `keep` of its own, among its `callbacks`.
    """

    order = ACT
    last: int
    best: int = 1
    every: int = 0
    scores: dict[int, float] = field(default_factory=dict)  # of the best evaluations, by step; smaller is better

    @property
    def key(self) -> str:
        return "Rotation"  # also of a subclass, which takes its place

    def keep(self, trainer: "Trainer", steps: Sequence[int]) -> set[int]:
        """Which of the snapshots stay that there are, by their steps, oldest first."""
        if not self.last:
            return set(steps)
        every = {step for step in steps if self.every and step and step % self.every == 0}
        return {*steps[-self.last:], *self.scores, *every}

    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        name, mode = trainer.stage.best
        value = metrics.get(name, math.nan)
        if math.isnan(value):
            return
        scores = self.scores | {trainer.step: value if mode == "min" else -value}
        self.scores = {step: scores[step] for step in sorted(scores, key=lambda step: (scores[step], step))[:self.best]}
        if self.best > 1 and trainer.step in self.scores:  # the very best is saved anyway
            trainer.ask("save", "among the best")

    def on_save(self, trainer: "Trainer", path: "Path") -> None:
        trainer.saver.keep_only(self.keep(trainer, trainer.snapshots.steps()))

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = dict(state.get("scores", {}))
