"""Repeats the step of an incident, and prints whether it fails in the same place."""

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker import command, config, files
from stoker.config import UserError
from stoker.daemon import registry
from stoker.daemon.rundir import RunDir
from stoker.training.core.options import device_problems
from stoker.training.core.outside import of_run

SAME, OTHER = 0, 1
SAME_LOSS = 1e-3  # relative: on another device, or with other threads, it differs by rounding


def main() -> int:
    return command.answered(_main)


def _main(argv: Sequence[str]) -> int:
    words = [word for word in argv if word != "--check"]
    device = words[1] if len(words) == 2 else "auto"
    if len(words) not in (1, 2) or words[0].startswith("-"):
        raise UserError("which incident? give its folder (result/RUN/incidents/step_00000500), or a run for its "
                        "newest, and a device if need be")
    if problems := device_problems(device):
        raise UserError(*problems)
    path = _incident(words[0])
    return SAME if "--check" in argv else _replay(path, device)


def _incident(named: str) -> Path:
    """The folder itself, or the newest of a run's."""
    folder = Path(named).parent if Path(named).name == "incident.json" else Path(named)
    if (folder / "incident.json").is_file():
        return folder.resolve()
    run = registry.find(named)
    found: list[Path] = sorted(path.parent for path in run.incidents.glob("*/incident.json"))
    if not found:
        raise UserError(f"run {run.name} has had no incident that can be done again")
    return found[-1]


def _replay(path: Path, device_name: str) -> int:
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"torch is not installed for this Python ({sys.executable}): use "
                        f"{files.hint('replay')}")
    from stoker.training.core import incident, manifest, pretrained
    from stoker.training.core.plan import resolve

    recorded, run = incident.read(path), RunDir(path.parents[1])
    kind = of_run(run)
    cfg: Any = config.from_json(kind.Config, json.loads(run.config_file.read_text()), str(run.config_file))
    setup = resolve(kind, replace(cfg, device=device_name), run.path)
    snapshot = manifest.newest_good(run.snapshots) if setup.stage.parts() else None
    setup.reopen(pretrained.find(str(snapshot)) if snapshot else None)
    again = incident.replay(path, setup.stage, setup.device, setup.cfg.precision)
    print(f"Step {recorded.step} of {run.name}: rows {', '.join(str(row) for part in recorded.rows for row in part)}")
    same = again.where == recorded.where and (
        bool(again.where) or math.isclose(float(again.loss), float(recorded.loss), rel_tol=SAME_LOSS))
    print(f"Then   {_described(recorded)}")
    print(f"Again  {_described(again)}{': the same' if same else ''}")
    return SAME if same else OTHER


def _described(found: Any) -> str:
    return f"NaN or Inf, first in {found.where}" if found.where else f"finite, a loss of {found.loss}"


if __name__ == "__main__":
    sys.exit(main())
