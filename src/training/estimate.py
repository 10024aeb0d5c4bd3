"""What a run will take, in memory and time: measured on a throwaway copy of its model before it begins."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import progress
from config import UserError
from daemon.table import duration
from training import blocks, optim, rng
from training import device as devices
from training.options import Options
from training.stage import Batch, Stage

LONG = 600.0  # seconds: in a shorter run compiling is not worth the trial
NOTICEABLE = 1.05  # times as fast: less is within what timings scatter
ENOUGH_SECONDS = 0.2  # of forward and backward: a bigger batch tells nothing new
BIG_ENOUGH_SECONDS = 0.01  # of a matrix product whose speed is taken for the peak
SCRATCH = 2**21  # numbers updated to see how long the optimizer takes


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


# torch's counter knows the attention kernels of GPUs only. As there, a causal mask is not taken off.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and floating-point operations, of this model on this device."""

    device: str
    parameters: int
    sample_seconds: float  # forward and backward
    scored_seconds: float  # of a sample in an evaluation
    update_seconds: float  # of the optimizer
    sample_flops: float  # forward and backward, as counted
    peak_flops: float  # per second, of bare matrix products
    kept_bytes: int  # for the backward pass, whatever the batch
    kept_bytes_per_sample: int
    tried_size: int = 2  # samples in the batches that were timed
    compile_seconds: float = 0.0
    compiled_speedup: float = 0.0  # 0: not tried

    def seconds(self, length: "Length") -> float:
        return (length.samples * self.sample_seconds + length.updates * self.update_seconds
                + length.scored * self.scored_seconds)

    def memory(self, batch_size: int) -> dict[str, int]:
        """Bytes: fp32 weights and gradients, AdamW's two moments, what a micro-batch keeps for the backward, and, on
        the host, the copy of weights and moments that is written as a snapshot meanwhile."""
        weights = 4 * self.parameters
        return {"weights": weights, "gradients": weights, "optimizer": 2 * weights,
                "activations": self.kept_bytes + batch_size * self.kept_bytes_per_sample, "snapshot": 3 * weights}

    def describe(self, length: "Length", batch_size: int) -> str:
        memory = {name: size(number) for name, number in self.memory(batch_size).items()}
        return (f"Estimate: {duration(self.seconds(length))} for {length.updates:,} updates; "
                f"{self.sample_flops / 1e9:.3g} GFLOP a sample, "
                f"{self.sample_flops / self.sample_seconds / self.peak_flops:.0%} of the "
                f"{self.peak_flops / 1e9:,.0f} GFLOP/s of bare matrix products here; memory: "
                + ", ".join(f"{name} {number}" for name, number in memory.items()))


@dataclass(frozen=True)
class Length:
    """How much a run does."""

    updates: int
    samples: float  # trained on
    scored: int  # in all its evaluations

    @classmethod
    def of(cls, stage: Stage, cfg: Options) -> "Length":
        """Of a run whose config was fitted to it."""
        assert cfg.max_steps is not None
        updates = cfg.max_steps
        train, validation = (len(stage.dataset(split)) for split in ("train", "validation"))  # type: ignore[arg-type]
        per_epoch = stage.order().steps_per_epoch
        evaluations = math.ceil(updates / (cfg.eval_interval or per_epoch))  # the last update has one in any case
        return cls(updates, updates / per_epoch * train, evaluations * validation)


def size(number: float) -> str:
    """Bytes as a person reads them: `12 MB`, `5.6 GB`."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def read(path: Path) -> Estimate | None:
    """What was written when the run began; None where it was not, or by another version."""
    try:
        return Estimate(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def expect(stage: Stage, cfg: Options, device: torch.device) -> tuple[Options, Estimate, Length, str]:
    """What a run will take; the config says whether it is compiled, and the line why, if that was looked into."""
    length, found = Length.of(stage, cfg), measure(stage, cfg, device)
    cfg, found, line = settle_compile(found, stage, cfg, device, found.seconds(length))
    return cfg, found, length, line


def measure(stage: Stage, cfg: Options, device: torch.device) -> Estimate:
    """Forward and backward passes of rows of the training set on a copy of the model; nothing of the run is touched.

    `cfg.compile` is left out of account: `try_compiled` tells what it would change.
    """
    with rng.preserved(), _room_for_two(device):
        trial = _Trial(stage, replace(cfg, compile=False), device)
        size, seconds = trial.timed()
        fixed, each = trial.kept()
        return Estimate(devices.describe(device), trial.parameters, seconds / size, trial.scoring(size) / size,
                        _update_seconds(device) * trial.parameters, trial.flops(), peak_flops(device, cfg.precision),
                        fixed, each, size)


@contextmanager
def _room_for_two(device: torch.device) -> Iterator[None]:
    """Raises UserError where the memory does not suffice for the smallest trial."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise UserError(f"the model does not fit into the memory of {devices.describe(device)} with two samples: "
                        "choose a smaller preset, shorter samples, --gradient_checkpointing or --precision bf16 "
                        f"({str(error).splitlines()[0]})") from error


def settle_compile(found: Estimate, stage: Stage, cfg: Options, device: torch.device,
                   seconds: float) -> tuple[Options, Estimate, str]:
    """Whether the run is compiled: as asked, or where a trial shows that it pays; and a line about it."""
    plain = replace(cfg, compile=False)
    if cfg.compile is False or (cfg.compile is None and seconds < LONG):
        return plain, found, ""
    if why := blocks.compiler_problem(device):
        return plain, found, f"Not compiled: {why}"
    try:
        tried = try_compiled(found, stage, cfg, device)
    except RuntimeError as error:  # the compiler's, or not enough memory for two of the model
        return plain, found, f"Not compiled: a trial failed ({blocks.first_line(error)})"
    told = f"{tried.compiled_speedup:.2f} times as fast in a trial, {tried.compile_seconds:.0f} s to compile"
    pays = tried.compiled_speedup > NOTICEABLE and (
        seconds * (1 - 1 / tried.compiled_speedup) > 2 * tried.compile_seconds)
    if cfg.compile is None and not pays:
        return plain, found, f"Not compiled: {told}"
    return (replace(cfg, compile=True),
            replace(tried, sample_seconds=found.sample_seconds / tried.compiled_speedup), f"Compiled: {told}")


def try_compiled(estimate: Estimate, stage: Stage, cfg: Options, device: torch.device) -> Estimate:
    """The estimate, with what compiling takes and gains."""
    with rng.preserved():
        trial = _Trial(stage, replace(cfg, compile=False), device)
        size = estimate.tried_size
        blocks.shape(stage, trial.model, replace(cfg, compile=True, gradient_checkpointing=False))
        first = trial.step(size)
        seconds = min(trial.step(size) for _ in range(2))
    return replace(estimate, compile_seconds=max(0.0, first - seconds),
                   compiled_speedup=size * estimate.sample_seconds / seconds)


@lru_cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a matrix product that is big enough to take a while: the best of a few."""
    size, seconds = 256, 0.0
    while seconds < BIG_ENOUGH_SECONDS and size < 16384:
        size *= 2
        a = torch.randn(size, size, device=device).to(devices.DTYPES[precision])
        seconds = min(_timed(lambda: a @ a, device) for _ in range(4))
    return 2 * size**3 / seconds


class _Trial:
    """A model of its own, and batches of training rows to try it on."""

    def __init__(self, stage: Stage, cfg: Options, device: torch.device):
        self.stage, self.cfg, self.device = stage, cfg, device
        self.rows: Any = stage.dataset("train")
        self.order = stage.order()
        self.model = stage.model().to(device).train()
        blocks.shape(stage, self.model, cfg)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def batches(self, size: int) -> list[tuple[int, Batch]]:
        """Micro-batches of at most so many samples, of all lengths that there are, and how many each has."""
        parts = [[self.rows[row] for row in rows] for rows in self.order.examples(size)]
        return [(len(part), devices.move(self.stage.collate(part), self.device)) for part in parts]

    def step(self, size: int) -> float:
        """Seconds of forward and backward of so many samples."""
        return self._seconds(self._passes, size)

    def _seconds(self, work: Callable[[Batch], Any], size: int) -> float:
        took = [_timed(lambda batch=batch: work(batch), self.device) / count  # type: ignore[misc]
                for count, batch in self.batches(size)]
        return size * sum(took) / len(took)

    def _passes(self, batch: Batch) -> None:
        self.model.zero_grad(set_to_none=True)
        for phase in self.stage.phases:
            with devices.autocast(self.device, self.cfg.precision):
                loss, _ = self.stage.loss(self.model, batch, phase)
            loss.total.backward()

    def timed(self) -> tuple[int, float]:
        """A batch, up to the run's own, that takes long enough to be timed, and how long it takes.

        Begins with two samples: batch norm cannot learn from one.
        """
        size = min(2, self.cfg.batch_size)
        self.step(size)  # the first pass of a process is slower
        seconds = self.step(size)
        while size < self.cfg.batch_size and seconds < ENOUGH_SECONDS:
            bigger = min(2 * size, self.cfg.batch_size)
            try:
                size, seconds = bigger, self.step(bigger)
            except (RuntimeError, MemoryError) as error:
                if not devices.is_out_of_memory(error):
                    raise
                break
        return size, min(seconds, self.step(size))  # the first pass of a size is slower

    def scoring(self, size: int) -> float:
        def work(batch: Batch) -> None:
            self.stage.score(self.model, batch)
            self.stage.gather(self.model, batch)

        self.model.eval()
        with torch.no_grad(), devices.autocast(self.device, self.cfg.precision):
            seconds = min(self._seconds(work, size) for _ in range(2))
        self.model.train()
        return seconds

    def flops(self) -> float:
        """Floating-point operations of a sample, those that checkpointing does a second time left out."""
        self.model.eval()
        batches = self.batches(1)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            for _, batch in batches:
                self._passes(batch)
        self.model.train()
        return float(counter.get_total_flops() / len(batches))

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

    def _kept(self, size: int) -> int:
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._passes(self.batches(size)[0][1])
        return sum(kept.values())


def _update_seconds(device: torch.device) -> float:
    """Of AdamW, for each parameter."""
    weight = nn.Parameter(torch.zeros(SCRATCH // 1024, 1024, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = optim.adamw([weight], 1e-4, 0.1)
    optimizer.step()
    return _timed(optimizer.step, device) / SCRATCH


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    devices.wait(device)
    start = time.perf_counter()
    work()
    devices.wait(device)
    progress.mark()
    return time.perf_counter() - start
