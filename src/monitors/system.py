"""Memory of the process, the host and the GPU; the GPU's use and temperature; room left on the disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from stoker.monitors.alerts import Alarm, Alerts, log
from stoker.training.core.callback import Callback
from stoker.training.core.parts import left_out

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

MB = 2**20


class NotMeasured(Exception):
    """The GPU's use and temperature cannot be had on this machine."""


@dataclass
class System(Callback):
    """Looks at each log step; `folder` is where the run writes."""

    folder: Path
    alerts: Path
    _disk: Alarm = field(default_factory=Alarm)
    _measures_gpu: bool = True
    _gpu: dict[str, float] = field(default_factory=dict)  # at the start of this log step's evaluation

    def on_start(self, trainer: "Trainer") -> None:
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)  # the estimate's trials are not the run's

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        trainer.timings |= {
            "system/process_mb": psutil.Process().memory_info().rss / MB,
            "system/host_memory_percent": psutil.virtual_memory().percent,
            "system/cpu_percent": psutil.cpu_percent(),
            "system/disk_free_mb": psutil.disk_usage(str(self.folder)).free / MB,
        }
        if trainer.device.type == "cuda":
            trainer.timings |= {
                "system/gpu_allocated_mb": torch.cuda.memory_allocated(trainer.device) / MB,
                "system/gpu_peak_mb": torch.cuda.max_memory_allocated(trainer.device) / MB,
            }
            trainer.timings |= self._gpu or self._measured_gpu(trainer)
            self._gpu = {}
        self._warn(trainer)

    def on_eval_start(self, trainer: "Trainer") -> None:
        if trainer.device.type == "cuda":
            self._gpu = self._measured_gpu(trainer)  # of training: at the log line it would be that of the evaluation

    def _measured_gpu(self, trainer: "Trainer") -> dict[str, float]:
        if not self._measures_gpu:
            return {}
        try:
            return gpu_figures(trainer.device)
        except NotMeasured as error:
            self._measures_gpu = False
            log.warning("the GPU's use and temperature cannot be measured: %s", error)
            return {}

    def _warn(self, trainer: "Trainer") -> None:
        """The next snapshot may not fit."""
        absent = left_out(trainer.model)
        needed = 3 * sum(p.nbytes for name, p in trainer.model.named_parameters() if name not in absent) / MB
        free = trainer.timings["system/disk_free_mb"]
        if self._disk.rings(free < 2 * needed):
            Alerts(self.alerts).report(
                trainer.step, "disk",
                f"{free:.0f} MB are free in {self.folder}, a snapshot takes about {needed:.0f} MB: make room")


def gpu_figures(device: torch.device) -> dict[str, float]:
    """Percent of the last moments in which the GPU computed, and degrees Celsius. Raises NotMeasured."""
    try:
        import pynvml  # type: ignore[import-untyped]  # asked by torch, which knows what CUDA_VISIBLE_DEVICES means
    except ModuleNotFoundError as error:
        raise NotMeasured("nvidia-ml-py is not installed") from error
    try:
        return {"system/gpu_percent": float(torch.cuda.utilization(device)),
                "system/gpu_celsius": float(torch.cuda.temperature(device))}
    except (pynvml.NVMLError, ModuleNotFoundError, RuntimeError) as error:
        raise NotMeasured(str(error)) from error
