"""Finds and loads trained weights, by what the user types:

    a run             its models/best, else models/final, else its newest undamaged snapshot
    a snapshot        its folder, or a file in it
    a model folder    exported by a run, or by another program: safetensors and config.json
    newest            the newest finished run of the stage
    hf://ORG/NAME@REVISION    a model folder of the Hugging Face hub (`data/sources/model_hub.py`)

Only `load` and `opened` need torch; finding weights, and the options that follow from them, does not.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import config, progress
from stoker.config import Parsed, UserError
from stoker.daemon import registry
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.data.sources import model_hub
from stoker.training.core import copied, evaluations, manifest
from stoker.training.core.parts import Lora, Part, kept
from stoker.training.core.stage import Stage, reader

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

MADE_BY = "stoker.json"  # in each model folder that a run has exported


@dataclass(frozen=True)
class Pretrained:
    """A folder with weights. What is not known of them, as of another program's, is empty, and the step is -1."""

    folder: Path
    is_snapshot: bool
    stage: str = ""
    step: int = -1
    options: Mapping[str, Any] = field(default_factory=dict)  # the options of their training
    run: RunDir | None = None
    scores: Mapping[str, float] = field(default_factory=dict)  # of the evaluation at that step
    parts: Mapping[str, Any] = field(default_factory=dict)  # the `note` of the source of each part, by its name
    # A source that was read from its `note` in a snapshot or model folder which holds the part's weights itself. Empty
    # for a source that was found.
    noted: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""  # hf://ORG/NAME@COMMIT where the folder is in the hub's cache

    def __str__(self) -> str:
        return f"{self.place}, step {self.step}" if self.step >= 0 else self.place

    @property
    def place(self) -> str:
        """A name with which `find` finds the same weights again."""
        return self.origin or str(self.folder)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Their place, and the SHA-256 of the files with weights, one after another in the order of their names."""
        if self.noted:
            return {name: self.noted[name] for name in ("path", "sha256")}
        _ = self._stamps
        digest = hashlib.sha256()
        for path in _weights(self.folder):
            with open(path, "rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
                    progress.mark()
        return {"path": self.place, "sha256": digest.hexdigest()}

    @cached_property
    def _stamps(self) -> list[tuple[Any, ...]]:
        """Inode, size and time of each file with weights when `identity` was computed, to notice a later change."""
        return _stamps_of(self.folder)

    def check_unchanged(self) -> None:
        """Raises UserError where a file with weights was written, or deleted, since `identity` was computed."""
        _ = self.identity
        if self._stamps != _stamps_of(self.folder):
            raise UserError(f"the weights in {self.folder} were changed after this start had read them: start again, "
                            "once nothing writes them any more")

    @property
    def model_type(self) -> str:
        """What config.json calls this kind of model ("qwen3"); "" in a snapshot, or where it does not say."""
        return "" if self.is_snapshot else str(_described(self.folder).get("model_type", ""))

    @property
    def note(self) -> dict[str, Any]:
        """What a snapshot or model folder records about them where they are the source of a part."""
        return {**self.identity, "is_snapshot": self.is_snapshot, "stage": self.stage, "step": self.step,
                "options": dict(self.options)}

    def load(self, stage: Stage, model: "nn.Module") -> None:
        """Load them into a model of the stage that `networks.build` has built. Raises UserError where they do not fit,
        are damaged or hold NaN."""
        _check_parts(self, stage)
        if self.is_snapshot:
            from stoker.training.core.snapshots import load_weights

            load_weights(manifest.verified(self.folder), model)
        else:
            if self.stage:
                _known(self.folder, weights=True)
            stage.load(model, self.folder)
        state = kept(model)
        if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise UserError(f"{self} cannot be used: {len(bad)} of its {len(state)} tensors hold NaN or infinity, "
                            f"the first is {bad[0]}; name other weights")


def find(named: str, stages: Sequence[str] = (), *, download: bool = True) -> Pretrained:
    """The weights that the user means by `named`. "newest" is the newest finished run of one of these stages. A
    repository of the hub is downloaded unless `download` is false. Raises UserError where there are none."""
    if repository := model_hub.parse(named):
        folder, commit = model_hub.folder(repository, download=download)
        return replace(_of_model(folder), origin=str(commit))
    if named == "newest" and stages:
        return of_run(registry.newest_finished(stages))
    if snapshot := registry.snapshot(named):
        return _of_snapshot(snapshot)
    named = registry.as_guides_say(named)
    if "/" in named and not Path(named).exists():
        raise UserError(f"{named}: not found; name a run, a snapshot or a model folder (one of the Hugging Face hub as "
                        f"{model_hub.SCHEME}ORG/NAME)")
    folder = Path(named).parent if Path(named).is_file() else Path(named)
    if (folder / MADE_BY).is_file() or (folder / "config.json").is_file():
        return _of_model(folder.resolve())
    if folder.is_dir() and not RunDir(folder.resolve()).status_file.exists():
        raise UserError(f"{named} is neither a run, nor a snapshot, nor a model folder (which has a config.json)")
    return of_run(registry.find(named))


def held(choose: Callable[[], Pretrained]) -> Pretrained:
    """The weights that `choose` finds. While this process lives, a run that trains does not delete the snapshot that
    they are read from. Raises UserError."""
    found = choose()
    while found.is_snapshot:
        try:
            manifest.hold(found.folder)
            break
        except manifest.Damaged:
            if found.folder.exists():  # not deleted: whoever reads it says what is wrong with it
                break
            found = choose()
    return found


def of_run(run: RunDir) -> Pretrained:
    """The weights of a run: see the top of this file. Raises UserError where it has none yet."""
    for folder in (run.models / "best", run.models / "final"):
        if folder.is_dir():
            return _of_model(folder)
    if snapshot := manifest.newest_good(run.snapshots):
        return _of_snapshot(snapshot)
    raise UserError(f"run {run.name} has no weights yet: the first are saved when its training begins")


def note(folder: Path, stage: str, step: int, options: Mapping[str, Any], scores: Mapping[str, float],
         parts: Mapping[str, Any] = {}) -> None:
    """Write stoker.json into a model folder: where the model comes from, and size and SHA-256 of each of its files."""
    entries = manifest.entries(folder)
    entries.pop(MADE_BY, None)
    manifest.write_sealed(folder / MADE_BY, {"stage": stage, "step": step, "options": dict(options),
                                             "scores": dict(scores), "files": entries, "parts": dict(parts)})


def scores(run: RunDir, step: int) -> dict[str, float]:
    """The metrics of the evaluation at a step, from the run's journal; empty where there was none."""
    row = next((row for row in Journal(run.metrics).rows() if row["step"] == step), {})
    return {name: value for name, value in row.items()
            if evaluations.is_score(name) and isinstance(value, (int, float))}


def _of_snapshot(snapshot: Path) -> Pretrained:
    try:
        known = manifest.read(snapshot)
    except manifest.Damaged as damage:
        raise UserError(f"snapshot {snapshot} is damaged: {damage}; name another one") from damage
    run = _run_around(snapshot)
    made_by, found = known["made_by"], scores(run, known["step"]) if run else {}
    stage = made_by.get("stage", run.status().stage if run else "")
    return Pretrained(snapshot, True, stage, known["step"], made_by["config"], run, found,
                      made_by.get("parts", {}))


def _of_model(folder: Path) -> Pretrained:
    if not _weights(folder):
        raise UserError(f"{folder} has no *.safetensors, and other formats are not read, since they can run code; "
                        "transformers converts: from_pretrained(...).save_pretrained(...)")
    if not os.path.lexists(folder / MADE_BY):  # another program's
        return Pretrained(folder, False, run=_run_around(folder))
    known = _known(folder, weights=False)
    return Pretrained(folder, False, known["stage"], known["step"], known["options"], _run_around(folder),
                      known["scores"], known.get("parts", {}))


def _known(folder: Path, *, weights: bool) -> dict[str, Any]:
    """The content of a folder's stoker.json, after comparing the files with the digests in it; files with weights,
    which may be large, only if `weights`. Raises UserError where one was changed."""
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
    """The files with weights; a pipe or folder with such a name is ignored."""
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _stamps_of(folder: Path) -> list[tuple[Any, ...]]:
    return [(path.name, found.st_ino, found.st_size, found.st_mtime_ns)
            for path in _weights(folder) for found in [path.stat()]]


def _run_around(folder: Path) -> RunDir | None:
    run = RunDir(folder.parent.parent)
    return run if run.status_file.exists() and folder.parent.name != copied.FOLDER else None


# -- options and models that follow from weights ----------------------------------------------------------------------


def apply_options(stage: type[Stage], parsed: Parsed[Any], pretrained: Pretrained) -> Parsed[Any]:
    """The config with the options that follow from the weights (`Stage.options_from`), which then count as typed.

    Raises UserError where the user typed other values for them, or the weights are of another stage.
    """
    if pretrained.stage not in ("", stage.name):
        raise UserError(f"{pretrained} is of stage {pretrained.stage}, but this is a run of stage {stage.name}: name "
                        f"weights of {stage.name}")
    options = stage.options_from(pretrained)
    _check_agreement(pretrained, options)
    recorded = config.current_names(stage.Config, pretrained.options)
    by_preset = {name: f"--preset {parsed.preset}: {name}" for name in stage.presets.get(parsed.preset, {})
                 if name != stage.tokenizer_option}  # its kind of tokenizer is for new weights
    chosen = by_preset | {name: f"--{name}" for name in parsed.typed}
    refused = [f"{chosen[name]} {getattr(parsed.config, name)} differs from the {recorded.get(name, value)} of "
               f"{pretrained}: " + ("leave it out" if name in parsed.typed else
                                    f"leave the preset out, or type --{name} {recorded.get(name, value)} as well")
               for name, value in options.items()
               if name in chosen and getattr(parsed.config, name) not in (value, recorded.get(name))]
    cfg = replace(parsed.config, **options)
    if problems := refused or config.check(cfg):
        raise UserError(*problems)
    return Parsed(cfg, parsed.typed | options.keys(), parsed.preset)


def _check_agreement(pretrained: Pretrained, options: Mapping[str, Any]) -> None:
    """Raises UserError where stoker.json and config.json of a model folder describe models of different sizes: equal
    tensors do not prove equal models, since the number of heads is in no shape."""
    if pretrained.is_snapshot or not pretrained.options or not options:
        return
    described = _described(pretrained.folder)
    for name, value in options.items():
        noted, here = pretrained.options.get(name, value), described.get(name, value)
        if noted != here and (name in described or isinstance(value, (int, float))):
            raise UserError(f"{pretrained.folder}: {name} is {noted} in {MADE_BY} and {here} in config.json: bring "
                            "back the one that was changed")


def _described(folder: Path) -> dict[str, Any]:
    """The content of its config.json. Raises UserError where it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error!r}): bring it back") from error


def config_for(pretrained: Pretrained, stage: type[Stage]) -> Any:
    """A stage's config by its defaults and the weights. Raises UserError where the weights are of another stage."""
    return apply_options(stage, Parsed(stage.Config(), frozenset(), ""), pretrained).config


def opened(pretrained: Pretrained, stage: type[Stage], device: "torch.device | str") -> tuple[Any, Any]:
    """For inference: the stage, without its data, and the model with the weights, in evaluation mode. Raises UserError
    where the weights are of another stage."""
    from stoker.training.core import networks  # torch

    run = pretrained.run if pretrained.is_snapshot else None
    made = stage(config_for(pretrained, stage), run.path if run else pretrained.folder)
    resolve_parts(made, pretrained, judges=False)
    made.reopen()
    model = networks.build(made, device).eval()
    pretrained.load(made, model)
    return made, model


# -- sources of the parts of a model --------------------------------------------------------------------------------


_ELSEWHERE = ":elsewhere:"  # the name of no source


def part_problems(stage: Stage) -> list[str]:
    """Why the sources of a new model's parts cannot be used, as far as their names say."""
    found: list[str] = []
    for part in stage.parts():
        try:
            with part.problems():
                repository = model_hub.parse(part.source)
            if repository:
                found += [f"part {part.name}: {problem}" for problem in [model_hub.problem(repository)] if problem]
            else:
                _named(part, stage, download=False)
        except UserError as error:
            found += error.problems
    return found


def resolve_parts(stage: Stage, weights: Pretrained | None = None, *, judges: bool = True,
                  download: bool = True) -> None:
    """Find and verify the sources of a stage's parts, and put them into `stage.sources`.

    `weights` is the snapshot or model folder whose weights the model will get, if any: then each part must have a
    source with the content that it had when they were trained. `judges`: also resolve the parts for evaluation alone;
    `download`: download from the hub what is not here. Raises UserError where a source is gone, damaged, or has other
    content.
    """
    for part in stage.parts():
        if part.is_judge and not judges:
            continue
        known = weights.parts.get(part.name) if weights else None
        if weights and known and _is_within(part, weights):
            stage.sources[part.name] = _of_note(known)
        elif weights and known:
            renamed = _is_renamed(part, stage, weights)
            stage.sources[part.name] = _same(part, known, weights, renamed=renamed, download=download)
        elif source := _named(part, stage, download=download):
            stage.sources[part.name] = _verified(part, source)
            log.info("Part %s: %s, from %s, SHA-256 %s", part.name, _training(part), source,
                     stage.sources[part.name].identity["sha256"])


def _is_within(part: Part, weights: Pretrained) -> bool:
    """Whether the files of `weights` hold the part's weights, so that its source is not read."""
    return not part.is_judge and (part.train == "whole" if weights.is_snapshot else part.export == "copy")


def source_options(stage: Stage) -> dict[str, Part]:
    """option -> the part whose source it names. Found by trial: with another value of the option, `parts` declares a
    part with that source."""
    found: dict[str, Part] = {}
    for name, (_, spec, _) in config.fields(type(stage.cfg)).items():
        if spec.path is not None:
            tried = type(stage)(replace(stage.cfg, **{name: _ELSEWHERE}), stage.folder)
            found |= {name: part for part in tried.parts() if part.source == _ELSEWHERE}
    return found


def _is_renamed(part: Part, stage: Stage, weights: Pretrained) -> bool:
    """Whether the option that names a part's source has another value now than when `weights` were trained."""
    return part.source != "" and any(
        each.name == part.name and weights.options.get(option, part.source) != part.source
        for option, each in source_options(stage).items())


def _of_note(known: Mapping[str, Any]) -> Pretrained:
    return Pretrained(Path(known["path"]), known["is_snapshot"], known["stage"], known["step"], known["options"],
                      noted=known)


def _named(part: Part, stage: Stage, *, download: bool) -> Pretrained | None:
    """The source that the user has named for a part; None for new weights."""
    if not part.source:
        if isinstance(part.train, Lora) or part.is_judge:
            raise UserError(_no_source(part, stage))
        return None
    with part.problems():
        found = find(part.source, part.stages, download=download)
    if part.stages and found.stage not in ("", *part.stages):
        raise UserError(f"part {part.name}: {found} is of stage {found.stage}, it takes weights of "
                        f"{' or '.join(part.stages)}")
    return found


def _no_source(part: Part, stage: Stage) -> str:
    option = next((f" with --{option}" for option, each in source_options(stage).items() if each.name == part.name), "")
    problem = f"part {part.name} needs trained weights: name a run, a snapshot or a model folder{option}"
    named = stage.cfg.init_from
    known = find(named, (stage.name,), download=False).parts.get(part.name) if named else None
    return f"{problem}; --init_from {named} was trained with those of {known['path']}" if known else problem


def _verified(part: Part, source: Pretrained) -> Pretrained:
    """The source with the options that its stage reads from it, after comparing its files with their digests."""
    if source.is_snapshot:
        manifest.verified(source.folder, ".safetensors")
        if source.run and source.run.holder() and part.train != "whole" and part.export != "beside":
            log.warning("part %s: %s is a snapshot of a run that still trains and may delete it, and this run reads it "
                        "whenever it is resumed: copy it, and name the copy", part.name, source)
    elif source.stage:
        _known(source.folder, weights=True)
    options: dict[str, Any] = {}
    if part.stages:
        options = reader(source, part.stages).options_from(source)
    elif not source.is_snapshot and (source.folder / "config.json").is_file():
        options = {"config": _described(source.folder)}
    return replace(source, options={**source.options, **options})


def _same(part: Part, known: Mapping[str, Any], weights: Pretrained, *, renamed: bool, download: bool) -> Pretrained:
    """Find the source that a part had in training, by its SHA-256. If the user names another one now (`renamed`), only
    that is read; else first the old place, then the copy beside the weights, then the one named. Raises UserError where
    none of these has that content."""
    copy = copied.beside(weights, part.name)
    download = download and copy is None
    places = [place for place in (known["path"], str(copy or ""), part.source) if place]
    if renamed and part.source != str(copy):
        places = [part.source]
    is_gone = places[0] == known["path"] and not (model_hub.parse(places[0]) or Path(places[0]).exists())
    why = f"{places[0]} is gone" if is_gone else ""
    for place in places:
        try:
            found = replace(find(place, download=download), options=known["options"], stage=known["stage"])
            digest = found.identity["sha256"]
        except (UserError, OSError) as error:
            why = why or str(error)
            continue
        if digest == known["sha256"]:
            return found
        why = why or f"{found.place} has other weights than before (SHA-256 {digest[:8]}...)"
    raise UserError(f"part {part.name}: {why}; bring back the weights with the SHA-256 {known['sha256'][:8]}..., which "
                    "are in no snapshot")


def _check_parts(weights: Pretrained, stage: Stage) -> None:
    """Raises UserError where `weights` were trained with other weights of a part than the stage has now."""
    for part in stage.parts():
        source = stage.sources.get(part.name)
        if source is None or source.noted or part.is_judge:
            continue
        if isinstance(part.train, Lora) and part.export == "copy" and not weights.is_snapshot:
            raise UserError(f"{weights} holds part {part.name} with its adapters merged, so they cannot be trained "
                            "further: name a snapshot of its run")
        known = weights.parts.get(part.name)
        if known is None:
            raise UserError(f"{weights} records no weights of part {part.name}: none were named, or an earlier version "
                            "wrote it; name none, or resume its run, which records them")
        if known["sha256"] != source.identity["sha256"]:
            raise UserError(f"{weights} was trained with other weights of part {part.name} than {source}: name those "
                            f"of {known['path']}")


def _training(part: Part) -> str:
    if part.is_judge:
        return "for evaluation alone"
    return "adapters are trained" if isinstance(part.train, Lora) else {"whole": "trained", "frozen": "frozen"}[
        part.train]
