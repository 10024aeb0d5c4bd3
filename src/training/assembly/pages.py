"""What a stage's script prints instead of training: --help, --explain, --info, --print_config.

The guide in docs/ is the one source of --explain, its section "In short", and of --info, all of it. A stage from
outside has its docstring instead.
"""

import importlib.util
import inspect
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker import config, files
from stoker.config import Parsed, UserError
from stoker.daemon import machine
from stoker.training.core import pretrained
from stoker.training.core.options import Options, without_effect
from stoker.training.core.stage import Stage

# Flags that are no options of a run, for --help.
FLAGS = {
    "Instead of training": {
        "--help, -h": "print this page",
        "--explain": "print how this stage is used, in short",
        "--info": "print the guide to this stage, with the size, memory and time of your model, measured on this "
                  "machine",
        "--print_config": "print all options as JSON, with presets and defaults filled in; --config reads it back",
        "--check": "look for mistakes in the options, and exit (exit code 2 where there are any)"},
    "Starting with a script of run/, or with the command stoker": {
        "--foreground": "train in this terminal, not in the background; the stage's own script always does"},
}


def asked(stage: type[Stage], argv: Sequence[str]) -> Callable[[], str] | None:
    """What makes the page that a command line asks for; None where it asks for a run."""
    rest = [word for word in argv if word not in ("--info", "--explain", "--print_config")]
    if {"--help", "-h"} & set(argv):
        return lambda: config.help_text(stage.Config, stage.presets, f"usage: python {sys.argv[0]} [--OPTION VALUE ...]"
                                        f"\n\n{stage.__doc__ or ''}", FLAGS)
    if "--explain" in argv:
        return lambda: section(guide(stage), "In short")
    if "--info" in argv:
        return lambda: f"{guide(stage)}\n## The model of these options\n\n{figures(stage, _of_new_run(stage, rest))}"
    if "--print_config" in argv:
        return lambda: json.dumps(config.to_json(_of_run_or_typed(stage, parse(stage, rest))), indent=2)
    return None


def parse(stage: type[Stage], argv: Sequence[str], further: Callable[[Any], list[str]] = lambda cfg: []) -> Parsed[Any]:
    """The config that a command line asks for; `--hardware auto` becomes the recipe for this machine."""
    may_ask = any(word.endswith("auto") or word.lstrip("-").startswith("config") for word in argv)
    auto = machine.hardware() if may_ask else ""
    presets = {**stage.presets, **({"auto": stage.presets[auto]} if auto in stage.presets else {})}
    parsed: Parsed[Any] = config.parse(stage.Config, presets, argv, further)
    return Parsed(parsed.config, parsed.typed, auto) if parsed.preset == "auto" else parsed


def resolve_config(stage: type[Stage], parsed: Parsed[Any], *, download: bool = True) -> tuple[Parsed[Any], list[str]]:
    """The config of a new run, with the options that follow from --init_from and from this machine; and log lines.

    These options count as typed, so a resumed run keeps them. Raises UserError where they contradict typed ones.
    """
    if named := parsed.config.init_from:
        parsed = pretrained.apply_options(stage, parsed, pretrained.find(named, (stage.name,), download=download))
    computed = config.following(stage.Config, {name: getattr(parsed.config, name) for name in parsed.typed})
    cfg, notes = stage.resolve_defaults(parsed.config, parsed.typed)
    changed = {name for name, value in vars(cfg).items() if value != getattr(parsed.config, name)}
    lines = [line for _, line in computed.values()] + notes + without_effect(parsed.config, parsed.typed)
    return replace(parsed, config=cfg, typed=parsed.typed | changed | computed.keys()), lines


def _of_run_or_typed(stage: type[Stage], parsed: Parsed[Any]) -> Any:
    """The config of a new run; where that cannot be here, as without a network, the config that was typed."""
    try:
        return resolve_config(stage, parsed, download=False)[0].config
    except UserError:
        return parsed.config


def _of_new_run(stage: type[Stage], argv: Sequence[str]) -> tuple[Parsed[Any], list[str]]:
    parsed = parse(stage, argv, lambda cfg: stage.check(cfg, resumed=False))
    if parsed.config.resume:
        raise UserError("--info is about a new run: leave --resume out, or take --init_from for the model of a run")
    return resolve_config(stage, parsed, download=False)


def guide(stage: type[Stage]) -> str:
    path = Path(inspect.getfile(stage)).resolve()
    page = files.PACKAGE / "docs" / f"{path.stem}.md"
    if path.is_relative_to(files.PACKAGE) and page.is_file():
        return page.read_text()
    description = stage.__doc__ or sys.modules[stage.__module__].__doc__ or f"{path} describes this stage nowhere."
    return f"{inspect.cleandoc(description)}\n"


def section(text: str, heading: str) -> str:
    """What stands below a `## heading`, up to the next; without that heading, the whole text."""
    found = re.search(rf"^## {heading}\n+(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return (found[1] if found else text).rstrip()


def figures(stage: type[Stage], of: tuple[Parsed[Any], list[str]]) -> str:
    """Size, memory and time of the model that these options make, measured here on its own data."""
    if importlib.util.find_spec("torch") is None:
        return "They are measured once torch is installed; any script of run/ that trains installs it."
    from stoker.training.assembly.decide import expect
    from stoker.training.core import device as devices
    from stoker.training.core.plan import resolve

    started, (parsed, notes) = time.time(), of
    with tempfile.TemporaryDirectory() as folder:
        setup = resolve(stage, parsed.config, Path(folder))
        setup.prepare(download=False)
        plan, found, length, lines = expect(setup.plan(parsed.typed), started)
    inexact = devices.to_rounding(plan.device, stage.nondeterministic)
    return "\n".join([*notes, *plan.notes, *lines, *table(plan.cfg, found, length),
                      f"{'a resume is':16s} " + (f"to rounding: {inexact}" if inexact else "bit for bit")])


def table(cfg: Options, found: Any, length: Any) -> list[str]:
    from stoker.daemon.table import duration, size

    memory = found.memory(cfg.batch_size)
    rows = [
        ("device", f"{found.device}, {cfg.precision}"),
        ("parameters", f"{found.parameters:,}"),
        *((name, f"{size(number)}" + (f" (a micro-batch of {cfg.batch_size})" if name == "activations" else ""))
          for name, number in memory.items()),
        ("memory in all", size(sum(memory.values()))),
        ("a sample takes", f"{found.sample_seconds:.3g} s, {found.sample_flops / 1e9:.3g} GFLOP"),
        ("speed", f"{found.sample_flops / found.sample_seconds / 1e9:,.0f} GFLOP/s, "
                  f"{found.sample_flops / found.sample_seconds / found.peak_flops:.0%} of bare matrix products"),
        ("the run", f"{length.steps:,} steps, {length.samples:,.0f} samples; "
                    f"{sum(length.scored.values()):,} samples evaluated"),
        ("takes about", duration(found.seconds(length)) + (" on an idle machine" if found.busy else "")
         + found.of_evaluations(length)),
    ]
    return [f"{name:16s} {value}" for name, value in rows]
