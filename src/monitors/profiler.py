"""Writes a profiler's trace of a few steps when it was asked for: which operations took how long."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stoker import files
from stoker.training.core.callback import OBSERVE, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class Profiler(Callback):
    """While `trainer.traced_until` is ahead, torch.profiler records the steps, from the first `on_step_start` to the
    last `on_step_end`, or to the end of the sitting. Then `trace_step_<first>.json` is written to `folder`: Chrome's
    trace format, for chrome://tracing or Perfetto.
    """

    order = OBSERVE
    folder: Path
    _profiler: Any = None
    _first: int = 0  # step, from 1

    def on_step_start(self, trainer: "Trainer") -> None:
        if self._profiler is None and trainer.step < trainer.traced_until:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if trainer.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler, self._first = torch.profiler.profile(activities=activities), trainer.step + 1
            self._profiler.start()

    def on_step_end(self, trainer: "Trainer") -> None:
        if trainer.step >= trainer.traced_until:
            self._write()

    def close(self, trainer: "Trainer") -> None:
        self._write()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        path = self.folder / f"trace_step_{self._first:08d}.json"
        half = files.hidden(path)
        try:
            profiler.export_chrome_trace(str(half))
            os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)
        log.info("Trace: %s (open it in chrome://tracing or Perfetto)", path)
