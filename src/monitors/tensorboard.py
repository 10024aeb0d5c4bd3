"""The metrics as TensorBoard scalars."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

from training.callback import REPORT, Callback

if TYPE_CHECKING:
    from training.trainer import Trainer

FLUSH_SECONDS = 10


@dataclass
class TensorBoard(Callback):
    """A resumed run tells TensorBoard to forget the steps that are done again, so each curve is one clean line."""

    order = REPORT
    folder: Path
    _writer: SummaryWriter | None = field(default=None, repr=False)

    def on_start(self, trainer: "Trainer") -> None:
        purge = trainer.logged_step + 1 if any(self.folder.iterdir()) else None
        self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=FLUSH_SECONDS)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        assert self._writer is not None
        for name, value in (metrics | trainer.timings).items():
            self._writer.add_scalar(name, value, trainer.step)

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        assert self._writer is not None
        self._writer.flush()

    def close(self, trainer: "Trainer") -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
