"""How much of a run's time went into steps that count."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer


@dataclass
class Goodput(Callback):
    """Gives `speed/goodput`: the seconds of all steps that stand in timings.jsonl over all seconds that trainers of
    this run have lived (status.json; up to a second old).

    What lessens it: preparation, evaluations, snapshots, and steps that were done twice because of a kill. Neither sum
    is kept in a snapshot, so what a kill threw away stays counted as lived, and as nothing else.
    """

    run: RunDir
    _counted: float = 0.0  # seconds
    _last: int = 0  # step up to which they are counted

    def on_start(self, trainer: "Trainer") -> None:
        for row in Journal(self.run.timings).rows():
            if row["step"] <= trainer.logged_step:  # later ones will be done, and written, again
                self._count(row["step"], row.get("speed/step_seconds", 0.0))

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        self._count(trainer.step, trainer.timings.get("speed/step_seconds", 0.0))
        busy = self.run.status().busy_seconds
        if busy:
            trainer.timings["speed/goodput"] = min(1.0, self._counted / busy)

    def _count(self, step: int, seconds_each: float) -> None:
        self._counted, self._last = self._counted + (step - self._last) * seconds_each, step
