"""What a person reads: the lines of the log, and in a terminal a progress bar."""

import logging
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.config import ENDLESS
from stoker.daemon.table import duration, figure, number
from stoker.training.core.callback import REPORT, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class Console(Callback):
    """`Step 100/2500: loss=4.234 ppl=69.0 lr=0.000120 grad=0.81 [12.3 samples/sec, 3.1k tok/s] ETA 1h02m`"""

    order = REPORT
    _open: ExitStack = field(default_factory=ExitStack, repr=False)
    _bar: Any = field(default=None, repr=False)
    _epoch: int = 0  # the epoch whose heading was printed last
    _held: Path | None = None  # a snapshot that is logged after the line of its step

    def on_start(self, trainer: "Trainer") -> None:
        counts = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
        log.info("Model parameters: %s", f"{sum(n for n, _ in counts):,}")
        log.info("Trainable parameters: %s", f"{sum(n for n, trainable in counts if trainable):,}")
        log.info("Callbacks, in order: %s", ", ".join(callback.key for callback in trainer.callbacks))
        epoch = f", {trainer.steps_per_epoch:,} to an epoch" if trainer.steps_per_epoch < ENDLESS else ""
        log.info("%s steps%s; snapshots in %s", f"{trainer.steps:,}", epoch, trainer.snapshots.folder)
        for line in trainer.evaluations.describe():
            log.info("%s", line)
        if sys.stderr.isatty():
            self._open_bar(trainer)

    def _open_bar(self, trainer: "Trainer") -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._bar = self._open.enter_context(tqdm(total=trainer.steps, initial=trainer.step, unit="step", leave=False))
        self._open.enter_context(logging_redirect_tqdm())

    def on_step_start(self, trainer: "Trainer") -> None:
        self._print_heading(trainer, trainer.step + 1)

    def _print_heading(self, trainer: "Trainer", step: int) -> None:
        """Print the heading of the epoch of a step (counted from 1), unless it was printed last."""
        epoch = (step - 1) // trainer.steps_per_epoch + 1
        if epoch != self._epoch:
            self._epoch = epoch
            log.info("Epoch %d/%d:", epoch, math.ceil(trainer.steps / trainer.steps_per_epoch))

    def on_step_end(self, trainer: "Trainer") -> None:
        if self._bar is not None:
            self._bar.update(trainer.step - self._bar.n)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self._print_heading(trainer, trainer.step)  # a resumed run may log a step before it makes one
        speed, left = rates(trainer), trainer.timings.get("speed/eta_seconds")
        log.info("Step %d/%d: %s%s%s", trainer.step, trainer.steps, _figures(metrics), f" [{speed}]" if speed else "",
                 f" ETA {duration(left)}" if left is not None else "")
        for each in trainer.evaluations.declared:
            if scores := words(metrics, f"{each.name}/"):
                log.info("  -> %s: %s", title("validation", each.name), scores)

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """The last step is saved twice, before its evaluation and after it: only the second time is logged."""
        if trainer.logged_step < trainer.step == trainer.steps and path == trainer.snapshots.at_step(trainer.step):
            self._held = path
            return
        if path == self._held:
            self._held = None
        log.info("  -> Saved snapshot: %s", path)

    def close(self, trainer: "Trainer") -> None:
        if self._held:  # the evaluation was abandoned, or failed
            log.info("  -> Saved snapshot: %s", self._held)
        self._open.close()


def _figures(metrics: dict[str, float]) -> str:
    parts = [words(metrics, "train/"), f"lr={number(metrics['lr'], 6)}"]
    parts += [f"{name.replace('grad_norm', 'grad')}={number(value, 2)}" for name, value in metrics.items()
              if name == "grad_norm" or name.endswith("/grad_norm")]
    return " ".join(part for part in parts if part)


def title(split: str, evaluation: str) -> str:
    """What stands before the scores of an evaluation: `Validation`; of another one than "eval" `Validation, digits`."""
    return split.capitalize() + (f", {evaluation}" if evaluation != "eval" else "")


def words(metrics: Mapping[str, float], prefix: str, intervals: Mapping[str, tuple[float, float]] = {}) -> str:
    """The figures of that prefix as they are logged, `loss=4.234 ppl=69.0`; those that have a confidence interval with
    it: `wer=12.3% (95%: 11.0-13.9)`."""
    return " ".join(f"{name.removeprefix(prefix)}={figure(name, value)}"
                    + (f" (95%: {_between(name, *intervals[name])})" if name in intervals else "")
                    for name, value in metrics.items() if name.startswith(prefix))


def _between(name: str, low: float, high: float) -> str:
    return f"{figure(name, low).removesuffix('%')}-{figure(name, high).removesuffix('%')}"


def rates(trainer: "Trainer") -> str:
    """The speed of the last stretch, "12.3 samples/sec, 3.1k tok/s", or ''."""
    found = [(name.removeprefix("speed/").removesuffix("_per_sec"), value) for name, value in trainer.timings.items()
             if name.endswith("_per_sec")]
    return ", ".join(f"{number(value, 1)} {unit}/sec" if i == 0 else f"{_thousands(value)} {unit}/s"
                     for i, (unit, value) in enumerate(found))


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
