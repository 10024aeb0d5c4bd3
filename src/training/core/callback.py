"""The moments of a run, and what may be done at each of them.

    on_build                  the model exists on its device; its optimizers do not; nothing is restored, and a new
                              model is not initialized from data yet
    on_start                  everything exists; a snapshot, if any, is restored
    while step < steps:
        on_step_start         no batch of this step is fetched yet; step = updates done
        for batch in micro_batches:
            on_batch          on device, before any forward; the phases share the batches
        for phase in phases:
            for batch in micro_batches:
                on_loss       after the forward, before the backward
            on_grad           gradients complete and divided by the count; not clipped, not applied
        on_step_end           all phases updated, step advanced
        on_eval_start         } only if an evaluation was asked for;
        on_eval_end           } metrics are empty if a stop abandoned it, or the memory did not suffice
        on_log                only at a log step, after the evaluation: metrics are plain floats now
        on_save               when a snapshot is whole and verified on disk: those are written meanwhile, so steps later
                              (one of step 0 follows on_start, one comes before the last evaluation, which may need
                              too much memory, and the last one before on_stop)
        on_trouble            when `trainer.saver.trouble` changes: why no snapshot can be written, '' once one is
    on_stop | on_error        the loop ended by itself | an exception left it
    close                     always, in reverse order

A callback never evaluates, saves or stops: it asks (`trainer.ask`), and the loop acts after `on_step_end`, in
the order of the lines above. So a snapshot of step N holds the state of callbacks that have all seen step N.

What runs at OBSERVE or later is a monitor: if it raises, it is reported, switched off, and training goes on.
What runs earlier has a hand in the training: if it raises, the run ends.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from stoker.training.core.figures import Batch, Ratio
    from stoker.training.trainer import Trainer

# Bands of `order`. Lower runs first; ties keep their place in the list.
SHAPE, ACT, OBSERVE, REPORT = 0, 20, 50, 80

EVENTS = (
    "on_build", "on_start", "on_step_start", "on_batch", "on_loss", "on_grad", "on_step_end", "on_eval_start",
    "on_eval_end", "on_log", "on_save", "on_trouble", "on_stop", "on_error", "close",
)


class Callback:
    """Base of everything that plugs into the trainer; override what you need."""

    order: ClassVar[int] = OBSERVE

    @property
    def key(self) -> str:
        """Name of this callback's state in a snapshot; unique in a run."""
        return type(self).__name__

    @property
    def is_monitor(self) -> bool:
        return self.order >= OBSERVE

    def on_build(self, trainer: "Trainer") -> None: ...
    def on_start(self, trainer: "Trainer") -> None: ...
    def on_step_start(self, trainer: "Trainer") -> None: ...
    def on_batch(self, trainer: "Trainer", batch: "Batch") -> None: ...
    def on_loss(self, trainer: "Trainer", phase: str, loss: "Ratio") -> None: ...
    def on_grad(self, trainer: "Trainer", phase: str) -> None: ...
    def on_step_end(self, trainer: "Trainer") -> None: ...
    def on_eval_start(self, trainer: "Trainer") -> None: ...
    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None: ...
    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None: ...
    def on_save(self, trainer: "Trainer", path: Path) -> None: ...
    def on_trouble(self, trainer: "Trainer") -> None: ...
    def on_stop(self, trainer: "Trainer", reason: str) -> None: ...
    def on_error(self, trainer: "Trainer", error: BaseException) -> None: ...
    def close(self, trainer: "Trainer") -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.key} keeps no state, but was given {sorted(state)}")


def in_order(callbacks: list[Callback]) -> list[Callback]:
    """The callbacks as they will run. Raises ValueError if two share a key."""
    keys = [callback.key for callback in callbacks]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"two callbacks share a key: {sorted(twice)}")
    return sorted(callbacks, key=lambda callback: callback.order)  # stable: ties keep their place


def listeners(callbacks: list[Callback]) -> dict[str, list[Callback]]:
    """For each event, in order, the callbacks that override it."""
    ordered = in_order(callbacks)
    table = {
        event: [c for c in ordered if getattr(type(c), event) is not getattr(Callback, event)] for event in EVENTS
    }
    table["close"].reverse()
    return table
