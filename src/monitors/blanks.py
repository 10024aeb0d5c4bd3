"""Warns when a recognizer trained by CTC outputs nothing: the blank is likeliest in every frame, for long."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.monitors.alerts import Alarm, Alerts
from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

ONLY = 0.995  # share of the frames: less says something
SHARE_OF_RUN, FEWEST_STEPS = 0.1, 200  # for which it must hold: each training by CTC begins so


@dataclass
class Blanks(Callback):
    """Looks at `train/blank_share`, the share of frames whose likeliest unit is the blank."""

    alerts: Path
    _since: int | None = None  # the step of the first log line in which there were only blanks
    _silent: Alarm = field(default_factory=Alarm)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        if metrics.get("train/blank_share", 0.0) < ONLY:
            self._since = None
        elif self._since is None:
            self._since = trainer.step
        long = max(FEWEST_STEPS, SHARE_OF_RUN * trainer.steps)
        if self._silent.rings(self._since is not None and trainer.step - self._since >= long):
            Alerts(self.alerts).report(
                trainer.step, "only blanks", f"since step {self._since} the model has heard nothing but blanks: look "
                "whether the texts belong to the recordings (samples/ has both); try a longer --warmup_steps, --lr "
                "lower and higher, a smaller --downsample_time, less --mask_bands and --mask_time")

    def state_dict(self) -> dict[str, Any]:
        return {"since": self._since, "silent": self._silent.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._since, self._silent.held = state["since"], state["silent"]
