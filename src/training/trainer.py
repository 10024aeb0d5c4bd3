"""The one loop, and the only writer of a run's progress."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.data.loader import Order, training_batches
from stoker.data.workers import Abandoned
from stoker.training.core import device as devices
from stoker.training.core import optim, rng
from stoker.training.core.callback import Callback
from stoker.training.core.ending import Ending, Request, State
from stoker.training.core.evaluation import Evaluations, merged
from stoker.training.core.events import Events
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.media import Media
from stoker.training.core.options import Options, due
from stoker.training.core.saver import Saver
from stoker.training.core.signals import Signals
from stoker.training.core.snapshots import Snapshots
from stoker.training.core.stage import Stage
from stoker.training.core.step import Step
from stoker.training.core.totals import Totals, finite_or_nothing

log = logging.getLogger(__name__)


class Trainer:
    """Trains one stage.

    Read by callbacks: stage, cfg, model, optimizers, micro_batches, step, steps, steps_per_epoch, lr, best, best_step,
    evaluations, dropped, grad_norms, device, timings, media, switched_off, ledger.
    Called by callbacks: ask(), go_back(), leave_out(), skip(), record(), show(), rows(). Nothing else is theirs.

    `cfg` is the config fitted to the run's length, `steps` that length, `order` which rows make up each step.
    """

    def __init__(self, stage: Stage, cfg: Options, steps: int, order: Order, snapshots: Snapshots,
                 callbacks: list[Callback], signals: Signals, device: torch.device,
                 ledger: Sequence[dict[str, Any]] = ()):
        self.stage, self.cfg, self.steps, self.order = stage, cfg, steps, order
        self.snapshots, self.signals, self.device = snapshots, signals, device
        self.events, self.saver = Events(callbacks), Saver(snapshots, cfg, signals, self._emit)
        self.callbacks, self.switched_off = self.events.callbacks, self.events.switched_off
        self.steps_per_epoch = order.steps_per_epoch
        self.evaluations = Evaluations(stage, cfg, order.steps_per_epoch)
        self.step, self._judged = 0, 0  # judged: the step up to which all was found to be well
        self.best, self.best_step = math.nan, -1
        self.timings: dict[str, float] = {}  # clocks and memory of this log step: never part of the mathematics
        self.media: dict[str, Media] = {}  # what was made to be looked at since the last log
        self.micro_batches: list[Batch] = []
        self._note_left_out(list(ledger))  # which rows are left out, since which step
        self._asked: dict[Request, str] = {}
        self._owed: dict[Request, str] = {}  # an evaluation that a stop abandoned, and the log that goes with it
        self._ending: Ending | None = None
        self._totals = Totals()

    # -- what callbacks call ------------------------------------------------------------------------------------

    def ask(self, what: Request, why: str, end: State = "finished") -> None:
        """Ask the loop to evaluate, log, save or stop once this step has ended; `end`: what a stop means."""
        self._asked.setdefault(what, why)
        if what == "stop" and self._ending is None:
            self._ending = Ending(end, why)

    def go_back(self, step: int, why: str, reason: str) -> None:
        """End this sitting without a trace after `step` (from 1): it is to be done again, from a snapshot before it."""
        if self._ending is None:
            self._ending = Ending("back", reason, step, why)

    def leave_out(self, rows: list[int], why: str) -> None:
        """Train on these rows no more, from the step in hand on (from `on_step_start`)."""
        self._note_left_out([*self.ledger, {"step": self.step + 1, "rows": sorted(rows), "why": why}])
        self._open_data()

    def _note_left_out(self, ledger: list[dict[str, Any]]) -> None:
        self.ledger = ledger
        since = {row: entry["step"] - 1 for entry in reversed(ledger) for row in entry["rows"]}
        self.order = replace(self.order, left_out=since)

    def skip(self, why: str) -> None:
        """Drop the gradients of the phase being updated (from on_loss or on_grad)."""
        self.update.skip(why)

    def record(self, name: str, value: Ratio | Tensor | float) -> None:
        """Add to a figure's mean over the log interval. Tensors stay on the device until then; what is not finite does
        not count: it belongs to an update that was dropped, which `health/dropped_share` tells."""
        self._totals.add(name, finite_or_nothing(value if isinstance(value, Ratio) else Ratio(value, 1)))

    def show(self, name: str, media: Media) -> None:
        """Give the views something to show with the next log line."""
        self.media[name] = media

    def rows(self) -> list[list[int]]:
        """The rows of the step in hand (in `on_step_end`: of the one just done), a list for each micro-batch."""
        return self.order.rows(self._rows_of)

    optimizers = property(lambda self: self.update.optimizers)  # by phase
    loss_scales = property(lambda self: self.update.loss_scales)  # by phase; fp16 only
    grad_norms = property(lambda self: self.update.grad_norms)  # by phase: of each tensor's gradient, before clipping
    dropped = property(lambda self: self.update.dropped)  # 1 where the last update was not finite, so not applied
    lr = property(lambda self: self.update.lr)

    @property
    def logged_step(self) -> int:
        """The step up to which log lines belong to this state: one less while the log of this step is owed."""
        return self.step - 1 if self._owed else self.step

    # -- the run ------------------------------------------------------------------------------------------------

    def fit(self, snapshot: Path | None = None) -> Ending:
        """Train from the start or from a verified snapshot, until done or asked to stop."""
        try:
            self._build()
            if snapshot:
                self._restore(snapshot)
            self._open_data()
            self._emit("on_start")
            ending = self._loop(fresh=snapshot is None)
            self._emit("on_stop", ending.reason)
            return ending
        except BaseException as error:
            self._emit("on_error", error, guarded=True)
            raise
        finally:
            self.saver.close()
            self._emit("close", guarded=True)

    def _build(self) -> None:
        rng.seed(self.cfg.seed)
        self.model = self.stage.model().to(self.device)
        self._emit("on_build")
        self.update = Step(self.stage, self.model, self.cfg, self.steps, self.device, self._emit, self.record)

    def _open_data(self) -> None:
        workers = devices.loader_workers(self.device, self.cfg.num_workers)
        self._batches = training_batches(self.stage.dataset("train"), self.stage.collate, self.order, self.step,
                                         self.steps, workers, self.device.type == "cuda", lambda: self.signals.stop)

    def _loop(self, fresh: bool) -> Ending:
        if fresh:
            self._save()
            self._finish_save(patient=False)
        if self._owed:
            self._asked |= self._owed
            self._act()
        while self._ending is None and self.step < self.steps:
            self._obey_signals()
            if self._ending is None:
                self._train_step()
                self._obey_signals()
            self._act()
            if why := self.saver.look():
                self.ask("stop", why, "halted")
        self._ending = self._ending or Ending("finished", "all steps done")
        self._finish_save(patient=self._ending.state in ("finished", "stopped"))
        return self._ending

    def _ask_by_interval(self) -> None:
        for what in due(self.cfg, self.step, self.steps, self.steps_per_epoch,
                        evaluation=self.evaluations.is_due(self.step)):
            self.ask(what, "interval")
        if self.cfg.snapshot_minutes and time.monotonic() - self.saver.last > 60 * self.cfg.snapshot_minutes:
            self.ask("save", "time")

    def _obey_signals(self) -> None:
        if self.signals.take_save():
            self.ask("save", "SIGUSR1")
        if self.signals.stop:
            self.ask("stop", f"{self.signals.stop} received", "stopped")

    def _act(self) -> None:
        """Do what was asked during the step, in one fixed order. What a stop leaves undone stays owed.

        What callbacks ask for meanwhile is done after the next step, but for a save, which comes last anyway.
        """
        if self._goes_back():
            return
        asked, self._asked = self._asked, {}
        self._owed = {what: asked[what] for what in ("eval", "log") if what in asked}
        if self._ending is None and self.step == self.steps and {"eval", "save"} <= asked.keys():
            self._save()  # the last evaluation may need more memory than there is, and even be killed for it
            self._finish_save(patient=True)
            if self._ending:
                return
        scores = self._evaluate() if "eval" in asked else {}
        if scores is None:
            self._obey_signals()
        else:
            self._owed = {}
            if "eval" in asked or "log" in asked:
                self._log(scores)
        saves = asked.pop("save", ""), self._asked.pop("save", "")
        if (any(saves) or self._ending is not None) and not self._goes_back():
            self._save()

    def _goes_back(self) -> bool:
        return bool(self._ending and self._ending.state == "back")

    # -- a step -------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        """Where the memory does not suffice, in smaller micro-batches: the gradients are the same, to rounding."""
        random, totals = rng.state_dict(), self._totals.state_dict()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            return self._try_step(buffers)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            self.order = self.order.halved(self.stage.divisible)
        # as long as the error lived, so did the activations
        log.warning("step %d: out of memory; micro-batches of %s samples from now on, and more of them to an update: "
                    "the same mathematics", self.step + 1, self.order.micro)
        if self.update.updated:  # by one phase of several, or half
            return self.go_back(self.step + 1, "", "out of memory")
        for buffer, before in buffers:
            buffer.copy_(before)
        rng.load_state_dict(random)
        self._totals.load_state_dict(totals, self.device)
        self._open_data()
        self._train_step()

    def _try_step(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        self.update.updated = False
        self.model.train()
        self._emit("on_step_start")
        self._rows_of = self.step
        try:
            self.micro_batches = [devices.move(next(self._batches), self.device) for _ in self.rows()]
        except Abandoned:  # a stop: the loop obeys it, and the step is done when the run is resumed
            return
        for batch in self.micro_batches:
            self._emit("on_batch", batch)
        self.update.run(self.step, self.micro_batches)
        for buffer, before in buffers:  # a forward pass of NaN leaves NaN in running statistics
            buffer.copy_(torch.where(self.dropped > 0, before, buffer))
        self.record("health/dropped_share", self.dropped if self.micro_batches else 1.0)  # all its rows are left out
        self.step += 1
        self._emit("on_step_end")
        self._ask_by_interval()
        self.micro_batches = []

    # -- after a step -------------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float] | None:
        """Do the evaluations that are due; None if a stop came in between, nothing where the memory does not suffice.
        Leaves the run's randomness alone."""
        self._emit("on_eval_start")
        cfg = replace(self.cfg, batch_size=self.order.micro or self.cfg.batch_size)
        done = self.evaluations.run("validation", self.model, cfg, self.device, lambda: self.signals.stop,
                                    self.evaluations.due(self.step, self.steps))
        for failed in [scores for scores in done or [] if scores.problem]:
            log.error("step %d is not evaluated (%s): %s", self.step, failed.name, failed.problem)
            if self.step == self.steps:
                self.ask("stop", "all steps done, the last evaluation ran out of memory: ./run/evaluate.sh tries again")
        if done is None:
            log.info("evaluation abandoned; it is done first when the run goes on")
        metrics = merged(done or [])
        if self.stage.best[0] in metrics:
            self._judge(metrics)
        self._emit("on_eval_end", metrics)
        return None if done is None else metrics

    def _judge(self, metrics: dict[str, float]) -> None:
        """Note the best evaluation so far; it is saved, and spared by the rotation."""
        name, mode = self.stage.best
        value = metrics[name]
        if math.isnan(value):
            return
        if math.isnan(self.best) or (value < self.best if mode == "min" else value > self.best):
            self.best, self.best_step = value, self.step
            self.ask("save", "best")

    def _log(self, scores: dict[str, float]) -> None:
        """Turn the sums since the last log into floats: the only place where the host waits for the device."""
        metrics = self._totals.means()
        metrics |= self.stage.derive(metrics)
        metrics |= {"lr": self.lr, **scores}
        self._totals, self.timings = Totals(), {}
        self._emit("on_log", metrics)
        self.media, self._judged = {}, self.step

    def _save(self) -> None:
        """A state with NaN in it is not saved: it would be the newest, and push good ones out."""
        if not optim.all_finite(self.model, self.optimizers.values()):
            log.error("weights or optimizer hold NaN or Inf: not saved; go on from the newest snapshot (--resume)")
            return self._halt("NaN or Inf in weights or optimizer")
        by_epoch = self.step > 0 and self.step % self.steps_per_epoch == 0
        name = f"epoch_{self.step // self.steps_per_epoch:04d}" if by_epoch else f"step_{self.step:08d}"
        self.saver.begin(f"snapshot_{name}", self.step, self.model.state_dict(), self.state_dict(),
                         best_step=self.best_step, judged=self._judged)

    def _finish_save(self, patient: bool) -> None:
        if (why := self.saver.finish(patient)) and not self._goes_back():  # else there is an older one to go back to
            self._halt(f"{why}: make room, and resume from the newest snapshot")

    def _halt(self, why: str) -> None:
        self._ending = Ending("halted", f"{self._ending.reason}; {why}" if self._ending else why)

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """With the model's weights, the whole truth of a run."""
        return {
            "step": self.step, "steps": self.steps, "best": self.best, "best_step": self.best_step,
            "owed": dict(self._owed), "asked": {what: self._asked[what] for what in self._asked if what != "stop"},
            "ended": self._ending.reason if self._ending and self._ending.state == "finished" else "",
            "lr": self.lr,
            "ledger": list(self.ledger), "micro": self.order.micro,
            "totals": self._totals.state_dict(),
            "optimizers": {phase: optimizer.state_dict() for phase, optimizer in self.optimizers.items()},
            "loss_scales": {phase: scale.state_dict() for phase, scale in self.loss_scales.items()},
            "rng": rng.state_dict(),
            "callbacks": self.events.state_dict(),
        }

    def _restore(self, snapshot: Path) -> None:
        state = self.snapshots.load(snapshot, self.model)
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self._judged = self.step
        self._owed, self._asked = dict(state["owed"]), dict(state["asked"])
        self.update.lr = state["lr"]
        self._note_left_out(state["ledger"] + [entry for entry in self.ledger if entry not in state["ledger"]])
        self.order = replace(self.order, micro=self.order.micro or state["micro"])
        self._totals.load_state_dict(state["totals"], self.device)
        if state["steps"] != self.steps:
            log.warning("planned for %s steps, now for %s: the learning rate follows the new plan from here on",
                        f"{state['steps']:,}", f"{self.steps:,}")
        elif state["ended"]:
            self._ending = Ending("finished", state["ended"])
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])
        for phase, scale in self.loss_scales.items():
            scale.load_state_dict(state["loss_scales"][phase])
        self.events.load_state_dict(state["callbacks"])
        rng.load_state_dict(state["rng"])
        self.snapshots.set_aside_after(self.step)

    # -- events -------------------------------------------------------------------------------------------------

    def _emit(self, event: str, *args: Any, guarded: bool = False) -> None:
        self.events.tell(event, self, *args, guarded=guarded)
