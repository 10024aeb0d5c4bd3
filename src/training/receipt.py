"""What a run was made by, and what differs when it goes on."""

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import config
from daemon import machine
from daemon.rundir import PROJECT
from training import device as devices

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "tiktoken")


def made_by(cfg: Any, device: torch.device, begun_with: Mapping[str, str]) -> dict[str, Any]:
    """Everything that may change the bits of a result, beside the data; `begun_with`: the first weights."""
    return {
        "config": config.to_json(cfg),
        "code": code_version(PROJECT / "src"),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {machine.processor()}",
        "device": devices.describe(device),
        "threads": torch.get_num_threads(),
        "begun_with": dict(begun_with),
    }


def code_version(source: Path) -> str:
    """Twelve hex digits that change with any line of the source."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is not as it was: "packages.torch: 2.13.0 -> 2.13.1"."""
    old, new = _flat(before), _flat(now)
    return [f"{name}: {old.get(name, 'not recorded')} -> {new.get(name, 'gone')}"
            for name in sorted(old | new) if old.get(name) != new.get(name)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
