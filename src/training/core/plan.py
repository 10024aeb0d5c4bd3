"""Device, precision, data, order and length of a run: resolved once, for training, --info, --eval_only and replay.

    setup = resolve(LanguageModel, cfg, folder)     choose device, precision, threads; read no data yet
    setup.prepare()                                 find the sources of parts, read the data
    plan = setup.plan(typed)                        order of the rows, length of the run, evaluations

The config of a plan never changes. What is decided later, such as whether the model is compiled, makes a new plan.
"""

from collections.abc import Collection, Sized
from dataclasses import dataclass, field, replace
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
    """A stage and the device that it runs on. Making one sets the stage's own `cfg` to this one."""

    stage: Stage
    cfg: Options  # with the precision and the number of threads in use, not "auto" or 0
    device: torch.device
    may_be_bf16: bool = False  # whether --precision auto leaves the precision to a trial of the model; fp32 until then

    def __post_init__(self) -> None:
        self.stage.cfg = self.cfg

    def prepare(self, weights: Pretrained | None = None, *, download: bool = True) -> None:
        """Find the sources of the model's parts and read the data. `weights`: the trained weights that the model will
        get, if any; `download`: whether sources may be downloaded from the hub. Raises UserError where a source or the
        data cannot be used."""
        self.stage.pretrained = weights
        pretrained.resolve_parts(self.stage, weights, download=download)
        self.stage.prepare()

    def reopen(self, weights: Pretrained | None = None) -> None:
        """Call this instead of `prepare` where no data are needed: it finds the sources of the parts of `weights`."""
        if weights:
            pretrained.resolve_parts(self.stage, weights, judges=False)
        self.stage.reopen()

    def plan(self, typed: Collection[str]) -> "Plan":
        """The plan of a run on the prepared data; the options in `typed` keep their values. Raises UserError where a
        split is empty, the options do not say how long to train, or phases cannot be as the stage declares them."""
        phases.check_declared(self.stage.phases())
        rows, order = _rows(self.stage), self.stage.order()
        cfg, notes = resolve_length(self.cfg, typed, order.steps_per_epoch)
        known = replace(self, cfg=cfg)  # sets stage.cfg first: what the stage evaluates may depend on the length
        evaluations = Evaluations(known.stage, cfg, order.steps_per_epoch)
        return Plan(known.stage, cfg, self.device, self.may_be_bf16, order=order, evaluations=evaluations, rows=rows,
                    notes=tuple(notes))


@dataclass(frozen=True)
class Plan(Setup):
    """How a stage is trained. `cfg` has the number of steps, and the intervals that depend on it."""

    order: Order = field(kw_only=True)  # which rows make up each step
    evaluations: Evaluations = field(kw_only=True)
    rows: int | None = field(kw_only=True)  # number of training rows; None for a stream
    # lines for the log: intervals that a short run changed, lengths that look like a mistake
    notes: tuple[str, ...] = field(kw_only=True)

    @property
    def steps(self) -> int:
        assert self.cfg.max_steps is not None
        return self.cfg.max_steps

    def with_precision(self, precision: str) -> "Plan":
        """This plan in another precision, which is then decided."""
        return replace(self, cfg=replace(self.cfg, precision=precision), may_be_bf16=False)

    def with_compile(self, compile: bool) -> "Plan":
        """This plan with compilation on or off."""
        return replace(self, cfg=replace(self.cfg, compile=compile))

    def with_micro(self, rows: int) -> "Plan":
        """This plan with micro-batches of `rows` rows, for want of memory; 0: as the options say."""
        return replace(self, order=replace(self.order, micro=rows))


def resolve(kind: type[Stage], cfg: Options, folder: Path) -> Setup:
    """Choose device, precision and threads by the options, and make the stage. Raises UserError where this machine does
    not have the device."""
    devices.configure(cfg.threads)
    device = devices.choose(cfg.device)
    devices.permit(device, kind.nondeterministic)
    asked = cfg.precision if cfg.amp else "fp32"
    precision = devices.resolve_precision(device, asked)
    cfg = replace(cfg, precision=precision, threads=devices.threads(), **OF_ONE_START)
    return Setup(kind(cfg, folder), cfg, device,
                 asked == "auto" and precision == "fp32" and devices.multiplies_bf16(device))


def _rows(stage: Stage) -> int | None:
    """The number of training rows, None for a stream. Raises UserError where a split has none."""
    data = {split: stage.dataset(split) for split in ("train", "validation")}
    rows = {split: len(dataset) if isinstance(dataset, Sized) else None for split, dataset in data.items()}
    if empty := [split for split, count in rows.items() if count == 0]:
        raise UserError(f"there are no {' and no '.join(empty)} samples in the data: give more, or shorter samples")
    return rows["train"]
