"""What the benchmarks of this folder share: a trainer, timing in turn, bare matrix products. Nothing is downloaded."""

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "run/python"))

from stoker import sharing

sharing.start()  # as every program of this project does

import numpy as np
import torch
from torch import Tensor, nn

from stoker.config import Parsed
from stoker.daemon import rundir
from stoker.daemon.rundir import Status
from stoker.data.workers import close
from stoker.model.transformer import Attention
from stoker.training.assembly.job import Job
from stoker.training.assembly.session import Session
from stoker.training.core.figures import Batch
from stoker.training.core.plan import Plan
from stoker.training.core.signals import Signals
from stoker.training.core.stage import Stage
from stoker.training.stages.text import LanguageModelling
from stoker.training.train_lm import LanguageModel
from stoker.training.train_text import Thinker
from stoker.training.trainer import Trainer

VOCABULARY = 50257


class RandomTokens(LanguageModelling[Any]):
    """A stage of text that is fed with random tokens."""

    vocabulary: int

    def prepare(self) -> None:
        torch.manual_seed(0)
        self.tokenizer: Any = SimpleNamespace(vocab_size=self.vocabulary, end_of_text=self.vocabulary - 1,
                                              decode=lambda ids: " ".join(map(str, ids)))
        self.tokens, self.test_text = {"validation": np.arange(self.vocabulary)}, []

    def dataset(self, split: str) -> Any:
        return torch.randint(self.vocabulary, (64, self.cfg.max_seq_len + 1)).unbind()

    def groups(self, split: str) -> list[str]:
        """Each row is a document of its own."""
        return [str(row) for row in range(64)]

    def made_from(self) -> dict[str, str]:
        return {}

    def begin(self) -> None:
        """There is no tokenizer to keep."""


class Random(RandomTokens, LanguageModel):
    """The language model, by default with the gpt2 vocabulary."""

    vocabulary = VOCABULARY


class RandomThinker(RandomTokens, Thinker):
    """The thinker, with as many tokens as its presets have."""

    vocabulary = Thinker.Config.vocab_size


class Unestimated(Session):
    """A session that does not measure beforehand what the run will take."""

    def _estimate(self, plan: Plan, *, begins: bool) -> tuple[Plan, None]:
        return plan, None


@contextmanager
def session(preset: str, kind: type[Stage], form: type[Unestimated] = Unestimated,
            **options: Any) -> Iterator[Unestimated]:
    """A session in a run's directory of its own."""
    values = dict(kind.presets[preset]) | {"dropout": 0.0, "compile": False, "max_steps": 100_000} | options
    with TemporaryDirectory() as folder:
        os.environ["STOKER_HOME"] = folder  # the runs of a benchmark are nobody's
        run = rundir.create(Path(folder), "bench", Status(kind.name, f"train_{kind.name}.py", "bench", preset))
        job = Job(kind, Parsed(kind.Config(**values), frozenset(values), preset))
        with run.lock():
            yield form(job, run, Signals(), threading.Event())


@contextmanager
def trainer(preset: str, kind: type[Stage] = Random, **options: Any) -> Iterator[Trainer]:
    """A trainer with every callback that a run has by default."""
    with session(preset, kind, **options) as opened:
        made, _ = opened.prepare()
        try:
            yield made
        finally:
            made.saver.close()
            close(made._batches)


def open_up(trainer: Trainer, *, monitors: bool = True) -> None:
    """Bring a trainer to where it would take its first step; without `monitors` no callback is called."""
    if not monitors:
        for listeners in trainer.events.listeners.values():
            listeners.clear()
    trainer._build(fresh=True)
    trainer._open_data()
    trainer._emit("on_start")


Factors = tuple[Tensor, Tensor]


def of_layer(rows: int, inner: int, outer: int) -> list[Factors]:
    """The factors of a layer's matrix products: forward, gradient of the input, gradient of the weight."""
    x, w, y = torch.randn(rows, inner), torch.randn(inner, outer), torch.randn(rows, outer)
    return [(x, w), (y, w.T), (x.T, y)]


def of_attention(rows: int, length: int, width: int) -> list[Factors]:
    """The same of queries, keys and values (rows, length, width), rows being those of the batch times the heads."""
    q, p = torch.randn(rows, length, width), torch.randn(rows, length, length)
    return [(q, q.mT), (p, q), (p, q), (p.mT, q), (q, q.mT), (p.mT, q)]


def bare_products(factors: Sequence[Factors]) -> Callable[[], None]:
    """All of them, one after the other, into memory that is there already."""
    results = {(a.shape, b.shape): a @ b for a, b in factors}

    def multiply() -> None:
        for a, b in factors:
            torch.matmul(a, b, out=results[a.shape, b.shape])

    return multiply


@contextmanager
def products(model: nn.Module, *, backward: bool) -> Iterator[list[Callable[[], list[Factors]]]]:
    """Within it, a list that grows by what makes the factors of each layer's products, as the model is called."""
    made: list[Callable[[], list[Factors]]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Attention):
            B, T, D = inputs[0].shape
            factors, forward = partial(of_attention, B * module.num_heads, T, D // module.num_heads), 2
        else:
            weight: Tensor = module.weight  # type: ignore[assignment]
            factors, forward = partial(of_layer, output.numel() // len(weight), weight[0].numel(), len(weight)), 1
        made.append(lambda: factors()[:None if backward else forward])

    kinds = (nn.Linear, Attention, nn.Conv1d, nn.Conv2d)
    hooks = [module.register_forward_hook(note) for module in model.modules()
             if isinstance(module, kinds) and getattr(module, "groups", 1) == 1]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def seconds_of(made: Sequence[Callable[[], list[Factors]]]) -> float:
    multiply = bare_products([factors for make in made for factors in make()])
    start = time.perf_counter()
    multiply()
    return time.perf_counter() - start


@dataclass
class Took:
    """Seconds of steps, in them of waiting for data, and of their bare products; how much was trained on."""

    stepping: float = 0.0
    waiting: float = 0.0
    multiplying: float = 0.0
    amount: float = 0.0


def steps(trainer: Any, count: int, amount: Callable[[Batch], float]) -> Took:
    """The trainer's own steps, and in turn the bare products of each; three before are not counted."""
    took, batches = Took(), trainer._batches

    def counted() -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            took.waiting += time.perf_counter() - start
            took.amount += amount(batch)
            yield batch

    for _ in range(3):
        trainer._train_step()
    trainer._batches = counted()
    for _ in range(count):
        start = time.perf_counter()
        with products(trainer.model, backward=True) as made:
            trainer._train_step()
        took.stepping += time.perf_counter() - start
        took.multiplying += seconds_of(made)
    return took


def median_seconds(works: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Of each work, done in turn so that what slows the machine slows all of them; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}
