"""Optimizers and the learning rate."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from stoker.config import UserError
from stoker.training.core.muon import Muon
from stoker.training.core.options import Options
from stoker.training.core.parts import kept
from stoker.training.core.phases import Phase


def build(phase: Phase, model: nn.Module, cfg: Options, blocks: Iterable[nn.Module] = ()) -> torch.optim.Optimizer:
    """The optimizer of a phase. It has separate parameter groups for matrices and for vectors (biases, norms), since
    weight decay applies to matrices only, unless the phase's group sets its own. Muon updates the matrices and the
    convolutions within `blocks` only; embeddings and heads, whose rows belong to separate tokens or classes, are
    updated by AdamW."""
    make, groups = phase.optimizer or cfg.optimizer, []
    hidden = set(map(id, matrices_of(blocks))) if make == "muon" else set[int]()
    of_muon = {"matrix": True, "bf16": cfg.precision == "bf16"}
    for group, named in phase.parameters(model):
        matrices = [p for p in named.values() if p.dim() >= 2]
        for parameters, decay, more in (
                ([p for p in matrices if id(p) in hidden], cfg.weight_decay, of_muon),
                ([p for p in matrices if id(p) not in hidden], cfg.weight_decay, {}),
                ([p for p in named.values() if p.dim() < 2], 0.0, {})):
            if parameters:
                groups.append({"params": parameters, "lr_factor": group.lr_factor, **more,
                               "weight_decay": decay if group.weight_decay is None else group.weight_decay})
    if isinstance(make, str):
        if make not in OPTIMIZERS:
            raise UserError(f"phase {phase.name}: no optimizer is called {make}; there are {', '.join(OPTIMIZERS)}")
        make = OPTIMIZERS[make]
    return make(groups, cfg.lr, phase.betas)


def matrices_of(blocks: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The matrices of modules, the stacks of matrices that a module declares by name in `stacked`, and the weights of
    convolutions, which are matrices with a row for each channel they compute; not of grouped ones, whose channels share
    nothing."""
    for module in (module for block in blocks for module in block.modules()):
        whole = isinstance(module, nn.Conv2d) and module.groups == 1
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 or name in getattr(module, "stacked", ()) or (whole and name == "weight"):
                yield parameter


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), by default with GPT-2's betas.

    Fused: one pass over the parameters, and the device itself can drop an update (see `update`).
    """
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "muon": Muon}


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def update(optimizer: torch.optim.Optimizer, dropped: torch.Tensor) -> None:
    """Update the weights, unless `dropped` (a float scalar on the device) is 1: then nothing changes, nor does the
    optimizer count a step.

    An optimizer that supports torch's GradScaler by the attributes below, as torch's fused ones do, decides this on the
    device. For any other the host waits for `dropped`. It also waits while the optimizer has no state yet, since what
    torch's fused SGD writes into its state in a dropped first update is undefined.
    """
    if optimizer.state and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = dropped  # type: ignore[attr-defined]
        optimizer.step()
    elif not dropped:
        optimizer.step()


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group, multiplied by the group's own `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


class LossScale:
    """Keeps the small gradients of an fp16 backward pass from vanishing (Micikevicius et al. 2018, arXiv:1710.03740).

    The loss is multiplied by `value`, a scalar on the device, before the backward pass. An update that overflows halves
    it; 2,000 in a row without an overflow double it. Both happen on the device, so the host need not wait.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, value: float = 2.0**16):
        self.value = torch.tensor(value, device=device)
        self.good = torch.zeros((), device=device)  # updates in a row without an overflow

    def update(self, overflowed: torch.Tensor) -> None:
        """`overflowed` is a float scalar, 1 where this update was dropped."""
        good = (self.good + 1) * (1 - overflowed)
        grows = (good >= self.GROWTH_INTERVAL).float()
        self.value = self.value * (1 + grows) * (1 - overflowed / 2)
        self.good = good * (1 - grows)

    def state_dict(self) -> dict[str, float]:
        return {"value": float(self.value), "good": float(self.good)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.good = (torch.full_like(self.value, state[name]) for name in ("value", "good"))


def rate(step: int, steps: int, *, warmup: int, min_ratio: float, schedule: str) -> float:
    """The learning rate of update number `step` (from 0) as a share of its peak.

    A linear warm-up reaches the peak with update `warmup` - 1. The schedule then covers the rest of the `steps` updates
    and would end with update number `steps`, which is not made, so that no update has a rate of 0:
    cosine     half a cosine to min_ratio (Loshchilov & Hutter 2017, arXiv:1608.03983)
    linear     a straight line to min_ratio
    wsd        plateau, then a straight line over the last fifth (warm-up, stable, decay; arXiv:2404.06395)
    constant   the peak
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        height = 1 - done if schedule == "linear" else min(1.0, (1 - done) / 0.2)
    return min_ratio + (1 - min_ratio) * max(0.0, height)


def all_finite(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether all weights and buffers that a snapshot holds, and the optimizer states, are finite. Waits for the
    device."""
    tensors = [t for t in kept(model).values() if t.is_floating_point() and t.numel()]
    for optimizer in optimizers:
        tensors += [t for state in optimizer.state.values() for t in state.values()
                    if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() and t.dim()]
    return bool(torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()) if tensors else True
