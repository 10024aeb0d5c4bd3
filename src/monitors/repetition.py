"""Reports whether a resumed run computes the figures that it had recorded before it was interrupted."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.daemon.journal import Journal, plain
from stoker.training.core import device as devices
from stoker.training.core.callback import REPORT, Callback

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)

ROUNDING = 1e-4  # relative: more than this no other order of the same additions makes
NAMED = 3  # figures


@dataclass
class Repetition(Callback):
    """Compares the first log line after a resume with that of the same step in the journal, if one is there.

    Both begin at the same log line, the last before the snapshot, so they must hold the same figures to the last bit,
    but for those of monitors that were switched on or off. It says what it found, and stops nothing.
    """

    order = REPORT - 1  # the figures are complete; the journal still holds what came after the snapshot
    metrics: Path
    changed: Sequence[str]  # the lines of the receipt
    _recorded: dict[str, Any] | None = None
    _from: int = 0  # the step after which the first log interval begins

    def on_start(self, trainer: "Trainer") -> None:
        self._from = trainer.logged_step
        self._recorded = next((row for row in Journal(self.metrics).rows() if row["step"] > self._from), None)

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        recorded, self._recorded = self._recorded, None
        if recorded is None or recorded["step"] != trainer.step:  # lines come at another interval now
            return
        if any(entry["step"] > self._from for entry in trainer.ledger):  # rows are left out that were not then
            return
        now = json.loads(json.dumps(plain(dict(metrics))))
        different = [name for name in now if name in recorded and now[name] != recorded[name]]
        rounded = all(_is_close(recorded[name], now[name]) for name in different)
        why = devices.to_rounding(trainer.device, trainer.stage.nondeterministic)
        if not different or (rounded and why):
            log.info("step %d came out as recorded before: %s", trainer.step,
                     f"to rounding ({why})" if why else "bit for bit")
            return
        named = ", ".join(f"{name} {recorded[name]!r} then, {now[name]!r} now" for name in different[:NAMED])
        if len(different) > NAMED:
            named += f", and {len(different) - NAMED} more"
        log.warning("step %d did not come out as recorded before: %s. %s", trainer.step, named,
                    self._reason(rounded=rounded, nondeterministic=why))

    def _reason(self, *, rounded: bool, nondeterministic: str) -> str:
        why = f"since then: {'; '.join(self.changed)}" if self.changed else (
            "nothing that the receipt compares has changed; "
            + (f"{nondeterministic}, and such differences grow with each step" if nondeterministic else
               "with more than one thread last bits may differ now and then"))
        return f"{'These are last bits' if rounded else 'This is more than rounding'} ({why})"


def _is_close(then: Any, now: Any) -> bool:
    return (isinstance(then, float) and isinstance(now, float)
            and math.isclose(then, now, rel_tol=ROUNDING, abs_tol=ROUNDING**2))
