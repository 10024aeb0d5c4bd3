"""Between log steps nothing that watches asks the device for a number: on a GPU that would be a wait."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker.training.core.callback import ACT, OBSERVE, REPORT, Callback
from stoker.training.trainer import Trainer
from toys import GAN, Buffers, Toy, new_run, train, with_callbacks

WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero")
BETWEEN = ("on_step_start", "on_batch", "on_loss", "on_grad", "on_step_end")
LOOKS_ON_A_CPU = "Sanity"  # at every step, but at log steps only on a GPU


@dataclass
class Guard(Callback):
    """Wraps the events of every monitor in a ban on what waits."""

    order = ACT
    patch: pytest.MonkeyPatch

    def on_start(self, trainer: Trainer) -> None:
        for monitor in trainer.callbacks:
            if monitor.is_monitor and monitor.key != LOOKS_ON_A_CPU:
                for event in BETWEEN:
                    setattr(monitor, event, self.banned(getattr(monitor, event)))

    def banned(self, call: Callable[..., None]) -> Callable[..., None]:
        def guarded(*given: Any) -> None:
            with self.patch.context() as patch:
                for name in WAITS:
                    patch.setattr(torch.Tensor, name, refuse)
                call(*given)

        return guarded


def refuse(tensor: torch.Tensor, *given: Any) -> None:
    raise AssertionError("the host waits for the device")


@pytest.mark.parametrize("toy", [Buffers, GAN])
def test_monitors_wait_at_log_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: type[Toy]) -> None:
    run = new_run(tmp_path, toy)
    trainer, ending = train(with_callbacks(toy, Guard(monkeypatch)), run, gradient_monitor_interval=1,
                            weight_monitor_interval=1, log_interval=3)
    assert ending.state == "finished" and trainer.switched_off == []


@pytest.mark.parametrize("order", [OBSERVE, REPORT])
def test_the_guard_catches_one_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    def waits(self: Callback, trainer: Trainer) -> None:
        float(next(iter(trainer.model.parameters())).sum())

    waiting = type("Waiting", (Callback,), {"on_step_end": waits, "order": order})()
    trainer, _ = train(with_callbacks(Buffers, Guard(monkeypatch), waiting), new_run(tmp_path, Buffers))
    assert trainer.switched_off == ["Waiting"]
