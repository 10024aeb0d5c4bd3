"""Shows how evenly a mixture of experts is used, and warns of experts that get no tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.monitors.alerts import Alarm, Alerts
from stoker.training.core.callback import Callback

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.training.trainer import Trainer

DEAD = 0.01  # of the tokens that an expert would get if all got the same number
PATIENCE = 3  # log lines in a row
NAMED = 5


@dataclass
class ExpertLoad(Callback):
    """Adds the load of the least and of the most used expert of all layers to each log line: 1 is an even load, of
    which each expert gets the same number of tokens; it is that of the last step.

    `loads` gives, by the name of a layer, how many tokens each of its experts got (E,), in any unit."""

    alerts: Path
    loads: "Callable[[Any], Mapping[str, Tensor]]"
    _dead: Alarm = field(default_factory=lambda: Alarm(PATIENCE))

    def on_log(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        layers = {name: load / load.mean() for name, load in self.loads(trainer.model).items()}
        metrics["experts/least_load"] = min(float(load.min()) for load in layers.values())
        metrics["experts/most_load"] = max(float(load.max()) for load in layers.values())
        dead = [f"{name} expert {number}" for name, load in layers.items()
                for number in (load < DEAD).nonzero()[:, 0].tolist()]
        if self._dead.rings(bool(dead)):
            named = ", ".join(dead[:NAMED]) + (f" and {len(dead) - NAMED} more" if len(dead) > NAMED else "")
            Alerts(self.alerts).report(
                trainer.step, "dead experts", f"these experts get almost no tokens and learn nothing: {named}. Raise "
                "--balance_weight, lower --lr, or take fewer experts (--num_experts)")

    def state_dict(self) -> dict[str, Any]:
        return {"dead": self._dead.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._dead.held = state["dead"]
