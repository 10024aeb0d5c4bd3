"""Builds a stage's model: loads the weights of its parts from their sources, freezes parts, adds adapters."""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor, nn

from stoker import progress
from stoker.config import UserError
from stoker.training.core import adapters, from_transformers, rng
from stoker.training.core.device import DTYPES
from stoker.training.core.parts import LEFT_OUT, Lora, Part, left_out
from stoker.training.core.stage import Stage, reader

if TYPE_CHECKING:
    from stoker.training.core.pretrained import Pretrained


def build(stage: Stage, device: torch.device | str) -> nn.Module:
    """The model of a stage whose sources were resolved; also builds the judges of its evaluations. Raises UserError
    where the weights of a source do not fit, cannot be read or hold NaN."""
    model = stage.model()
    for part in stage.parts():
        source = stage.sources.get(part.name)
        if not part.is_judge:
            _place(part, source, model)
        elif source and part.name not in stage.judges:
            stage.judges[part.name] = _judge(part, source).to(device)
    return model.to(device)


def merged(stage: Stage, model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: the model as it is exported, with adapters merged in parts that are exported as a copy."""
    return adapters.merged([model.get_submodule(part.name) for part in stage.parts()
                            if isinstance(part.train, Lora) and part.export == "copy"])


def _place(part: Part, source: "Pretrained | None", model: nn.Module) -> None:
    network = model.get_submodule(part.name)
    reads = source is not None and not source.noted  # else the weights are new, or come with those of the whole model
    if part.dtype:
        _convert(network, DTYPES[part.dtype])
    if source and reads:
        fill(network, source, part)
    if part.train == "whole":
        return
    unchanged = network.state_dict(keep_vars=True)
    if isinstance(part.train, Lora):
        if not reads:  # merged already
            return
        unchanged = {name: tensor for name, tensor in unchanged.items() if isinstance(tensor, nn.Parameter)}
        adapters.add(network, part.train, part.name)
    else:
        freeze(network)
    if reads:
        setattr(model, LEFT_OUT, left_out(model) | {f"{part.name}.{name}" for name in unchanged})


def _judge(part: Part, source: "Pretrained") -> nn.Module:
    assert part.build
    with rng.preserved():  # training draws the same numbers without a judge
        network = part.build()
    if part.dtype:
        _convert(network, DTYPES[part.dtype])
    fill(network, source, part)
    freeze(network)
    return network


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert weights and buffers to a dtype; not the buffers that no state dict has: computed tables, as of angles."""
    tables = [(module._buffers, name, module._buffers[name]) for module in network.modules()
              for name in module._non_persistent_buffers_set]
    network.to(dtype)
    for buffers, name, table in tables:
        buffers[name] = table


def freeze(network: nn.Module) -> None:
    """No gradients, and evaluation mode, whatever `train()` of the whole model says."""
    network.requires_grad_(False).eval()
    network.train = partial(_stay, network)  # type: ignore[method-assign]


def trained_modules(model: nn.Module) -> list[nn.Module]:
    """All modules but those of frozen parts."""
    frozen = {inner for module in model.modules() if "train" in vars(module) for inner in module.modules()}
    return [module for module in model.modules() if module not in frozen]


def _stay(network: nn.Module, mode: bool = True) -> nn.Module:
    return network


# -- weights --------------------------------------------------------------------------------------------------------


def fill(network: nn.Module, source: "Pretrained", part: Part) -> None:
    """Load the weights of a part's source into the network, one tensor at a time. A network on the meta device gets its
    memory by that. Raises UserError where the weights do not fit, cannot be read or hold NaN."""
    where = f"part {part.name}: the weights {part.prefix and f'{part.prefix}* '}of {source.place}"
    if part.stages and not source.is_snapshot and not part.prefix:
        kind = reader(source, part.stages)
        kind(kind.Config(), source.folder).load(network, source.folder)
    else:
        try:
            tensors = _tensors(source.folder, part)
            if from_transformers.is_pretrained_model(network):
                from_transformers.fill(network, tensors, where)
            else:
                _fill_by_name(network, tensors, where)
        except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
    source.check_unchanged()
    state = network.state_dict()
    if empty := [name for name, tensor in [*state.items(), *network.named_buffers()] if tensor.is_meta]:
        raise ValueError(f"part {part.name}: {empty[0]} is on the meta device, and {source} does not have it")
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"part {part.name}: {source} cannot be used: {len(bad)} of its {len(state)} tensors hold NaN "
                        f"or infinity, the first is {bad[0]}; name other weights")


def _fill_by_name(network: nn.Module, tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    ours: dict[str, Tensor] = network.state_dict(keep_vars=True)  # tied ones are the same object
    made: dict[str, Tensor] = {}  # new tensors in place of those on the meta device
    filled: set[int] = set()

    def refuse(name: str, there: Any, here: Any) -> None:
        raise UserError(f"{where} do not fit: {name} is {there} there and {here} here; name others")

    for name, tensor in tensors:
        if name not in ours or ours[name].shape != tensor.shape:
            refuse(name, tuple(tensor.shape), tuple(ours[name].shape) if name in ours else "missing")
        filled.add(id(ours[name]))
        if ours[name].is_meta:
            made[name] = tensor.to(ours[name].dtype, copy=True)  # the file may be mapped, and change
        else:
            with torch.no_grad():
                ours[name].copy_(tensor)
    for name, tensor in ours.items():
        if id(tensor) not in filled:
            refuse(name, "missing", tuple(tensor.shape))
    network.load_state_dict(_tied(ours, made), strict=False, assign=True)


def _tied(ours: dict[str, Tensor], made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The new tensors under all names of the tied tensors that they replace, as parameters where these were."""
    first = {id(ours[name]): (nn.Parameter(tensor, ours[name].requires_grad)
                              if isinstance(ours[name], nn.Parameter) else tensor) for name, tensor in made.items()}
    return {name: first[id(tensor)] for name, tensor in ours.items() if id(tensor) in first}


def _tensors(folder: Path, part: Part) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the folder's safetensors whose names begin with the part's prefix; the name is without the
    prefix, and both are converted by the part's table if it has one."""
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        with safetensors.safe_open(path, "pt") as file:
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
            for name in [*file.keys(), *aliases]:
                if name.startswith(part.prefix):
                    found = name.removeprefix(part.prefix), file.get_tensor(aliases.get(name, name))
                    with part.problems():
                        renamed = part.names(*found) if part.names else found
                    if renamed:
                        yield renamed
                    progress.mark()
