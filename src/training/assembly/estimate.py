"""What a run will take, in memory and time: measured on a throwaway copy of its model before it begins."""

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from stoker import progress
from stoker.config import UserError
from stoker.daemon.table import duration, size
from stoker.data.loader import stretches
from stoker.training.assembly.length import Length
from stoker.training.core import blocks, contract, networks, optim, rng
from stoker.training.core import device as devices
from stoker.training.core.evaluation import score_batch
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch
from stoker.training.core.muon import Muon
from stoker.training.core.parts import left_out
from stoker.training.core.plan import Plan
from stoker.training.core.snapshots import pack
from stoker.training.core.step import losses

log = logging.getLogger(__name__)

MUCH = 1 / 3  # of a run's time: if evaluations take more, their share is reported
BUSY = 1.3  # times: measurements that scatter more are not trusted
FEWEST, MOST = 3, 7  # rounds of measurements
ROUNDS_SECONDS = 3.0  # after which there are no further rounds
ENOUGH_SECONDS = 0.2  # of forward and backward: a bigger batch gives the same figures
BIG_ENOUGH_SECONDS = 0.01  # shortest matrix product whose speed counts as the peak
SCRATCH = 2**21  # numbers updated, and saved, to see how long the optimizer and a snapshot take
FINISH_SECONDS = 4.0  # of models, plots and the last lines of the log, whatever the model


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


# torch's counter knows the attention kernels of GPUs only. As there, a causal mask does not halve the count.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and floating-point operations, of this model on this device."""

    device: str
    parameters: int
    sample_seconds: float  # forward and backward
    scored_seconds: dict[str, float]  # of a sample in each evaluation, reading included
    update_seconds: float  # of the optimizer
    sample_flops: float  # forward and backward, as counted
    peak_flops: float  # per second, of bare matrix products
    kept_bytes: int  # for the backward pass, whatever the batch
    kept_bytes_per_sample: int
    tried_size: int = 2  # samples in the batches that were timed
    compile_seconds: float = 0.0
    compiled_speedup: float = 0.0  # 0: not tried
    waiting_seconds: float = 0.0  # that training waits for the data of a sample
    shown_seconds: float = 0.0  # of the samples that an evaluation shows
    saved_seconds: float = 0.0  # of a snapshot
    start_seconds: float = 0.0  # from the start of the program to the first step
    frozen: int = 0  # of the parameters, those that are neither trained nor in a snapshot
    frozen_bytes: int = 0
    scatter: float = 1.0  # times: how far apart the measurements lie; above BUSY all seconds are for an idle machine

    def seconds(self, length: Length) -> float:
        """Of the whole run, from the start of the program to its end, on an idle machine."""
        return (self.start_seconds + length.steps * self.step_seconds(length)
                + length.evaluations * self.evaluation_seconds(length) + FINISH_SECONDS)

    def step_seconds(self, length: Length) -> float:
        """Of a step, its share of the snapshots included, the mean."""
        return self.update_seconds + (length.samples * (self.sample_seconds + self.waiting_seconds)
                                      + length.snapshots * self.saved_seconds) / length.steps

    def evaluation_seconds(self, length: Length) -> float:
        """Of the evaluations of a step, with the samples that they show, the mean."""
        scored = sum(rows * self.scored_seconds.get(name, 0.0) for name, rows in length.scored.items())
        return scored / length.evaluations + self.shown_seconds

    @property
    def busy(self) -> bool:
        return self.scatter > BUSY

    def memory(self, batch_size: int) -> dict[str, int]:
        """Bytes: fp32 weights and gradients, AdamW's two moments, what a micro-batch keeps for the backward, and, on
        the host, the copy of weights and moments that is written as a snapshot meanwhile."""
        weights = 4 * (self.parameters - self.frozen)
        return {"weights": weights + self.frozen_bytes, "gradients": weights, "optimizer": 2 * weights,
                "activations": self.kept_bytes + batch_size * self.kept_bytes_per_sample, "snapshot": 3 * weights}

    def describe(self, length: Length, batch_size: int) -> str:
        memory = {name: size(number) for name, number in self.memory(batch_size).items()}
        return (f"Estimate: {duration(self.seconds(length))} for {length.steps:,} steps"
                f"{' on an idle machine' if self.busy else ''}{self.of_evaluations(length)}; "
                f"{self.sample_flops / 1e9:.3g} GFLOP a sample, "
                f"{self.sample_flops / self.sample_seconds / self.peak_flops:.0%} of the "
                f"{self.peak_flops / 1e9:,.0f} GFLOP/s of bare matrix products here; memory: "
                + ", ".join(f"{name} {number}" for name, number in memory.items()))

    def of_evaluations(self, length: Length) -> str:
        """The share of the evaluations and how to reduce it, `, of which evaluations take 62% (...)`; '' where it is
        small."""
        share = length.evaluations * self.evaluation_seconds(length) / self.seconds(length)
        others = ", --eval_max_rows or --no_samples" if self.shown_seconds else " or --eval_max_rows"
        return (f", of which evaluations take {share:.0%} (less with a larger --eval_interval{others})" if share > MUCH
                else "")


def read(path: Path) -> Estimate | None:
    """What was written when the run began; None where it was not, or by another version."""
    try:
        found = Estimate(**json.loads(path.read_text()))
        return found if isinstance(found.scored_seconds, dict) else None
    except (OSError, ValueError, TypeError):
        return None


def measure(plan: Plan) -> Estimate:
    """Forward and backward passes of rows of the training set on a copy of the model; nothing of the run is touched.

    The copy is not compiled: `try_compiled` finds what that would change.
    """
    cfg, device = plan.cfg, plan.device
    with rng.preserved(), room_for_two(device):
        trial, size, _ = begin_trial(plan)
        reading, counts = in_turn({"read": lambda: trial.batches(size)}, device), trial.counts(size)
        rounds, shown = in_turn(trial.works(size), device), trial.shown() if cfg.samples else Took(0.0, 0.0)
        busy = rounds.scatter > BUSY
        read = reading.seconds("read", busy) / sum(counts)
        step, *scored = (statistics.mean(rounds.seconds(f"{work} {i}", busy) / count for i, count in enumerate(counts))
                         for work in ("step", *trial.shared))
        workers = devices.loader_workers(device, cfg.num_workers)
        waiting, *late = (max(0.0, read / workers - work) if workers else read for work in (step, *scored))
        fixed, each = trial.kept()
        trained = trial.parameters - trial.frozen
        return Estimate(
            devices.describe(device), trial.parameters, step,
            dict(zip(trial.shared, map(sum, zip(scored, late)))) | trial.others(size, busy),
            _update_seconds(device) * trained + trial.muon_seconds(), trial.flops(size),
            peak_flops(device, cfg.precision), fixed, each, size, waiting_seconds=waiting,
            shown_seconds=shown.computing if busy else shown.wall, saved_seconds=_saved_seconds() * trained,
            frozen=trial.frozen, frozen_bytes=trial.frozen_bytes, scatter=rounds.scatter)


def begin_trial(plan: Plan) -> "tuple[Trial, int, float]":
    """A trial of the plan, after checks of what its stage returns; how many samples make a batch worth timing, and how
    many seconds of computing one of them took."""
    trial = Trial(plan)
    contract.check_start(plan.stage, plan.order, plan.steps, trial.batches(min(contract.FEW, plan.cfg.batch_size)))
    size, seconds = trial.choose_size()
    return trial, size, seconds / statistics.mean(trial.counts(size))


@contextmanager
def room_for_two(device: torch.device) -> Iterator[None]:
    """Raises UserError where the memory does not suffice for the smallest trial."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise UserError(f"the model does not fit into the memory of {devices.describe(device)} with two samples: "
                        "choose a smaller preset, shorter samples, --gradient_checkpointing or --precision bf16 "
                        f"({str(error).splitlines()[0]})") from error


@lru_cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a matrix product that is big enough to take a while: the best of a few."""
    size, seconds = 256, 0.0
    while seconds < BIG_ENOUGH_SECONDS and size < 16384:
        size *= 2
        a = torch.randn(size, size, device=device).to(devices.DTYPES[precision])
        seconds = min(timed(lambda: a @ a, device).computing for _ in range(4))
    return 2 * size**3 / seconds


# -- timing ---------------------------------------------------------------------------------------------------------


class Took(NamedTuple):
    """Seconds of a piece of work by the clock on the wall, and those in which the thread that trains was computing.

    On a CPU `computing` is what `wall` would be on an idle machine, since it stands still while other programs have the
    cores. It does not count what a GPU does, so for a GPU both are the time on the wall.
    """

    wall: float
    computing: float


@dataclass(frozen=True)
class Rounds:
    """What several works took, each once in every round."""

    took: dict[str, list[Took]]

    @property
    def scatter(self) -> float:
        """How many times as long as on an idle machine the slowest round took: about 1 on an idle machine."""
        rounds: list[tuple[Took, ...]] = list(zip(*self.took.values()))
        return (max(sum(took.wall for took in each) for each in rounds)
                / min(sum(took.computing for took in each) for each in rounds))

    def seconds(self, work: str, busy: bool) -> float:
        """The median; on a busy machine, of what it would be on an idle one."""
        return statistics.median(took.computing if busy else took.wall for took in self.took[work])

    def ratio(self, work: str, other: str) -> float:
        """How many times as long as the other a work takes: the median of all rounds, of computing alone."""
        return statistics.median(a.computing / b.computing for a, b in zip(self.took[work], self.took[other]))


def in_turn(works: Mapping[str, Callable[[], Any]], device: torch.device, most: int = 0) -> Rounds:
    """Do all works in turn, several times (at most `most`, by default MOST), so that what slows the machine down for a
    while slows down all of them."""
    took: dict[str, list[Took]] = {name: [] for name in works}
    rounds, end = 0, time.perf_counter() + ROUNDS_SECONDS
    while rounds < FEWEST or (rounds < (most or MOST) and time.perf_counter() < end):
        rounds += 1
        for name, work in works.items():
            took[name].append(timed(work, device))
    return Rounds(took)


def timed(work: Callable[[], Any], device: torch.device) -> Took:
    devices.wait(device)
    wall, computing = time.perf_counter(), time.thread_time()
    work()
    devices.wait(device)
    progress.mark()
    wall = time.perf_counter() - wall
    return Took(wall, time.thread_time() - computing if device.type == "cpu" else wall)


class _Example(NamedTuple):
    """A micro-batch, and the steps in which such rows may be trained on."""

    batch: Batch
    steps: Sequence[range]


class Trial:
    """A model of its own, and batches of training rows to try it on."""

    def __init__(self, plan: Plan, *, compiled: bool = False):
        stage = plan.stage
        self.stage, self.cfg, self.device = stage, plan.cfg, plan.device
        self.order, self.evaluations = plan.order, plan.evaluations
        self.rows: Any = stage.dataset("train")
        self.shared = {each.name: each for each in self.evaluations.declared  # its batches are as those of training
                       if each.rows == stage.dataset and each.collate == stage.collate}
        self.model = networks.build(stage, plan.device).train()
        blocks.shape(stage, self.model, replace(plan.cfg, compile=compiled))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        absent = [p for name, p in self.model.named_parameters() if name in left_out(self.model)]
        self.frozen, self.frozen_bytes = sum(p.numel() for p in absent), sum(p.nbytes for p in absent)

    def batches(self, size: int) -> list[_Example]:
        """Micro-batches of at most so many samples, of all lengths that there are."""
        who = f"stage {self.stage.name}"
        return [_Example(devices.move(contract.checked_batch(who, self.stage.collate([self.rows[row] for row in rows])),
                                      self.device), self.order.steps_of(rows[0])) for rows in self.order.examples(size)]

    def counts(self, size: int) -> list[int]:
        """How many samples each of these batches has."""
        return [len(rows) for rows in self.order.examples(size)]

    def works(self, size: int) -> dict[str, Callable[[], None]]:
        """What is timed: forward and backward of each batch, and its evaluations."""
        batches = list(enumerate(self.batches(size)))
        return {**{f"step {i}": partial(self._passes, example) for i, example in batches},
                **{f"{name} {i}": partial(self._score, each, example.batch) for name, each in self.shared.items()
                   for i, example in batches}}

    def others(self, size: int, busy: bool) -> dict[str, float]:
        """Seconds of a sample in each evaluation that has rows or batches of its own: one batch is read and scored,
        once, since it may generate text for long."""
        found = {}
        for each in self.evaluations.declared:
            if each.name not in self.shared and (rows := self.evaluations.rows(each, "validation")):
                alike = stretches(rows.dataset)[0]
                count = min(each.batch_size or size, len(alike))
                chosen = [alike[number * len(alike) // count] for number in range(count)]
                took = timed(lambda: self._score(each, each.collate([rows.dataset[row] for row in chosen])),
                              self.device)
                found[each.name] = (took.computing if busy else took.wall) / count
        return found

    def step(self, batches: Sequence[_Example], precision: str = "") -> None:
        for example in batches:
            self._passes(example, precision)

    def _passes(self, example: _Example, precision: str = "") -> None:
        self.model.zero_grad(set_to_none=True)
        for loss in losses(self.stage, self.model, example.batch, self.device, precision or self.cfg.precision,
                           example.steps):
            loss.total.backward()

    def choose_size(self) -> tuple[int, float]:
        """Samples in a batch, up to the run's own, that takes long enough to be timed, and its seconds.

        Begins with two samples: batch norm cannot learn from one. Each size is tried twice, its first pass is slower.
        """
        size, seconds = min(2, self.cfg.batch_size), self._try(min(2, self.cfg.batch_size))
        while size < self.cfg.batch_size and seconds < ENOUGH_SECONDS:
            bigger = min(2 * size, self.cfg.batch_size)
            try:
                size, seconds = bigger, self._try(bigger)
            except (RuntimeError, MemoryError) as error:
                if not devices.is_out_of_memory(error):
                    raise
                break
        return size, seconds

    def _try(self, size: int) -> float:
        """Seconds of a batch of so many samples, the mean of all lengths."""
        batches = self.batches(size)
        return min(timed(lambda: self.step(batches), self.device).computing for _ in range(2)) / len(batches)

    def _score(self, evaluation: Evaluation, batch: Batch) -> None:
        with self._evaluating():
            score_batch(evaluation, self.model, batch, self.device, self.cfg.precision)

    def shown(self) -> Took:
        """What the samples take that an evaluation shows. If they cannot be made, the run begins all the same: the
        monitor that shows them reports the error, and is switched off."""
        with self._evaluating():
            try:
                return timed(lambda: self.stage.samples(self.model), self.device)
            except Exception as error:
                log.warning("the estimate leaves out the samples, which cannot be made: %s: %s", type(error).__name__,
                            error)
                return Took(0.0, 0.0)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad(), devices.autocast(self.device, self.cfg.precision):
            yield
        self.model.train()

    def flops(self, size: int) -> float:
        """Floating-point operations of a sample in batches of so many, those that checkpointing does a second time left
        out. Some are done once for a batch, such as those of the captions of all classes."""
        self.model.eval()
        batches = self.batches(size)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            self.step(batches)
        self.model.train()
        return float(counter.get_total_flops() / sum(self.counts(size)))

    def kept(self) -> tuple[int, int]:
        """Bytes that autograd keeps from the forward to the backward pass: fixed, and for each sample."""
        few, more = min(2, self.cfg.batch_size), min(4, self.cfg.batch_size)  # no more than the run itself will try
        bytes_few = self._kept(few)
        try:
            bytes_more = self._kept(more)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            more, bytes_more = few, bytes_few
        if few == more:
            return 0, bytes_few // few
        each = max(0, (bytes_more - bytes_few) // (more - few))
        return max(0, bytes_few - few * each), each

    def muon_seconds(self) -> float:
        """Of orthogonalizing the matrices of the blocks, each step; 0 with AdamW."""
        if self.cfg.optimizer != "muon":
            return 0.0
        matrices = [p for p in optim.matrices_of(self.stage.blocks(self.model)) if p.requires_grad]
        muon = Muon([{"params": matrices, "matrix": True, "bf16": self.cfg.precision == "bf16"}], 0.0, (0.0, 0.0))
        for parameter in matrices:
            parameter.grad = torch.zeros_like(parameter)
        seconds = statistics.median(timed(muon.step, self.device).computing for _ in range(FEWEST))
        muon.zero_grad()
        return seconds

    def _kept(self, size: int) -> int:
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._passes(self.batches(size)[0])
        return sum(kept.values())


@lru_cache
def _update_seconds(device: torch.device) -> float:
    """Of clipping and AdamW, for each parameter."""
    weight = nn.Parameter(torch.zeros(SCRATCH // 1024, 1024, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = optim.adamw([{"params": [weight]}], 1e-4, (0.9, 0.95))

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return statistics.median(timed(update, device).computing for _ in range(FEWEST)) / SCRATCH


@lru_cache
def _saved_seconds() -> float:
    """Of a snapshot, for each parameter: copied aside, and its checksum computed when it is written and read back."""
    host = torch.device("cpu")
    weight, moments = torch.zeros(SCRATCH), [torch.zeros(SCRATCH) for _ in range(2)]

    def save() -> None:
        for content in pack("snapshot", 0, {"weight": weight}, {"moments": moments}).content.values():
            for _ in range(2):
                hashlib.sha256(content).digest()

    return timed(save, host).computing / SCRATCH
