"""The one loop, and the only writer of a run's progress."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.daemon.inbox import Inbox
from stoker.data.loader import Order, training_batches
from stoker.data.workers import Abandoned, close
from stoker.training.core import device as devices
from stoker.training.core import networks, optim, parts, rng
from stoker.training.core.callback import Callback
from stoker.training.core.decisions import Decisions, What
from stoker.training.core.ending import Ending
from stoker.training.core.evaluation import merged
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.events import Events
from stoker.training.core.exchange import Alone, Exchange
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.initialization import initialize
from stoker.training.core.media import Media
from stoker.training.core.options import Options
from stoker.training.core.plan import Plan
from stoker.training.core.saver import Saver
from stoker.training.core.signals import Signals
from stoker.training.core.snapshots import Snapshots
from stoker.training.core.step import Step
from stoker.training.core.totals import Totals, finite_or_nothing

log = logging.getLogger(__name__)

TRACED_STEPS = 3  # that a request for a profiler's trace means


class Trainer:
    """Trains one stage.

    Read by callbacks: stage, cfg, model, optimizers, micro_batches, step, steps, steps_per_epoch, lr, best, best_step,
    evaluations, dropped, grad_norms, device, timings, media, switched_off, ledger, traced_until, snapshots.
    Called by callbacks: ask(), go_back(), leave_out(), skip(), record(), show(), rows(), and in on_save
    saver.keep_only(). Nothing else is theirs.

    `inbox`: where requests come in as files; `exchange`: with the processes that train together.
    """

    def __init__(self, plan: Plan, snapshots: Snapshots, callbacks: list[Callback], signals: Signals,
                 ledger: Sequence[dict[str, Any]] = (), *, inbox: Inbox | None = None, exchange: Exchange = Alone()):
        self.stage, self.cfg, self.steps, self.order = plan.stage, plan.cfg, plan.steps, plan.order
        self.evaluations, self.device = plan.evaluations, plan.device
        self.snapshots, self.signals = snapshots, signals
        self.events, self.saver = Events(callbacks), Saver(snapshots, self.cfg, signals, self._emit)
        self.decisions = Decisions(self.cfg, signals, inbox, exchange)
        self.ask, self.go_back = self.decisions.ask, self.decisions.go_back
        self.callbacks, self.switched_off = self.events.callbacks, self.events.switched_off
        self.steps_per_epoch = plan.order.steps_per_epoch
        self.step, self._judged = 0, 0  # judged: up to this step every loss was found to be sound
        self.best, self.best_step = math.nan, -1
        self.timings: dict[str, float] = {}  # clocks and memory of this log step: never part of the mathematics
        self.media: dict[str, Media] = {}  # what was made to be looked at since the last log
        self.micro_batches: list[Batch] = []
        self._batches: Iterator[Batch] = iter(())
        self._note_left_out(list(ledger))  # which rows are left out, since which step
        self.traced_until = 0  # the last step that the profiler is to see
        self._totals = Totals()

    # -- what callbacks call ------------------------------------------------------------------------------------

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

    def record(self, name: str, value: Ratio | Tensor | float, part: str = "") -> None:
        """Add a value to a figure's mean over the log interval. A figure with several `part`s is the sum of their
        means. Tensors stay on the device until the log. A value that is not finite does not count: it belongs to an
        update that was dropped, which `health/dropped_share` reports."""
        self._totals.add(name, finite_or_nothing(value if isinstance(value, Ratio) else Ratio(value, 1)), part)

    def show(self, name: str, media: Media) -> None:
        """Give the views something to show with the next log line."""
        self.media[name] = media

    def rows(self) -> list[list[int]]:
        """The rows of the step in hand (in `on_step_end`: of the one just done), a list for each micro-batch."""
        return self.order.rows(self._rows_of)

    phases = property(lambda self: self.update.phases)
    optimizers = property(lambda self: self.update.optimizers)  # by phase
    loss_scales = property(lambda self: self.update.loss_scales)  # by phase; fp16 only
    grad_norms = property(lambda self: self.update.grad_norms)  # by phase: of each tensor's gradient, before clipping
    dropped = property(lambda self: self.update.dropped)  # 1 where the last update was not finite, so not applied
    lr = property(lambda self: self.update.lr)

    @property
    def logged_step(self) -> int:
        """The step up to which log lines belong to this state: one less while the log of this step is owed."""
        return self.step - 1 if self.decisions.owed else self.step

    # -- the run ------------------------------------------------------------------------------------------------

    def fit(self, snapshot: Path | None = None) -> Ending:
        """Train from the start or from a verified snapshot, until done or asked to stop."""
        try:
            self._build(fresh=snapshot is None)
            if snapshot:
                self._restore(snapshot)
            self._open_data()
            self.events.check_states()
            self._emit("on_start")
            ending = self._loop(fresh=snapshot is None)
            self._emit("on_stop", ending.reason)
            return ending
        except BaseException as error:
            self._emit("on_error", error, guarded=True)
            raise
        finally:
            self.saver.close()
            close(self._batches)
            self._emit("close", guarded=True)

    def _build(self, fresh: bool) -> None:
        rng.seed(self.cfg.seed)
        self.model = networks.build(self.stage, self.device)
        self._emit("on_build")
        if fresh:
            initialize(self.stage, self.model, self.order, self._read, self.device, self.signals)
        self.update = Step(self.stage, self.model, self.cfg, self.steps, self.device, self._emit, self.record)

    def _open_data(self) -> None:
        self._batches = self._read(self.order)

    def _read(self, order: Order) -> Iterator[Batch]:
        """The micro-batches from the step in hand on."""
        workers = devices.loader_workers(self.device, self.cfg.num_workers)
        return training_batches(self.stage.dataset("train"), self.stage.collate, order, self.step, self.steps, workers,
                                self.device.type == "cuda", lambda: self.signals.stop)

    def _loop(self, fresh: bool) -> Ending:
        decisions = self.decisions
        if fresh:
            self._save()
            self._finish_save(patient=False)
        if decisions.owed:
            self._act()
        self._between_steps()
        while decisions.ending is None and self.step < self.steps:
            self._train_step()
            self._act()
            self._between_steps()
        decisions.ending = decisions.ending or Ending("finished", "all steps done")
        self._finish_save(patient=decisions.ending.state in ("finished", "stopped"))
        return decisions.agree() or decisions.ending

    def _between_steps(self) -> None:
        """Learn of what came while the loop acted. A stop by a signal is obeyed before the next step."""
        if why := self.saver.look():
            self.ask("stop", why, "halted")
        going = self.decisions.ending is None and self.step < self.steps
        ending = self.decisions.agree(with_signals=going)
        if going and ending and ending.state == "stopped":
            self.decisions.take("save")
            self._save()

    def _act(self) -> None:
        """Do what was decided, in one fixed order. What a stop leaves undone stays owed.

        What callbacks ask for meanwhile is done after the next step, but for a save, which comes last anyway.
        """
        decisions, decided = self.decisions, self.decisions.decide()
        if decisions.goes_back:
            return
        if decided.trace:
            self.traced_until = self.step + TRACED_STEPS
        if decided.ending is None and self.step == self.steps and decided.eval and decided.save:
            self._save()  # the last evaluation may need more memory than there is, and even be killed for it
            self._finish_save(patient=True)
            if decisions.agree():
                return
        scores = self._evaluate() if decided.eval else {}
        if scores is not None:
            decisions.owed = {}
            if decided.eval or decided.log:
                self._log(scores)
        if decided.eval or decided.log:
            decisions.agree(with_signals=scores is None)
        save = decisions.take("save") or decided.save
        if (save or decisions.ending) and not decisions.goes_back:
            self._save()
        decisions.obeyed()

    # -- a step -------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        """Where the memory does not suffice, in smaller micro-batches: the gradients are the same, to rounding."""
        random, totals, step = rng.state_dict(), self._totals.state_dict(), self.step
        buffers = [(buffer, buffer.clone()) for buffer in parts.changing_buffers(self.model)]
        outcome = self.decisions.outcome(self._tried(buffers), changed=self.update.updated or self.step > step)
        if outcome.what is What.OUT_OF_MEMORY:
            self.order = self.order.halved(self.stage.divisible)
            log.warning("step %d: out of memory; micro-batches of %s samples from now on, and more of them to an "
                        "update: the same mathematics", step + 1, self.order.micro)
        if outcome.broken:  # done by one phase of several, by one process of several, or half
            return self.go_back(step + 1, "", outcome.what.value)
        if outcome.what is not What.OUT_OF_MEMORY:  # abandoned for a stop, it is done when the run is resumed
            return
        for buffer, before in buffers:
            buffer.copy_(before)
        rng.load_state_dict(random)
        self._totals.load_state_dict(totals, self.device)
        self._open_data()
        self._train_step()

    def _tried(self, buffers: list[tuple[Tensor, Tensor]]) -> What:
        try:
            self._try_step(buffers)
            return What.DONE
        except Abandoned:
            return What.ABANDONED
        except (RuntimeError, MemoryError) as error:  # as long as it lives, so do the activations
            if not devices.is_out_of_memory(error):
                raise
            self.order.halved(self.stage.divisible)  # where it cannot be, this error is the reason that is logged
            return What.OUT_OF_MEMORY

    def _try_step(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        self.update.updated = False
        self.model.train()
        self._emit("on_step_start")
        self._rows_of = self.step
        self.micro_batches = [devices.move(next(self._batches), self.device) for _ in self.rows()]
        for batch in self.micro_batches:
            self._emit("on_batch", batch)
        self.update.run(self.step, self.micro_batches)
        for buffer, before in buffers:  # a forward pass of NaN leaves NaN in running statistics
            buffer.copy_(torch.where(self.dropped > 0, before, buffer))
        self.record("health/dropped_share", self.dropped if self.micro_batches else 1.0)  # all its rows are left out
        self.step += 1
        self._emit("on_step_end")
        self.decisions.ask_by_interval(self.step, self.steps, self.steps_per_epoch, self.saver.last,
                                       evaluation=self.evaluations.is_due(self.step))
        self.micro_batches = []

    # -- after a step -------------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float] | None:
        """Do the evaluations that are due; None if a stop came in between, nothing where the memory does not suffice.
        Leaves the run's randomness alone."""
        self._emit("on_eval_start")
        cfg = replace(self.cfg, batch_size=self.order.micro or self.cfg.batch_size)
        metrics: dict[str, float] = {}
        for evaluation in self.evaluations.due(self.step, self.steps):
            what, scores = self._scored(evaluation, cfg)
            if what is What.ABANDONED:
                log.info("evaluation abandoned; it is done first when the run goes on")
                self._emit("on_eval_end", {})
                return None
            metrics |= scores
        if self.stage.best[0] in metrics:
            self._judge(metrics)
        self._emit("on_eval_end", metrics)
        return metrics

    def _scored(self, evaluation: Evaluation, cfg: Options) -> tuple[What, dict[str, float]]:
        """What became of an evaluation in all processes, and its metrics if all have done it."""
        done = self.evaluations.run("validation", self.model, cfg, self.device, lambda: self.signals.stop, [evaluation])
        problem = next((scores.problem for scores in done or [] if scores.problem), "")
        if problem:
            log.error("step %d is not evaluated (%s): %s", self.step, evaluation.name, problem)
        own = What.ABANDONED if done is None else What.OUT_OF_MEMORY if problem else What.DONE
        what = self.decisions.outcome(own).what
        if what is What.OUT_OF_MEMORY and self.step == self.steps:
            self.ask("stop", "all steps done, the last evaluation ran out of memory: ./run/evaluate.sh tries again")
        return what, merged(done or []) if what is What.DONE else {}

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
            return self.decisions.halt("NaN or Inf in weights or optimizer")
        by_epoch = self.step > 0 and self.step % self.steps_per_epoch == 0
        name = f"epoch_{self.step // self.steps_per_epoch:04d}" if by_epoch else f"step_{self.step:08d}"
        self.saver.begin(f"snapshot_{name}", self.step, parts.kept(self.model), self.state_dict(),
                         best_step=self.best_step, judged=self._judged)

    def _finish_save(self, patient: bool) -> None:
        if (why := self.saver.finish(patient)) and not self.decisions.goes_back:  # else there is an older one
            self.decisions.halt(f"{why}: make room, and resume from the newest snapshot")

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """With the model's weights, the whole truth of a run."""
        return {
            "step": self.step, "steps": self.steps, "best": self.best, "best_step": self.best_step,
            **self.decisions.state_dict(),
            "lr": self.lr,
            "ledger": list(self.ledger), "micro": self.order.micro, "order": self.order.state_dict(self.step),
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
        self.decisions.load_state_dict(state, same_length=state["steps"] == self.steps)
        self.update.lr = state["lr"]
        self._note_left_out(state["ledger"] + [entry for entry in self.ledger if entry not in state["ledger"]])
        self.order = replace(self.order, micro=self.order.micro or state["micro"])
        self.order.load_state_dict(self.step, state.get("order", {}))  # older snapshots have none
        self._totals.load_state_dict(state["totals"], self.device)
        if state["steps"] != self.steps:
            log.warning("planned for %s steps, now for %s: the learning rate follows the new plan from here on",
                        f"{state['steps']:,}", f"{self.steps:,}")
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])
        for phase, scale in self.loss_scales.items():
            scale.load_state_dict(state["loss_scales"][phase])
        self.events.load_state_dict(state["callbacks"])
        rng.load_state_dict(state["rng"])
        self.snapshots.set_aside_after(self.step)

    # -- events -------------------------------------------------------------------------------------------------

    def _emit(self, event: str, *args: Any, guarded: bool = False) -> None:
        self.events.emit(event, self, *args, guarded=guarded)
