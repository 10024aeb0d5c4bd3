"""Initialization from data before step 0, such as a codebook by k-means, or a layer that whitens its inputs."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from stoker import progress
from stoker.config import UserError
from stoker.data.loader import Order
from stoker.data.workers import Abandoned, close
from stoker.training.core import device as devices
from stoker.training.core import parts, rng
from stoker.training.core.figures import Batch
from stoker.training.core.signals import Interrupted, Signals
from stoker.training.core.stage import Stage

log = logging.getLogger(__name__)


def initialize(stage: Stage, model: nn.Module, order: Order, read: Callable[[Order], Iterator[Batch]],
               device: torch.device, signals: Signals) -> None:
    """Call the stage's `initialize` with a new model and the first training batches; `read(order)` yields these.

    Rows on a skip list are read too. So a run that has the list from the start computes the same bits as one that got
    the list later, when it had been initialized. Raises UserError where the result is not finite, ValueError where the
    stage changed a tensor that it must not change, Interrupted where a stop was asked for meanwhile.
    """
    if type(stage).initialize is Stage.initialize:
        return
    if stage.cfg.init_from:
        log.info("Not initialized from data: the weights are those of --init_from")
        return
    fixed = [(name, tensor, tensor._version) for name, tensor in _fixed(stage, model).items()]
    position = order.state_dict(0)
    model.eval()
    with rng.preserved(), torch.no_grad(), devices.autocast(device, stage.cfg.precision):
        rng.begin(stage.cfg.seed, 0, "initialize", 0)
        stage.initialize(model, _batches(lambda: read(replace(order, left_out={})), device, signals))
    model.train()
    order.load_state_dict(0, position)
    now = _fixed(stage, model)
    if changed := [name for name, tensor, version in fixed
                   if now.get(name) is not tensor or tensor._version != version]:
        raise ValueError(f"initialize() of stage {stage.name} has changed {changed[0]}, which has a source or is in no "
                         "snapshot: a resumed run would not have the change")
    if bad := [name for name, tensor in parts.kept(model).items() if not tensor.isfinite().all()]:
        raise UserError(f"initialize() of stage {stage.name} left NaN or infinity in {bad[0]}: look for such values in "
                        "the first rows of the training data")
    log.info("Initialized from the first training batches")


def _batches(read: Callable[[], Iterator[Batch]], device: torch.device, signals: Signals) -> Iterator[Batch]:
    """The batches, on the device. `read` is called when the stage reads the first one, so maybe never."""
    batches = read()
    try:
        for batch in batches:
            progress.mark()
            if signals.stop:
                raise Interrupted(signals.stop)
            yield devices.move(batch, device)
    except Abandoned:
        raise Interrupted(signals.stop) from None
    finally:
        close(batches)


def _fixed(stage: Stage, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the stage must not change: weights of parts that have a source, and what no snapshot holds."""
    saved = parts.kept(model)
    sourced = [part for part in stage.parts() if part.train == "whole" and part.name in stage.sources]
    return {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if name not in saved or any(part.holds(name) for part in sourced)}
