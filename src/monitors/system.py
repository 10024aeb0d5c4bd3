"""Memory of the process, the host and the GPU; room left on the disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from monitors.alerts import log
from training.callback import Callback

if TYPE_CHECKING:
    from training.trainer import Trainer

MB = 2**20


@dataclass
class System(Callback):
    """Looks at each log step; `folder` is where the run writes."""

    folder: Path
    _warned: bool = False

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
        self._warn(trainer)

    def _warn(self, trainer: "Trainer") -> None:
        """Once: the next snapshot may not fit."""
        needed = 3 * sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / MB
        if trainer.timings["system/disk_free_mb"] < 2 * needed and not self._warned:
            self._warned = True
            log.warning("%.0f MB are free in %s, a snapshot takes about %.0f MB: make room", trainer.timings[
                "system/disk_free_mb"], self.folder, needed)
