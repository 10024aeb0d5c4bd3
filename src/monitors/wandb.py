"""The same figures at Weights & Biases; kept on disk where it cannot be reached."""

import hashlib
import html
import logging
import os
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from stoker import config, files
from stoker.daemon.rundir import RunDir
from stoker.data.sources import network
from stoker.monitors.samples import wav
from stoker.monitors.tensorboard import figures
from stoker.training.core.callback import REPORT, Callback
from stoker.training.core.media import Histogram, Media, Picture, Sound, Text

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)

START_SECONDS, END_SECONDS = 15, 30  # that the server may take
SERVICE = "wandb-core"  # the process that sends the figures


@dataclass
class WandB(Callback):
    """Sends every log step, under the tags that TensorBoard shows. What is sent goes through a process of wandb's own,
    so a slow or lost connection never holds the training up.

    A run that goes on is the same run there: its name is drawn from ours. W&B takes no step a second time, so steps
    are a figure of each row, the one all curves are drawn over: what was done twice because of a kill stands there
    twice, with equal values.
    """

    order = REPORT
    run: RunDir
    _run: Any = field(default=None, repr=False)
    _failed: bool = False

    def on_start(self, trainer: "Trainer") -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # what it prints would stand in the log without a time
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports to its makers
        import wandb

        logging.getLogger("wandb").propagate = False  # it has a log of its own
        settings = wandb.setup().settings
        mode, why = settings.mode, f"WANDB_MODE is {settings.mode}"
        if mode == "online" and (why := _why_offline(settings.base_url)):
            mode = "offline"
        try:
            self._run = self._init(trainer, mode)
        except wandb.Error as error:
            why = str(error).splitlines()[0]
            wandb.teardown()  # its service holds the run that could not begin
            self._run = self._init(trainer, "offline")
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            log.warning("Weights & Biases: kept on disk (%s); send it with: %s", why, self._sync_command())
        else:
            log.info("Weights & Biases: %s", self._run.url or why)

    def _init(self, trainer: "Trainer", mode: Any) -> Any:
        import wandb

        born = f"{self.run.name} {self.run.status().created}"
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True,
                               init_timeout=START_SECONDS, finish_timeout=END_SECONDS, finish_timeout_raises=True)
        return wandb.init(project=os.environ.get("WANDB_PROJECT", "stoker"), name=self.run.name, mode=mode,
                          id=hashlib.sha256(born.encode()).hexdigest()[:12], resume="allow", dir=str(self.run.path),
                          config=config.to_json(trainer.cfg), allow_val_change=True, settings=quiet)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        with tempfile.TemporaryDirectory() as folder:  # it copies files at once
            media = {name: _of(media, Path(folder) / f"{i}") for i, (name, media) in enumerate(trainer.media.items())}
            self._run.log({"step": trainer.step, **figures(trainer, metrics), **media})

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        self._failed = True

    def close(self, trainer: "Trainer") -> None:
        """Send what is left. A service that does not answer is ended: what it has is on disk."""
        if self._run is None:
            return
        run, self._run = self._run, None
        problems: list[str] = []
        ending = threading.Thread(target=_finish, args=(run, int(self._failed), problems), daemon=True)
        ending.start()
        ending.join(END_SECONDS + 5)
        if ending.is_alive():
            for child in psutil.Process().children():
                if child.name() == SERVICE:
                    child.kill()
            ending.join(5)
        if problems:
            log.warning("Weights & Biases: not everything was sent (%s); send it with: %s", problems[0],
                        self._sync_command())

    def _sync_command(self) -> str:
        return f"{Path(sys.executable).with_name('wandb')} sync {self.run.path}/wandb/*run-*"


def _why_offline(server: str) -> str:
    """Why nothing can be sent, or ''. Found in seconds, without asking on a terminal."""
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    try:
        if wbauth.authenticate_session(host=server, source="stoker", prompt=False) is None:
            return "there is no API key (WANDB_API_KEY, or wandb login)"
    except AuthenticationError as error:
        return str(error)
    why = network.unreachable(server)
    return f"{server} cannot be reached: {why}" if why else ""


def _finish(run: Any, exit_code: int, problems: list[str]) -> None:
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    for end in (lambda: run.finish(exit_code), wandb.teardown):
        try:
            end()
        except (wandb.Error, TimeoutError, ConnectionError, HandleAbandonedError, MailboxClosedError) as error:
            problems.append(str(error) or "its service ended before")


def _of(media: Media, path: Path) -> Any:
    """As W&B shows it; `path`, without ending, is where a file may be written for it."""
    import wandb

    if isinstance(media, Text):
        return wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(media.content)}</pre>")
    if isinstance(media, Picture):
        return wandb.Image(media.pixels)
    if isinstance(media, Sound):
        sound = path.with_suffix(".wav")
        files.write(sound, lambda file: wav(file, media), sync=False)
        return wandb.Audio(str(sound))
    assert isinstance(media, Histogram)
    return wandb.Histogram(np_histogram=(media.counts.tolist(), media.edges.tolist()))
