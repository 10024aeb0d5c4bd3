"""Snapshots of a run: the only reader and writer of them.

    snapshots/snapshot_step_00005000/        or snapshot_epoch_0010/
        model.safetensors    weights
        state.pt             everything else of the trainer: plain values and tensors
        manifest.json        written last: format, step, sizes and SHA-256 of the others, what made it, and its own

A snapshot is packed in memory first, a copy that training goes on beside, and then written under a hidden name, file
by file, each fsynced, and renamed: the rename is the commit. It is read back and verified before an older one may go:
which ones go is decided by a callback (`training/callbacks/rotation.py`), after that.
Reading cannot run code: safetensors, and torch.load(weights_only=True). Reading back proves what the page cache holds,
not what a disk that lies about fsync would return after a power cut.
"""

import errno
import hashlib
import io
import json
import logging
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stoker import files
from stoker.config import UserError
from stoker.training.core import manifest
from stoker.training.core.parts import kept, left_out

log = logging.getLogger(__name__)

WEIGHTS, STATE = "model.safetensors", "state.pt"
SPARE = 2**20  # bytes beside a snapshot's own: folders, the manifest, the lines of the log


@dataclass(frozen=True)
class Packed:
    """A snapshot in memory, every file of it as it will stand on disk."""

    name: str
    step: int
    content: Mapping[str, memoryview]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(len(part) for part in self.content.values())


def pack(name: str, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> Packed:
    """Copy aside what a snapshot is to hold: what becomes of the tensors afterwards does not matter. Raises UserError
    where the state could not be read again."""
    if found := unsavable(state, "the trainer's state"):
        raise UserError(f"no snapshot can be made: {found}, which cannot be read again; a stage, a callback or an "
                        "optimizer must keep plain values and tensors")
    tensors, aliases = _without_aliases(weights)
    rest = io.BytesIO()
    torch.save(state, rest)
    return Packed(name, step, {
        WEIGHTS: memoryview(safetensors.torch.save(tensors, {"aliases": json.dumps(aliases)})),
        STATE: rest.getbuffer()})


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one run. `made_by` is noted in each manifest: versions, device, code."""

    folder: Path
    made_by: Mapping[str, Any]

    # -- writing ------------------------------------------------------------------------------------------------

    def save(self, packed: Packed) -> Path:
        """Write, verify, commit; the older ones are untouched. Raises OSError or Damaged."""
        hidden, path = self.folder / f".{packed.name}", self.folder / packed.name
        for half_done in self.folder.glob(".snapshot_*"):
            shutil.rmtree(half_done, ignore_errors=True)
        self.check_room(packed.size)
        hidden.mkdir()
        for name, content in packed.content.items():
            files.write(hidden / name, content)
        manifest.write(hidden, packed.step, {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                                             for name, content in packed.content.items()}, self.made_by)
        manifest.verify(hidden)
        self._commit(hidden, path)
        return path

    def check_room(self, size: int) -> None:
        """Raises OSError, as a write would, where so many bytes do not fit."""
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE:
            raise OSError(errno.ENOSPC, f"No space left on device: a snapshot takes {size:,} bytes, {free:,} are free",
                          str(self.folder))

    def _commit(self, hidden: Path, path: Path) -> None:
        """Rename; where a snapshot of this name stands already, it is moved aside until the new one is in place."""
        aside = path.with_name(f".aside.{path.name}")
        if os.path.lexists(path):
            os.replace(path, aside)
        os.replace(hidden, path)
        files.sync_folder(self.folder)
        _remove(aside)

    def keep_only(self, steps: Set[int]) -> None:
        """Delete every snapshot but those of these steps, the newest, and those that another process reads just now.
        Raises OSError where one cannot be deleted."""
        for path in self._ours()[:-1]:
            if manifest.step_of(path) in steps:
                continue
            hidden = path.with_name(f".old.{path.name}")
            with manifest.lock_for_deleting(path) as alone:
                if alone:
                    os.replace(path, hidden)  # a snapshot that is being deleted is no snapshot any more
            if alone:
                shutil.rmtree(hidden)

    def steps(self) -> list[int]:
        """The steps of which there are snapshots that may be deleted, oldest first."""
        return [manifest.step_of(path) for path in self._ours()]

    def _ours(self) -> list[Path]:
        """What has no manifest that can be read, or is a link, is not ours to delete, and does not count."""
        return [path for path in self.found() if manifest.step_of(path) >= 0 and not path.is_symlink()]

    def set_aside_after(self, step: int) -> None:
        """The run goes on from `step`: later snapshots are of a course it left, and must not be taken for its own.

        What is damaged is set aside too, under a name that says so: nobody but the user deletes it.
        """
        for path in self.found():
            if not 0 <= manifest.step_of(path) <= step:
                aside = path.with_name(f"{'abandoned' if _is_whole(path) else 'damaged'}_{path.name}")
                log.warning("%s is not of the course from step %d on: it is kept as %s", path.name, step, aside.name)
                _remove(aside)
                os.replace(path, aside)

    def tidy(self) -> None:
        """Clear away what a kill left half done. Only for the holder of the run's lock."""
        for hidden in [*self.folder.glob(".snapshot_*"), *self.folder.glob(".old.*"), *self.folder.glob(".aside.*")]:
            name = hidden.name.removeprefix(".aside.")
            if name != hidden.name and not (self.folder / name).exists():
                os.replace(hidden, self.folder / name)
            else:
                _remove(hidden)

    # -- finding ------------------------------------------------------------------------------------------------

    def found(self) -> list[Path]:
        return manifest.found(self.folder)

    def newest_good(self, before: float = math.inf) -> Path | None:
        return manifest.newest_good(self.folder, before)

    def at_step(self, step: int) -> Path | None:
        return next((path for path in self.found() if manifest.step_of(path) == step), None)

    # -- reading ------------------------------------------------------------------------------------------------

    def load(self, path: Path, model: nn.Module) -> dict[str, Any]:
        """Put a snapshot's weights into the model and return the rest. Raises UserError if it is not for it."""
        load_weights(path, model)
        state = read_plain(path / STATE)
        if not isinstance(state, dict):
            raise UserError(f"{path / STATE} is not the state of a run: name another snapshot")
        return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a snapshot's weights into the model, whose parts have those of their sources already; every name and shape
    must fit. Raises UserError and Damaged."""
    try:
        with safetensors.safe_open(path / WEIGHTS, "pt") as file:
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}
        weights |= {alias: weights[name] for alias, name in aliases.items()}
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError) as error:  # its checksum is right
        raise UserError(f"{path / WEIGHTS} holds no weights that can be read ({error}); name others") from error
    absent, state = left_out(model), model.state_dict()
    weights = {name: tensor for name, tensor in weights.items()
               if not (name in absent and torch.equal(tensor, state[name].cpu()))}  # older snapshots have them too
    _check_shapes(path, weights, kept(model))
    model.load_state_dict(weights, strict=False)  # what is missing is of a source


def _check_shapes(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    here = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    different = [name for name in here | there if here.get(name) != there.get(name)]
    if different:
        first = different[0]
        raise UserError(f"snapshot {path} is of another model: {first} is {there.get(first, 'not in it')} there and "
                        f"{here.get(first, 'not in it')} here, and so for {len(different)} of {len(here | there)} "
                        "tensors; give the options that it was trained with")


def read_plain(path: Path) -> Any:
    """What `torch.save` wrote of plain values and tensors. Raises UserError for all else, and runs nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError,
            AttributeError, AssertionError) as error:
        raise UserError(f"{path} holds something else than plain values and tensors, or is broken; it was not run, and "
                        f"is not used ({' '.join(str(error).split())[:200]})") from error


def unsavable(value: Any, where: str = "") -> str:
    """The first thing in a value that no snapshot can hold, such as "['x'][0] is <function ...>"; '' where all of it
    can be saved and read again. Copies no tensors."""
    if value is None or type(value) in (bool, int, float, str, bytes, Tensor, nn.Parameter):
        return ""
    if type(value) not in (dict, list, tuple):
        return "" if _can_be_read_again(value) else f"{where} is {' '.join(repr(value).split())[:80]}"
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inside = (unsavable(key, f"the key {key!r} of {where}") or unsavable(inner, f"{where}[{key!r}]")
              for key, inner in items)
    return next(filter(None, inside), "")


def _can_be_read_again(value: Any) -> bool:
    packed = io.BytesIO()
    try:
        torch.save(value, packed)
        torch.load(io.BytesIO(packed.getbuffer()), weights_only=True)
        return True
    except Exception:  # whatever the value's own code raises
        return False


def _is_whole(path: Path) -> bool:
    try:
        manifest.verify(path)
        return True
    except manifest.Damaged:
        return False


def _remove(path: Path) -> None:
    """Delete a folder with what is in it, or a file or link; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _without_aliases(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under one name each, and the further names of those that are shared (tied weights)."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
    return {name: t.contiguous() for name, t in weights.items() if name not in aliases}, aliases
