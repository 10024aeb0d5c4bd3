"""Speed, time waiting for data, and when the run will be done."""

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from stoker.training.core.figures import Batch
    from stoker.training.trainer import Trainer

RECENT = 5  # log lines: the time left follows from the median of their steps


@dataclass
class Speed(Callback):
    """Measures between log steps, evaluations left out; reads clocks only, so a GPU is never waited for.

    Gives `speed/<unit>_per_sec` for each unit of the stage, `speed/step_seconds`, `speed/data_share` (share of the
    time spent waiting for data) and `speed/eta_seconds`, evaluations to come included. Where it is known how many
    operations a sample takes, forward and backward, also `speed/tflops`; and where it is known how many a second this
    machine does in bare matrix products, `speed/peak_share` of them.

    The first steps after a start are slow, so at the first log line the time left follows from the estimate; later,
    from the last few lines and all that was done between them, such as snapshots.
    """

    flops_per_sample: float = 0.0
    peak_flops: float = 0.0
    eval_seconds: float = 0.0  # of a step's evaluations, their mean; as expected until there was one
    step_seconds: float = 0.0  # of a step, snapshots included, as expected; 0: not known
    _since: float | None = None  # start of the stretch measured
    _steps: int = 0
    _paused: float = 0.0
    _waited: float = 0.0
    _step_start: float = 0.0
    _eval_start: float = 0.0
    _evaluated: int = 0
    _lines: int = 0
    _last_line: float = 0.0  # time of the last line
    _recent: list[float] = field(default_factory=list)  # of each recent line: seconds a step, without evaluations
    _done: dict[str, int] = field(default_factory=dict)
    _first_batch: bool = False

    def on_step_start(self, trainer: "Trainer") -> None:
        self._step_start = time.perf_counter()
        self._first_batch = True
        if self._since is None:
            self._since = self._step_start

    def on_batch(self, trainer: "Trainer", batch: "Batch") -> None:
        if self._first_batch:  # all micro-batches of the step are there now
            self._waited += time.perf_counter() - self._step_start
            self._first_batch = False
        for unit, amount in trainer.stage.size(batch).items():
            self._done[unit] = self._done.get(unit, 0) + amount

    def on_step_end(self, trainer: "Trainer") -> None:
        self._steps += 1

    def on_eval_start(self, trainer: "Trainer") -> None:
        self._eval_start = time.perf_counter()

    def on_eval_end(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        seconds = time.perf_counter() - self._eval_start
        self._evaluated += 1
        self.eval_seconds += (seconds - self.eval_seconds) / self._evaluated
        if self._since is not None:
            self._paused += seconds

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        if self._since is None or not self._steps:
            return
        now = time.perf_counter()
        seconds = max(now - self._since - self._paused, 1e-9)
        each = seconds / self._steps
        whole = now - (self._last_line if self._lines else self._since) - self._paused
        self._recent = [*(self._recent if self._lines > 1 else []), whole / self._steps][-RECENT:]
        self._last_line, self._lines = now, self._lines + 1
        trainer.timings |= {f"speed/{unit}_per_sec": amount / seconds for unit, amount in self._done.items()}
        trainer.timings |= {"speed/step_seconds": each, "speed/data_share": self._waited / seconds,
                            "speed/eta_seconds": self._eta(trainer)}
        if self.flops_per_sample and self._done:
            flops = self.flops_per_sample * next(iter(self._done.values())) / seconds  # samples: a stage's first unit
            trainer.timings["speed/tflops"] = flops / 1e12
            if self.peak_flops:
                trainer.timings["speed/peak_share"] = flops / self.peak_flops
        self._since, self._steps, self._paused, self._waited, self._done = None, 0, 0.0, 0.0, {}

    def _eta(self, trainer: "Trainer") -> float:
        times = trainer.evaluations.times
        evaluations = times(trainer.steps, trainer.steps) - times(trainer.step, trainer.steps)
        each = self.step_seconds if self.step_seconds and self._lines == 1 else statistics.median(self._recent)
        return (trainer.steps - trainer.step) * each + evaluations * self.eval_seconds
