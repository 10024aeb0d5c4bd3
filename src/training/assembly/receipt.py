"""What a run was made by, what differs when it is resumed, and which of that cannot be right."""

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stoker import config, files
from stoker.config import UserError
from stoker.daemon import machine
from stoker.training.assembly import plugins
from stoker.training.core import device as devices
from stoker.training.core import manifest
from stoker.training.core.callback import Callback
from stoker.training.core.stage import Stage

LENGTH = ("max_steps", "epochs")
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "tiktoken")


def made_by(stage: Stage, rows: int | None, device: torch.device, begun_with: Mapping[str, str],
            callbacks: Iterable[Callback] = (), script: str = "") -> dict[str, Any]:
    """Everything that may change the bits of a result; `begun_with`: the first weights; `callbacks`: those that the
    stage or the user adds; `script`: as the run's status names it."""
    inexact = devices.to_rounding(device, stage.nondeterministic)
    plugged_in = plugins.digests([stage, *(callback for callback in callbacks if not callback.is_monitor)])
    return {
        "stage": stage.name,
        "config": config.to_json(stage.cfg),
        "data": {**stage.made_from(), "rows": rows},
        "code": code_version(files.PACKAGE),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {machine.processor()}",
        "device": devices.describe(device),
        "threads": torch.get_num_threads(),
        "begun_with": dict(begun_with),
        "parts": {name: source.note for name, source in stage.sources.items()},
        **({"to_rounding": inexact} if inexact else {}),
        **({"plugins": plugged_in} if plugged_in else {}),
        **({"script": script} if "/" in script else {}),
    }


def compare(snapshot: Path, now: Mapping[str, Any], options: type, *, extended: bool) -> list[str]:
    """A line for each thing that is not as it was when the snapshot was made: "packages.torch: 2.13.0 -> 2.13.1".

    `options` is the stage's Config; `extended`: whether the user has given the run another length since. Raises
    UserError where it would be another run: of another stage, on other data, with another value of an option that
    changes what is computed, or of another length.
    """
    old, new = _flat(_renamed(manifest.read(snapshot)["made_by"], options)), _flat(now)
    changed = {name: f"{_shown(old.get(name, 'not recorded'))} -> {_shown(new.get(name, 'gone'))}"
               for name in sorted(old | new) if old.get(name) != new.get(name)}
    refused = {name: change for name, change in changed.items()
               if name in old and name in new and _is_harmful(name, options, new)}
    instead = f"or start a new run with its weights: --init_from {snapshot}"
    for what, problem in (
            ("stage", "the snapshot is of another stage than this run"),
            ("config", "run_config.json is not what the snapshot was made with ({}): put it back, or the snapshot away "
             f"if it is another run's, {instead}"),
            ("data", f"the data are not those of the interrupted run ({{}}): bring them back, {instead}")):
        if found := [f"{name.partition('.')[2]} {change}" for name, change in refused.items()
                     if name.partition(".")[0] == what]:
            raise UserError(problem.format(", ".join(found)))
    planned, plan = (flat.get("config.max_steps") for flat in (old, new))
    if planned not in (None, plan) and not extended:
        raise UserError(f"run_config.json makes a run of {plan} steps, but {snapshot.name} was made in one of "
                        f"{planned}: put max_steps and epochs back; --extend_steps N makes a run longer")
    return [f"{name.removeprefix('plugins.')}: {change}" for name, change in changed.items()]


def _renamed(made_by: Mapping[str, Any], options: type) -> dict[str, Any]:
    """`made_by` with the present names of options, and of data fingerprints named after them: former names are
    aliases."""
    return {**made_by, **{part: config.current_names(options, made_by.get(part, {})) for part in ("config", "data")}}


def _is_harmful(name: str, options: type, new: Mapping[str, Any]) -> bool:
    """Whether a difference, in something recorded both then and now, makes it another run. Another path does not, since
    the data are compared themselves; `compare` checks the length. A run that was compiled may be resumed where there is
    no compiler."""
    kind, _, option = name.partition(".")
    if kind != "config":
        return kind in ("stage", "data")
    spec = config.fields(options)[option][1]
    if spec.may_change or spec.path is not None or option in LENGTH:
        return False
    return option != "compile" or bool(new[name])


def _shown(value: Any) -> str:
    """A fingerprint by its beginning."""
    return value[:8] if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) else str(value)


def code_version(source: Path) -> str:
    """Twelve hex digits that change with any line of the source."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
