"""How a stage's repeated blocks are run: compiled one by one, computed again in the backward pass."""

import os
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stoker import files
from stoker.config import UserError
from stoker.training.core.options import Options
from stoker.training.core.stage import Stage


def shape(stage: Stage, model: nn.Module, cfg: Options) -> None:
    """Do with the model's blocks what the options say. Names of weights stay as they are. Raises UserError."""
    blocks = stage.blocks(model)
    if cfg.gradient_checkpointing:
        checkpoint_blocks(blocks)
    if cfg.compile:
        compile_blocks(blocks or [model])


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile each module in place, anew for each shape it meets: static shapes give the same bits every time.

    The first forward pass does the work, and raises where there is no compiler to do it.
    """
    _keep_compiled()
    # the compiler looks at .grad of what goes into a block, and torch warns of it
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    for block in blocks:
        block.compile(dynamic=False)


def _keep_compiled() -> None:
    """What was compiled is found again by the next start."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.home() / "compiled"))


def restart_compile_workers() -> None:
    """End the processes and threads that torch.compile has started: those that it starts instead have the signal mask
    of the thread that calls it then (`Signals.children_spared`)."""
    from torch._inductor.async_compile import AsyncCompile, shutdown_compile_workers

    shutdown_compile_workers()
    AsyncCompile.pool.cache_clear()


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here, or ''."""
    _keep_compiled()
    try:
        torch.compile(lambda x: x.tanh() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:  # the base of all that torch.compile raises
        return f"torch.compile does not work here ({first_line(error)})"
    return ""


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """In training keep only what goes into each block (Chen et al. 2016, arXiv:1604.06174).

    The same random numbers are drawn the second time. Raises UserError where there are no blocks.
    """
    if not blocks:
        raise UserError("--gradient_checkpointing: this stage has no repeated blocks to compute again; leave it out")
    for block in blocks:
        block.forward = _checkpointed(block, block.forward)


def _checkpointed(block: nn.Module, forward: Any) -> Any:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return checkpointed
