"""A step that was not finite, or whose loss was a spike: what was bad first, which rows make it so, and all that is
needed to do it again.

    incidents/step_00000500/
        incident.json        step, where, loss, rows of the step, rows left out from then on, the last metrics
        batch.pt             the micro-batches; what is drawn for them follows from seed and step
        model.safetensors    the weights before the step
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from stoker import files, progress
from stoker.config import UserError
from stoker.training.core import device as devices
from stoker.training.core import networks, rng
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.parts import kept
from stoker.training.core.snapshots import load_weights, read_plain
from stoker.training.core.stage import Stage
from stoker.training.core.step import losses

NON_FINITE, SPIKE = "non-finite", "spike"  # why a run goes back


@dataclass(frozen=True)
class Findings:
    """Of a step that was done again: what was not finite first, '' where nothing was, and the mean loss."""

    where: str
    loss: str


@dataclass(frozen=True)
class Incident:
    """`step` counts from 1."""

    step: int
    why: str
    where: str
    loss: str
    rows: list[list[int]]
    left_out: list[int]
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of the last log steps before it
    ledger: list[dict[str, Any]] = field(default_factory=list)  # all rows left out so far: what --skip_rows reads


def examine(stage: Stage, model: nn.Module, batches: list[Batch], step: int, device: torch.device,
            precision: str) -> Findings:
    """What is not finite first when the forward and backward passes of a step (counted from 1) are done.

    Named in the order in which it comes about: "batch x", "output of blocks.0.mlp", "the loss", "gradient at the output
    of blocks.1", "gradient of head.weight". Model and randomness are left as they were.
    """
    found: list[str] = []
    ratios: list[Ratio] = []

    def note(where: str, tensor: Tensor) -> None:
        if not found and tensor.is_floating_point() and not tensor.isfinite().all():
            found.append(where)

    def seen(name: str, module: nn.Module, given: Any, output: Any) -> None:
        for tensor in _tensors(output):
            note(f"output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(note, f"gradient at the output of {name}"))

    hooks = [module.register_forward_hook(partial(seen, name or "the model")) for name, module in model.named_modules()]
    try:
        with rng.preserved(), _untouched(model):
            for i, batch in enumerate(batches):
                for name, value in batch.items():
                    for tensor in _tensors(value):
                        note(f"batch {name}", tensor)
                progress.mark()
                ratios += _passes(stage, model, batch, device, precision, note, step, i)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    note(f"gradient of {name}", p.grad)
    finally:
        for hook in hooks:
            hook.remove()
    total, count = (sum(float(value) for value in values) for values in zip(*ratios))
    return Findings(next(iter(found), ""), repr(total / count))


def bad_items(stage: Stage, model: nn.Module, items: Iterable[int], step: int, device: torch.device,
              precision: str) -> list[int]:
    """Those items of a step (counted from 1) that alone, in evaluation mode, make a loss or a gradient that is not
    finite."""
    dataset, bad = stage.dataset("train"), []
    with rng.preserved(), _untouched(model):
        model.eval()
        for item in items:
            progress.mark()
            finite: list[Tensor] = []
            model.zero_grad(set_to_none=True)
            batch = devices.move(stage.collate([dataset[item]]), device)
            _passes(stage, model, batch, device, precision, lambda where, t: finite.append(t.isfinite().all()), step)
            finite += [p.grad.isfinite().all() for p in model.parameters() if p.grad is not None]
            if not torch.stack(finite).all():
                bad.append(item)
    return bad


def _passes(stage: Stage, model: nn.Module, batch: Batch, device: torch.device, precision: str,
            note: Any, step: int, number: int | None = None) -> list[Ratio]:
    """The loss of each phase that the step has."""
    found = []
    for loss in losses(stage, model, batch, device, precision, [range(step - 1, step)], number):
        note("the loss", loss.total)
        loss.total.backward()
        found.append(Ratio(loss.total.detach(), loss.count))
    return found


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has no gradients, and buffers and mode are as they were."""
    mode, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        model.zero_grad(set_to_none=True)
        model.train(mode)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# -- on disk --------------------------------------------------------------------------------------------------------


def write(folder: Path, incident: Incident, model: nn.Module, batches: list[Batch]) -> Path:
    """Keep what `replay` needs; an incident of the same step is replaced."""
    path = folder / f"step_{incident.step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().cpu().clone() for name, t in kept(model).items()}  # tied ones apart
    files.write(path / "model.safetensors", safetensors.torch.save(weights))
    batches = [devices.move(batch, torch.device("cpu")) for batch in batches]
    files.write(path / "batch.pt", lambda file: torch.save(batches, file))
    files.write_json(path / "incident.json", asdict(incident))
    return path


def read(path: Path) -> Incident:
    """The incident in a folder, or in the JSON file itself. Raises UserError where there is none."""
    file = path if path.is_file() else path / "incident.json"
    try:
        return Incident(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        why = files.reason(error) if isinstance(error, OSError) else "holds something else"
        raise UserError(f"{file} is no incident of a run (result/RUN/incidents/step_00000500/incident.json): {why}"
                        ) from error


def replay(path: Path, stage: Stage, device: torch.device, precision: str) -> Findings:
    """What comes of the incident's step when it is done again. Raises UserError where it cannot be read."""
    model = networks.build(stage, device).train()
    load_weights(path, model)
    batches = read_plain(path / "batch.pt")
    return examine(stage, model, [devices.move(batch, device) for batch in batches], read(path).step, device, precision)
