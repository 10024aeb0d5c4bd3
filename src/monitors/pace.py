"""Warns when a run becomes slow, and when its GPU idles or gets hot."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.monitors.alerts import Alarm, Alerts
from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

WINDOW, ENOUGH = 50, 5  # log lines of which the usual speed is the median
SLOW_LINES, WAITING_LINES, IDLE_LINES = 3, 5, 5  # in a row
IDLE_PERCENT, HOT_CELSIUS = 80, 85
WAITING = 0.2  # share of the time spent waiting for data, from which the data are to blame


@dataclass
class Pace(Callback):
    """Looks at each log line's timings, so it stands behind what measures them. Nothing of it is kept in a snapshot:
    another sitting may be on another machine.

    Slow: three lines in a row with less than half the usual steps a second. Waiting: five lines in a row with more
    than a fifth of the time spent waiting for data. Idle: a GPU used less than 80 % at five lines in a row. Hot: above
    85 degrees.
    """

    alerts: Path
    _usual: list[float] = field(default_factory=list)  # seconds a step
    _slow: Alarm = field(default_factory=lambda: Alarm(SLOW_LINES))
    _waiting: Alarm = field(default_factory=lambda: Alarm(WAITING_LINES))
    _idle: Alarm = field(default_factory=lambda: Alarm(IDLE_LINES))
    _hot: Alarm = field(default_factory=Alarm)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        timings = trainer.timings
        waiting = timings.get("speed/data_share", 0.0)
        if "speed/step_seconds" in timings:
            self._judge_speed(trainer, timings["speed/step_seconds"], waiting)
        if "system/gpu_percent" in timings:
            self._judge_gpu(trainer, timings["system/gpu_percent"], timings["system/gpu_celsius"], waiting)

    def _judge_speed(self, trainer: "Trainer", seconds: float, waiting: float) -> None:
        usual = statistics.median(self._usual) if len(self._usual) >= ENOUGH else seconds
        if self._slow.rings(seconds > 2 * usual):
            cause = ("the data come too slowly: raise --num_workers, look at the disk" if waiting > WAITING else
                     "look for other programs (./run/ps.sh, top), a processor that is hot, a machine on battery")
            self._report(trainer, "slow", f"a step takes {seconds:.3g} s, usual are {usual:.3g} s; {waiting:.0%} of "
                         f"the time is spent waiting for data: {cause}")
        self._usual = [*self._usual, seconds][-WINDOW:]
        if self._waiting.rings(waiting > WAITING):
            self._report(trainer, "waiting", f"{waiting:.0%} of the time is spent waiting for data: raise "
                         "--num_workers, look at the disk")

    def _judge_gpu(self, trainer: "Trainer", percent: float, celsius: float, waiting: float) -> None:
        if self._idle.rings(percent < IDLE_PERCENT):
            cause = "--num_workers" if waiting > WAITING else "--batch_size, and lower --grad_accum_steps for it"
            self._report(trainer, "gpu idle", f"the GPU is used {percent:.0f} % only; {waiting:.0%} of the time is "
                         f"spent waiting for data: raise {cause}")
        if self._hot.rings(celsius > HOT_CELSIUS):
            self._report(trainer, "gpu hot", f"the GPU has {celsius:.0f} degrees and will slow itself down: see to its "
                         "air, or lower its power limit (nvidia-smi -pl)")

    def _report(self, trainer: "Trainer", kind: str, message: str) -> None:
        Alerts(self.alerts).report(trainer.step, kind, message)
