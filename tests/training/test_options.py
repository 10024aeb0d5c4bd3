"""The run's length, and the defaults that are cut to it."""

from typing import Any

import pytest

from stoker.training.core.options import fit_to_length, resolve_length, run_length
from toys import Config


@pytest.mark.parametrize("typed, steps", [
    ({}, 20 * 50), ({"epochs": 3}, 150), ({"max_steps": 7}, 7), ({"max_steps": 7000}, 7000),
    ({"max_steps": 70, "epochs": 3}, 70), ({"max_steps": 7000, "epochs": 3}, 150),
])
def test_length(typed: dict[str, int], steps: int) -> None:
    """max_steps alone repeats epochs until then; with epochs, whichever comes first."""
    assert run_length(Config(**typed), typed, steps_per_epoch=50) == steps


def test_defaults_are_cut_so_that_each_fires_twenty_times() -> None:
    cfg, lines = fit_to_length(Config(), set(), steps=400, steps_per_epoch=200)
    assert (cfg.log_interval, cfg.snapshot_interval, cfg.eval_interval, cfg.sanity_check_interval) == (20, 20, 20, 20)
    assert cfg.gradient_monitor_interval == cfg.weight_monitor_interval == 20 and cfg.warmup_steps == 40
    assert len(lines) == 1 and "log_interval 20" in lines[0] and "warmup_steps 40" in lines[0]


def test_monitors_of_weights_fire_every_five_steps_at_most() -> None:
    cfg, _ = fit_to_length(Config(), set(), steps=40, steps_per_epoch=40)
    assert (cfg.log_interval, cfg.snapshot_interval, cfg.eval_interval) == (2, 2, 2)
    assert cfg.sanity_check_interval == cfg.gradient_monitor_interval == cfg.weight_monitor_interval == 5


def test_what_was_typed_is_kept() -> None:
    typed: dict[str, Any] = {"log_interval": 300, "snapshot_interval": 0, "eval_interval": 0, "warmup_steps": 400}
    cfg, lines = fit_to_length(Config(**typed), typed, steps=400, steps_per_epoch=200)
    assert {name: getattr(cfg, name) for name in typed} == typed
    assert "never reaches its peak" in lines[0]


def test_a_long_run_keeps_its_defaults() -> None:
    cfg, lines = fit_to_length(Config(), set(), steps=1_000_000, steps_per_epoch=10_000)
    assert cfg == Config(max_steps=1_000_000, epochs=100) and not lines


def test_the_length_is_resolved_in_steps_and_in_epochs() -> None:
    configs = [resolve_length(Config(max_steps=steps), {"max_steps"}, 50)[0] for steps in (1, 50, 51, 150)]
    assert [(cfg.max_steps, cfg.epochs) for cfg in configs] == [(1, 1), (50, 1), (51, 2), (150, 3)]
