"""What each callback of a default run costs, as a share of the time that training takes.

    python benchmarks/monitoring.py

Tiny preset, batch 8 x 256, on the CPU: 100 steps with one log step, which is the default. Each callback's time is
taken in its own methods; on a CPU nothing of theirs is done elsewhere. Snapshots are left out; of an evaluation, of
which a run has twenty, the samples are told apart, in steps that could be trained meanwhile.
"""

import time
from typing import Any

import rig

from stoker.monitors.samples import Samples
from stoker.training.core.callback import Callback

STEPS = 100
PROMISED = 0.01


def timed(callback: Callback, spent: dict[str, float]) -> None:
    """Let every event of a callback add to its account."""
    for event in ("on_step_start", "on_batch", "on_loss", "on_grad", "on_step_end", "on_log"):
        method = getattr(callback, event)

        def counted(*given: Any, _method: Any = method) -> None:
            start = time.perf_counter()
            _method(*given)
            spent[callback.key] += time.perf_counter() - start

        setattr(callback, event, counted)


def main() -> None:
    with rig.trainer("tiny", batch_size=8, device="cpu", precision="fp32", log_interval=STEPS,
                     sanity_check_interval=10_000) as trainer:
        spent = {callback.key: 0.0 for callback in trainer.callbacks}
        rig.open_up(trainer)
        trainer._train_step()  # the first is slower
        for callback in trainer.callbacks:
            timed(callback, spent)
        start = time.perf_counter()
        for _ in range(STEPS):
            trainer._train_step()
        trainer._log({})
        whole = time.perf_counter() - start
        samples = next(callback for callback in trainer.callbacks if isinstance(callback, Samples))
        sampling = rig.median_seconds({"samples": lambda: samples.on_eval_start(trainer)}, rounds=3)["samples"]
        trainer._emit("close")
    assert not trainer.events.switched_off, f"these failed and cost nothing: {trainer.events.switched_off}"
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:16s} {1000 * seconds / STEPS:8.3f} ms a step   {seconds / whole:7.3%}")
    print(f"{'all':16s} {1000 * sum(spent.values()) / STEPS:8.3f} ms a step   {sum(spent.values()) / whole:7.3%}   "
          f"promised {PROMISED:.0%}")
    print(f"samples of an evaluation: {sampling:.2f} s, as long as {sampling / whole * STEPS:.1f} steps")


if __name__ == "__main__":
    main()
