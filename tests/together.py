"""Trains a toy in several processes that decide together; each calls `main`, with FOLDER RANK SIZE SCENARIO...

Each scenario is one run a process, in FOLDER/<scenario>/<rank>. What each process did is written to FOLDER/<rank>.json.
"""

import gc
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stoker import files
from stoker.daemon.inbox import ask
from stoker.training.assembly import estimate
from stoker.training.core import saver
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.exchange import Together
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer
from toys import WITHOUT_MONITORS, Regression, Toy, new_run, session

DECIDED = ("on_step_end", "on_eval_start", "on_eval_end", "on_log", "on_stop")
REQUESTS = ("eval", "log", "save", "finished", "stopped", "halted", "back")


@dataclass
class Journal(Callback):
    """What the loop does, as this process sees it."""

    order = ACT

    def __post_init__(self) -> None:
        self.seen: list[str] = []


def _noting(event: str) -> Callable[..., None]:
    def method(self: Journal, trainer: Trainer, *given: Any) -> None:
        lacking = ""
        if event == "on_eval_end" and "eval/loss" not in given[0]:
            lacking = " without scores" if not given[0] else f" with {', '.join(sorted(given[0]))}"
        self.seen.append(f"{trainer.step} {event}{lacking}")
    return method


for _event in DECIDED:
    setattr(Journal, _event, _noting(_event))


@dataclass
class At(Callback):
    """Does something at a step, in one event."""

    order = ACT
    event: str
    step: int
    do: Callable[[Trainer], object]

    @property
    def key(self) -> str:
        return f"At {self.event} {self.step} {id(self)}"

    def happen(self, trainer: Trainer, event: str) -> None:
        if (event, trainer.step) == (self.event, self.step):
            self.do(trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        self.happen(trainer, "on_step_start")

    def on_step_end(self, trainer: Trainer) -> None:
        self.happen(trainer, "on_step_end")

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.happen(trainer, "on_log")


def stop(trainer: Trainer) -> None:
    trainer.signals.stop = "SIGTERM"


def bad(trainer: Trainer) -> None:
    """A weight is not finite any more."""
    trainer.model[0].weight.data[0, 0] = math.nan


class Hungry(Regression):
    """In one try of step 4 the memory does not suffice."""

    tries = 0

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        if model.training and moment.step == 3:
            type(self).tries += 1
            if self.tries == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(model, batch, moment)


class Interrupted(Regression):
    """A stop comes in the midst of its first evaluation."""

    signals: Any = None  # not before training has begun

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        if self.signals:
            self.signals.stop = "SIGTERM"
        return super().score(model, batch)


class Unscored(Interrupted):
    """There is not enough memory for an evaluation."""

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        if self.signals:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().score(model, batch)


class Twice(Regression):
    """Two evaluations."""

    def evaluations(self) -> list[Evaluation]:
        usual = super().evaluations()[0]
        return [usual, replace(usual, name="again", score=partial(Regression.score, self))]


class HalfScored(Twice, Unscored):
    """There is not enough memory for the first of them."""


class Holed(Regression):
    """The loss of step 4 is not finite, once."""

    tries = 0

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss = super().loss(model, batch, moment)
        if model.training and moment.step == 3 and not Holed.tries:
            Holed.tries += 1
            return Loss({"loss": loss.terms["loss"] * math.nan}, loss.figures)
        return loss


def full_disk(trainer: Trainer) -> None:
    """Nothing of a snapshot can be written in this process from now on."""
    def refuse(path: Path, *given: Any, **more: Any) -> None:
        if "snapshots/." in str(path):
            raise OSError(28, "No space left on device")
        write(path, *given, **more)

    write, files.write, saver.FIRST_WAIT = files.write, refuse, 0.005  # type: ignore[assignment]


def in_trouble(trainer: Trainer) -> None:
    """Wait until the saver has met it."""
    while not trainer.saver.trouble:
        time.sleep(0.001)


def drawn(seed: int, rank: int) -> list[tuple[int, str]]:
    """Requests at random steps: what the model in the test draws too."""
    draw = random.Random(f"{seed} {rank}")
    return [(draw.randint(1, 9), draw.choice(REQUESTS[:3] if draw.random() < 0.8 else REQUESTS))
            for _ in range(draw.randint(0, 5))]


def request(what: str, rank: int) -> Callable[[Trainer], object]:
    if what == "back":
        return lambda trainer: trainer.go_back(trainer.step, "", f"back by {rank}")
    if what in ("finished", "stopped", "halted"):
        return lambda trainer: trainer.ask("stop", f"{what} by {rank}", what)  # type: ignore[arg-type]
    return lambda trainer: trainer.ask(what, f"{what} by {rank}")  # type: ignore[arg-type]


def scenario(name: str, rank: int, last: bool) -> tuple[type[Toy], list[Callback], dict[str, Any]]:
    """What the process of a rank does; in most only the last one does something out of the ordinary."""
    stage: type[Toy] = Regression
    callbacks: list[Callback] = []
    options: dict[str, Any] = {}
    if name == "signal" and last:
        callbacks = [At("on_step_end", 5, stop)]
    if name == "signal while logging" and last:
        callbacks = [At("on_log", 4, stop)]
    if name == "signal while evaluating" and last:
        stage = Interrupted
    if name == "time":
        options = {"max_minutes": 1e-9 if last else 60.0}
    if name == "clock":
        options = {"snapshot_minutes": 1e-9 if last else 60.0, "snapshot_interval": 0, "eval_interval": 99}
    if name == "NaN" and last:
        stage = Holed
    if name == "memory" and last:
        stage = Hungry
    if name == "memory in evaluation" and last:
        stage = Unscored
    if name == "memory in one evaluation":
        stage = HalfScored if last else Twice
    if name == "NaN in the weights":
        options = {"sanity_check_interval": 0}
        callbacks = [At("on_step_end", 4, bad)] if last else []
    if name == "disk":
        options = {"disk_full_minutes": 1e-9}
        if last:
            callbacks = [At("on_step_end", 2, full_disk), At("on_step_start", 4, in_trouble)]
    if name.startswith("random"):
        callbacks = [At("on_step_end", step, request(what, rank)) for step, what in drawn(int(name.split()[1]), rank)]
    return stage, callbacks, options


def sit(folder: Path, name: str, rank: int, last: bool, exchange: Together) -> dict[str, Any]:
    """One sitting, and a second one after a step that failed."""
    journal, sittings, write = Journal(), [], files.write
    stage, callbacks, options = scenario(name, rank, last)
    options = {"rows": 100, "nan_recoveries": 3} | WITHOUT_MONITORS | options
    where = folder / name / str(rank)
    where.mkdir(parents=True)
    run = new_run(where, stage)
    if name == "file" and rank == 0:
        ask(run.requests, "snapshot")
    kind = type(stage.__name__, (stage,), {"extra": [journal, *callbacks]})
    sitting = session(kind, run, **options)
    with run.lock():
        Interrupted.signals = None
        trainer, snapshot = sitting.prepare()
        Interrupted.signals = sitting.signals if issubclass(stage, Interrupted) else None
        for _ in range(2):
            trainer.decisions.exchange = exchange
            ending = trainer.fit(snapshot)
            sittings.append([trainer.step, ending.state, ending.reason])
            if ending.state != "back" or name.startswith("random"):
                break
            sitting._turn_back(trainer, ending)
            trainer, snapshot = sitting.prepare()
    files.write = write
    kept = [path.name for path in Snapshots(run.snapshots, {}).found()]
    return {"seen": journal.seen, "sittings": sittings, "kept": kept, "micro": trainer.order.micro,
            "owed": sorted(trainer.decisions.owed), "weights": float(sum(p.double().sum() for p in
                                                                         trainer.model.parameters()))}


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    estimate.FEWEST = estimate.MOST = 1  # as in the other tests
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
    exchange, found = Together(), {}
    for name in sys.argv[4:]:
        found[name] = sit(folder, name, rank, rank == size - 1, exchange)
        (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    gc.freeze()  # Python's own end would look for garbage among all of torch
