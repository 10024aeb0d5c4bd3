"""Entries of a model's parts, kept on the device until the log step shows how they are distributed."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stoker.training.core.media import Histogram

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

BINS = 60


def show(trainer: "Trainer", kind: str, entries: dict[str, Tensor]) -> None:
    """Show the entries of each part as `<kind>/<part>/histogram`. One transfer brings all of them to the host."""
    if not entries:
        return
    ends = np.cumsum([len(own) for own in entries.values()])[:-1]
    values = torch.cat(list(entries.values())).cpu().double().numpy()
    for part, own in zip(entries, np.split(values, ends)):
        if (finite := own[np.isfinite(own)]).size:
            trainer.show(f"{kind}/{part}/histogram", Histogram(*np.histogram(finite, BINS)))
