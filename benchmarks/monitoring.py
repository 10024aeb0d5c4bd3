"""What each callback of a default run costs, as a share of the time that training takes.

    python benchmarks/monitoring.py

Tiny preset, batch 8 x 256, on the CPU: 100 steps with one log step, which is the default. Each callback's time is
taken in its own methods; on a CPU nothing of theirs is done elsewhere. (On a GPU it is what the host does; gpu.sh also
measures steps with and without monitors.) Snapshots are left out; of an evaluation, of which a run has twenty, the
samples are told apart, in steps that could be trained meanwhile.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import rig

from stoker.monitors.samples import Samples
from stoker.training.core import device as devices
from stoker.training.core.callback import Callback
from stoker.training.core.stage import Stage

STEPS = 100
PROMISED = 0.01


@dataclass(frozen=True)
class Costs:
    """Seconds: of each callback, of `steps` steps with all of them, and of the samples that an evaluation shows."""

    spent: dict[str, float]
    whole: float
    steps: int
    sampling: float


def timed(callback: Callback, spent: dict[str, float]) -> None:
    """Let every event of a callback add to its account."""
    for event in ("on_step_start", "on_batch", "on_loss", "on_grad", "on_step_end", "on_log"):
        method = getattr(callback, event)

        def counted(*given: Any, _method: Any = method) -> None:
            start = time.perf_counter()
            _method(*given)
            spent[callback.key] += time.perf_counter() - start

        setattr(callback, event, counted)


def measure(preset: str, kind: type[Stage], *, steps: int = STEPS, **options: Any) -> Costs:
    with rig.trainer(preset, kind, log_interval=steps, sanity_check_interval=10_000, **options) as trainer:
        spent = {callback.key: 0.0 for callback in trainer.callbacks}
        rig.open_up(trainer)
        trainer._train_step()  # the first is slower
        for callback in trainer.callbacks:
            timed(callback, spent)
        devices.wait(trainer.device)
        start = time.perf_counter()
        for _ in range(steps):
            trainer._train_step()
        trainer._log({})
        devices.wait(trainer.device)
        whole = time.perf_counter() - start
        samples = next(callback for callback in trainer.callbacks if isinstance(callback, Samples))
        sampling = rig.median_seconds({"samples": lambda: samples.on_eval_start(trainer)}, rounds=3)["samples"]
        trainer._emit("close")
        assert not trainer.events.switched_off, f"these failed and cost nothing: {trainer.events.switched_off}"
    return Costs(spent, whole, steps, sampling)


def lines(costs: Costs) -> Iterator[str]:
    for name, seconds in [*sorted(costs.spent.items(), key=lambda item: -item[1]), ("all", sum(costs.spent.values()))]:
        yield (f"{name:16s} {1000 * seconds / costs.steps:8.3f} ms a step   {seconds / costs.whole:7.3%}"
               + (f"   promised {PROMISED:.0%}" if name == "all" else ""))
    yield (f"samples of an evaluation: {costs.sampling:.2f} s, as long as "
           f"{costs.sampling / costs.whole * costs.steps:.1f} steps")


def main() -> None:
    for line in lines(measure("tiny", rig.Random, batch_size=8, device="cpu", precision="fp32")):
        print(line)


if __name__ == "__main__":
    main()
