"""Trained weights, by the name that people give them: of a run, a snapshot, a model folder.

    a run             its models/best, else models/final, else its newest whole snapshot
    a snapshot        its folder, or a file in it
    a model folder    one that a finished run leaves, or of another program: safetensors, and config.json
    newest            the newest finished run of the stage

What they are, and which options they settle, is found without torch; only `load` needs it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import config
from stoker.config import Parsed, UserError
from stoker.daemon import registry
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.training.core import evaluations, manifest
from stoker.training.core.stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

MADE_BY = "stoker.json"  # in a model folder of ours


@dataclass(frozen=True)
class Pretrained:
    """A folder with weights. What is not known, as of another program's, is empty, and the step -1."""

    folder: Path
    is_snapshot: bool
    stage: str = ""
    step: int = -1
    options: Mapping[str, Any] = field(default_factory=dict)  # those that they were trained with
    run: RunDir | None = None
    scores: Mapping[str, float] = field(default_factory=dict)  # of the evaluation at that step

    def __str__(self) -> str:
        return f"{self.folder}, step {self.step}" if self.step >= 0 else str(self.folder)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Where they are, and the SHA-256 of what they are (of several files, of one after another)."""
        digest = hashlib.sha256()
        for path in _weights(self.folder):
            with open(path, "rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
        return {"path": str(self.folder), "sha256": digest.hexdigest()}

    def load(self, stage: Stage, model: "nn.Module") -> None:
        """Put them into a model of the stage. Raises UserError where they do not fit, are damaged or hold NaN."""
        if self.is_snapshot:
            from stoker.training.core.snapshots import load_weights

            load_weights(manifest.verified(self.folder), model)
        else:
            if self.stage:
                _known(self.folder, weights=True)
            stage.load(model, self.folder)
        state = model.state_dict()
        if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise UserError(f"{self} cannot be used: {len(bad)} of its {len(state)} tensors hold NaN or infinity, "
                            f"the first is {bad[0]}; name other weights")


def find(named: str, stage: str = "") -> Pretrained:
    """The weights meant by a name; `stage` is whose newest finished run "newest" means. Raises UserError."""
    if named == "newest" and stage:
        return of_run(registry.newest_finished(stage))
    if snapshot := registry.snapshot(named):
        return _of_snapshot(snapshot)
    if "/" in named and not Path(named).exists():
        raise UserError(f"{named} is gone, or was never there: name a run, a snapshot or a model folder")
    folder = Path(named).parent if Path(named).is_file() else Path(named)
    if (folder / MADE_BY).is_file() or (folder / "config.json").is_file():
        return _of_model(folder.resolve())
    if folder.is_dir() and not RunDir(folder.resolve()).status_file.exists():
        raise UserError(f"{named} is no run, no snapshot and no model folder (which has a config.json)")
    return of_run(registry.find(named))


def of_run(run: RunDir) -> Pretrained:
    """Raises UserError where it has none yet."""
    for folder in (run.models / "best", run.models / "final"):
        if folder.is_dir():
            return _of_model(folder)
    if snapshot := manifest.newest_good(run.snapshots):
        return _of_snapshot(snapshot)
    raise UserError(f"run {run.name} has no weights yet: the first are saved when its training begins")


def note(folder: Path, stage: str, step: int, options: Mapping[str, Any], scores: Mapping[str, float]) -> None:
    """Write beside an exported model what is known of it, with the size and SHA-256 of each of its files."""
    entries = manifest.entries(folder)
    entries.pop(MADE_BY, None)
    manifest.write_sealed(folder / MADE_BY, {"stage": stage, "step": step, "options": dict(options),
                                             "scores": dict(scores), "files": entries})


def scores(run: RunDir, step: int) -> dict[str, float]:
    """What the evaluation at a step found, as the journal has it; empty where there was none."""
    row = next((row for row in Journal(run.metrics).rows() if row["step"] == step), {})
    return {name: value for name, value in row.items()
            if evaluations.is_score(name) and isinstance(value, (int, float))}


def _of_snapshot(snapshot: Path) -> Pretrained:
    try:
        known = manifest.read(snapshot)
    except manifest.Damaged as damage:
        raise UserError(f"snapshot {snapshot} is damaged: {damage}; name another one") from damage
    run = _run_around(snapshot)
    stage, found = (run.status().stage, scores(run, known["step"])) if run else ("", {})
    return Pretrained(snapshot, True, stage, known["step"], known["made_by"]["config"], run, found)


def _of_model(folder: Path) -> Pretrained:
    if not _weights(folder):
        raise UserError(f"{folder} has no *.safetensors, and other formats are not read, since they can run code; "
                        "transformers converts: from_pretrained(...).save_pretrained(...)")
    if not os.path.lexists(folder / MADE_BY):  # another program's
        return Pretrained(folder, False, run=_run_around(folder))
    known = _known(folder, weights=False)
    return Pretrained(folder, False, known["stage"], known["step"], known["options"], _run_around(folder),
                      known["scores"])


def _known(folder: Path, *, weights: bool) -> dict[str, Any]:
    """What stands in a folder's stoker.json, once its files were compared with the digests there; those with weights,
    which may be large, only if asked for. Raises UserError where one is not as it was written."""
    try:
        known = manifest.read_sealed(folder / MADE_BY)
        large = {path.name for path in _weights(folder)}
        if strange := large - known["files"].keys():
            raise manifest.Damaged(f"{min(strange)} was not there when it was written")
        manifest.check_files(folder, {name: entry for name, entry in known["files"].items()
                                      if weights or name not in large})
        return known
    except manifest.Damaged as damage:
        if known := _of_earlier_version(folder / MADE_BY):
            return known
        raise UserError(f"model folder {folder} is not as it was written: {damage}. Bring it back, or take a snapshot "
                        f"of its run; if you changed a language model yourself, delete {MADE_BY}, and the folder is "
                        "read as another program's") from damage


def _of_earlier_version(path: Path) -> dict[str, Any]:
    """The content of a stoker.json from before there were digests; empty where it is none."""
    try:
        known = dict(json.loads(path.read_text())) if path.is_file() else {}  # a pipe would be waited for
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    if known.keys() - {"scores"} != {"stage", "step", "options"}:
        return {}
    log.warning("%s was written by an earlier version, without digests: its files cannot be verified", path)
    return {"scores": {}, **known}


def _weights(folder: Path) -> list[Path]:
    """The files with weights; what else bears such a name, as a pipe, is left alone."""
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _run_around(folder: Path) -> RunDir | None:
    run = RunDir(folder.parent.parent)
    return run if run.status_file.exists() else None


# -- what follows from them -----------------------------------------------------------------------------------------


def taken(stage: type[Stage], parsed: Parsed[Any], pretrained: Pretrained) -> Parsed[Any]:
    """The config with the options that the weights settle; they count as typed from then on.

    Raises UserError where others were typed, or the weights are of another stage.
    """
    if pretrained.stage not in ("", stage.name):
        raise UserError(f"{pretrained} is of stage {pretrained.stage}, this one is {stage.name}: name weights of that")
    options = stage.taken_from(pretrained)
    _check_agreement(pretrained, options)
    by_preset = {name: f"--preset {parsed.preset}: {name}" for name in stage.presets.get(parsed.preset, {})}
    chosen = by_preset | {name: f"--{name}" for name in parsed.typed}
    refused = [f"{chosen[name]} {getattr(parsed.config, name)} differs from the {value} of {pretrained}: leave it out"
               for name, value in options.items()
               if name in chosen and getattr(parsed.config, name) not in (value, pretrained.options.get(name))]
    cfg = replace(parsed.config, **options)
    if problems := refused or config.check(cfg):
        raise UserError(*problems)
    return Parsed(cfg, parsed.typed | options.keys(), parsed.preset)


def _check_agreement(pretrained: Pretrained, options: Mapping[str, Any]) -> None:
    """Raises UserError where stoker.json and config.json of a model folder describe models of different sizes: equal
    tensors do not prove equal models, since the number of heads is in no shape."""
    if pretrained.is_snapshot or not pretrained.options:
        return
    try:
        described = dict(json.loads((pretrained.folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{pretrained.folder / 'config.json'} cannot be read ({error!r}): bring it back") from error
    for name, value in options.items():
        noted, here = pretrained.options.get(name, value), described.get(name, value)
        if noted != here and (name in described or isinstance(value, (int, float))):
            raise UserError(f"{pretrained.folder}: {name} is {noted} in {MADE_BY} and {here} in config.json: bring "
                            "back the one that was changed")


def settled(pretrained: Pretrained, stage: type[Stage]) -> Any:
    """The config of a stage of which nothing was typed. Raises UserError where the weights are of another."""
    return taken(stage, Parsed(stage.Config(), frozenset(), ""), pretrained).config


def opened(pretrained: Pretrained, stage: type[Stage], device: "torch.device | str") -> tuple[Any, Any]:
    """To use trained weights: their stage, without its data, and the model in evaluation mode. Raises UserError where
    they are of another."""
    run = pretrained.run if pretrained.is_snapshot else None
    made = stage(settled(pretrained, stage), run.path if run else pretrained.folder)
    made.reopen()
    model = made.model().to(device).eval()
    pretrained.load(made, model)
    return made, model
