"""The metrics as TensorBoard curves, what was made to be looked at, and the options beside what came of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams, text

from stoker import config
from stoker.training.core.callback import REPORT, Callback
from stoker.training.core.media import Histogram, Media, Picture, Sound, Text

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

FLUSH_SECONDS = 10

# The page "Custom scalars": what to look at first. A chart is a list of patterns of tags.
CHARTS = {
    "loss": ["Multiline", [r"^train/(.+/)?loss$", r"^eval/loss$"]],
    "learning rate": ["Multiline", [r"^lr$"]],
    "norm of the gradients": ["Multiline", [r"^(.+/)?grad_norm$", r"^gradients/(?!zeros$)"]],
    "size of an update against the weights (1e-3 is healthy)": ["Multiline", [r"^updates/"]],
    "seconds a step": ["Multiline", [r"^speed/step_seconds$"]],
    "shares of time and machine": ["Multiline", [r"^speed/.+_share$", r"^speed/goodput$"]],
}


@dataclass
class TensorBoard(Callback):
    """A resumed run makes TensorBoard forget the steps that are repeated, so each curve is one clean line.

    The options on the page "HParams" are those that make the run what it is. None of them can change when it is
    resumed: hence they are written once, at the beginning, and a run that was killed is in the table too. Its figures
    are curves: `eval/loss` is the last evaluation, `eval/best_loss` the best.
    """

    order = REPORT
    folder: Path
    _writer: SummaryWriter | None = field(default=None, repr=False)
    _before: set[Path] | None = field(default=None, repr=False)  # files that were there, until the writer has written
    _unsure: list[tuple[int, dict[str, float]]] = field(default_factory=list, repr=False)  # step, figures: not on disk

    def on_start(self, trainer: "Trainer") -> None:
        goes_on = any(self.folder.iterdir())
        writer = self._open(trainer.logged_step + 1 if goes_on else 0)  # 0: readers take this first one for no restart
        if not goes_on:
            self._introduce(trainer, writer)

    def _open(self, first: int) -> SummaryWriter:
        """What stands there of the step `first` and later is forgotten."""
        self._before = set(self.folder.iterdir())
        self._writer = SummaryWriter(str(self.folder), purge_step=first, flush_secs=FLUSH_SECONDS)
        return self._writer

    def _introduce(self, trainer: "Trainer", writer: SummaryWriter) -> None:
        # Without the description of an experiment TensorBoard finds out by itself which options differ between the runs
        # shown, and puts these first.
        _, options, _ = hparams({"stage": trainer.stage.name, **defining(trainer.cfg)}, {})
        writer._get_file_writer().add_summary(options)
        best = trainer.stage.best[0]
        own = {best: ["Multiline", [f"^{best}$"]]} if best != "eval/loss" else {}
        writer.add_custom_scalars({"Overview": {**own, **CHARTS}})
        writer.flush()

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """What could not be written is written again with the next line, by a new writer: the old one is of no more
        use then. Of what is looked at, only figures are kept for it."""
        self._unsure.append((trainer.step, figures(trainer, metrics)))
        self._write(trainer.step, trainer.media)

    def on_stop(self, trainer: "Trainer", reason: str) -> None:
        if self._unsure:
            self._write(trainer.step, {})

    def _write(self, step: int, media: dict[str, Media]) -> None:
        try:
            writer = self._writer or self._open(self._unsure[0][0])
            for logged, values in self._unsure:
                for name, value in values.items():
                    writer.add_scalar(name, value, logged)
            for name, shown in media.items():
                _add(writer, name, shown, step)
            writer.flush()
            self._unsure, self._before = [], None
        except OSError:
            self._writer = None
            for path in set(self.folder.iterdir()) - (self._before or set(self.folder.iterdir())):
                path.unlink()  # of a writer that has brought nothing to disk: it could be read after the next one's
            raise

    def close(self, trainer: "Trainer") -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def figures(trainer: "Trainer", metrics: dict[str, float]) -> dict[str, float]:
    """Every number of a log step, by its tag."""
    best = {best_of(trainer.stage.best[0]): trainer.best} if trainer.stage.best[0] in metrics else {}
    return {**metrics, **best, **trainer.timings}


def best_of(tag: str) -> str:
    """`eval/best_loss` for `eval/loss`."""
    group, _, name = tag.rpartition("/")
    return f"{group}/best_{name}"


def defining(cfg: Any) -> dict[str, Any]:
    """The options without which it would be another run; those that are not set are left out."""
    options = {name: getattr(cfg, name) for name, (_, spec, _) in config.fields(type(cfg)).items()
               if not spec.may_change}
    return {name: str(value) if isinstance(value, bool) else value for name, value in options.items()
            if value not in (None, "")}


def _add(writer: SummaryWriter, name: str, media: Media, step: int) -> None:
    if isinstance(media, Text):
        summary = text(name, _verbatim(media.content))
        summary.value[0].tag = name  # torch would have it end in /text_summary
        writer._get_file_writer().add_summary(summary, step)
    elif isinstance(media, Picture):
        writer.add_image(name, media.pixels, step, dataformats="HWC")
    elif isinstance(media, Sound):
        writer.add_audio(name, np.clip(media.samples, -1, 1), step, sample_rate=media.rate)
    elif isinstance(media, Histogram):
        middles = (media.edges[:-1] + media.edges[1:]) / 2
        writer.add_histogram_raw(name, min=media.edges[0], max=media.edges[-1], num=media.counts.sum(),
                                 sum=media.counts @ middles, sum_squares=media.counts @ middles**2,
                                 bucket_limits=media.edges[1:].tolist(), bucket_counts=media.counts.tolist(),
                                 global_step=step)


def _verbatim(text: str) -> str:
    """As Markdown that shows the text as it is."""
    return "\n".join("    " + line for line in text.splitlines() or [""])
