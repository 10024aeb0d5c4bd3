"""Randomness: seeded once, kept in snapshots, and left alone by everything that only looks."""

import hashlib
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)  # every device's generator too


def begin(seed: int, step: int, phase: str, micro_batch: int) -> None:
    """Seed torch's generators for one micro-batch: what a forward pass draws depends on these four alone, not on what
    was drawn before nor on how many processes share the work."""
    key = hashlib.blake2b(f"{seed} {step} {phase} {micro_batch}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key))


def state_dict() -> dict[str, Any]:
    """The state of every global generator, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(np.array(keys)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_state_dict(state: dict[str, Any]) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        log.warning("the random state of %d GPUs cannot be given to the %d there are: dropout will differ",
                    len(state["cuda"]), torch.cuda.device_count())


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever the block draws, the run's randomness goes on as if it had not."""
    before = state_dict()
    try:
        yield
    finally:
        load_state_dict(before)
