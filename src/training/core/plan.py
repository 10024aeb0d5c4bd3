"""What a start computes, on which device and for how long: resolved once, for training, --info, --eval_only and replay.

    setup = resolve(LanguageModel, cfg, folder)     device, precision, threads; nothing is read yet
    setup.prepare()                                 sources of parts, data
    plan = setup.plan(typed)                        order, length, evaluations

Nothing rewrites a plan's config. What is found out later, such as whether the run is compiled, makes another plan.
"""

from collections.abc import Collection, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stoker.config import UserError
from stoker.data.loader import Order
from stoker.training.core import device as devices
from stoker.training.core import phases, pretrained
from stoker.training.core.evaluation import Evaluations
from stoker.training.core.options import OF_ONE_START, Options, resolve_length
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import Stage


@dataclass(frozen=True)
class Setup:
    """A stage on a device. `cfg` is the stage's config from here on."""

    stage: Stage
    cfg: Options  # with the precision and the threads that are used
    device: torch.device

    def __post_init__(self) -> None:
        self.stage.cfg = self.cfg

    def prepare(self, weights: Pretrained | None = None, *, download: bool = True) -> None:
        """Find the sources of the model's parts, downloading those of the hub if they may be, and read the data.
        `weights`: what the model will be filled from, if not from new ones. Raises UserError where either cannot be
        used."""
        pretrained.resolve_parts(self.stage, weights, download=download)
        self.stage.prepare()

    def reopen(self, weights: Pretrained | None = None) -> None:
        """Instead of `prepare`: find the sources of the parts of trained weights, and read no data."""
        if weights:
            pretrained.resolve_parts(self.stage, weights, judges=False)
        self.stage.reopen()

    def plan(self, typed: Collection[str]) -> "Plan":
        """The plan of a run on the data that were prepared; `typed` options keep their values. Raises UserError where
        there are no data, the options do not say how long to train, or phases cannot be as the stage declares them."""
        phases.check_declared(self.stage.phases())
        rows, order = _rows(self.stage), self.stage.order()
        cfg, notes = resolve_length(self.cfg, typed, order.steps_per_epoch)
        known = replace(self, cfg=cfg)  # before the stage says what it evaluates: that may depend on the length
        evaluations = Evaluations(known.stage, cfg, order.steps_per_epoch)
        return Plan(known.stage, cfg, self.device, order, evaluations, rows, tuple(notes))


@dataclass(frozen=True)
class Plan(Setup):
    """How a stage is trained. `cfg` has the run's length and all that depends on it."""

    order: Order  # which rows make up each step
    evaluations: Evaluations
    rows: int | None  # of the training data; None where they are a stream
    notes: tuple[str, ...]  # what the run's length has changed, or makes odd

    @property
    def steps(self) -> int:
        assert self.cfg.max_steps is not None
        return self.cfg.max_steps

    def with_compile(self, compile: bool) -> "Plan":
        """The same, compiled or not."""
        return replace(self, cfg=replace(self.cfg, compile=compile))

    def with_micro(self, rows: int) -> "Plan":
        """The same in micro-batches of so many rows, where memory does not suffice for more; 0: as the options say."""
        return replace(self, order=replace(self.order, micro=rows))


def resolve(kind: type[Stage], cfg: Options, folder: Path) -> Setup:
    """Choose device, precision and threads as the options say, and make the stage. Raises UserError where the device is
    not there."""
    devices.configure(cfg.threads)
    device = devices.choose(cfg.device)
    devices.permit(device, kind.nondeterministic)
    precision = devices.resolve_precision(device, cfg.precision if cfg.amp else "fp32")
    cfg = replace(cfg, precision=precision, threads=devices.threads(), **OF_ONE_START)
    return Setup(kind(cfg, folder), cfg, device)


def _rows(stage: Stage) -> int | None:
    """Rows of the training data; None where they are a stream. Raises UserError where there are none."""
    data = {split: stage.dataset(split) for split in ("train", "validation")}
    rows = {split: len(dataset) if isinstance(dataset, Sized) else None for split, dataset in data.items()}
    if empty := [split for split, count in rows.items() if count == 0]:
        raise UserError(f"there are no {' and no '.join(empty)} samples in the data: give more, or shorter samples")
    return rows["train"]
