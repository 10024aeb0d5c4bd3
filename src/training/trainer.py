"""The one loop, and the only writer of a run's progress."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from config import UserError
from data.loader import Order, evaluation_batches, training_batches
from training import device as devices
from training import optim, rng
from training.callback import Callback, in_order, listeners
from training.options import Options, epochs_of
from training.signals import Signals
from training.snapshots import Snapshots
from training.stage import Batch, Ratio, Stage

log = logging.getLogger(__name__)

Request = Literal["eval", "log", "save", "stop"]
State = Literal["finished", "stopped", "halted"]


@dataclass(frozen=True)
class Ending:
    """How a run came to its end: finished; stopped by request; halted because it could not go on healthily."""

    state: State
    reason: str


class Trainer:
    """Trains one stage.

    Read by callbacks: stage, cfg, model, optimizers, micro_batches, step, steps, steps_per_epoch, best, best_step,
    dropped, device, timings, switched_off, evaluating.
    Called by callbacks: ask(), skip(), record(), rows(). Nothing else is theirs to touch.

    `cfg` is the config fitted to the run's length, `steps` that length, `order` which rows make up each step.
    """

    def __init__(self, stage: Stage, cfg: Options, steps: int, order: Order, snapshots: Snapshots,
                 callbacks: list[Callback], signals: Signals, device: torch.device):
        self.stage, self.cfg, self.steps, self.order = stage, cfg, steps, order
        self.snapshots, self.signals, self.device = snapshots, signals, device
        self.callbacks = in_order(callbacks)
        self.steps_per_epoch = order.steps_per_epoch
        self.step, self.lr = 0, cfg.lr
        self.best, self.best_step = math.nan, -1
        self.dropped = torch.zeros((), device=device)  # 1 where the last update was not finite, so not applied
        self.timings: dict[str, float] = {}  # clocks and memory of this log step: never part of the mathematics
        self.switched_off: list[str] = []
        self.evaluating = False
        self.micro_batches: list[Batch] = []
        self._listeners = listeners(callbacks)
        self._asked: dict[Request, str] = {}
        self._ending: Ending | None = None
        self._skip = ""
        self._totals: dict[str, list[Any]] = {}

    # -- what callbacks call ------------------------------------------------------------------------------------

    def ask(self, what: Request, why: str, end: State = "finished") -> None:
        """Ask the loop to evaluate, log, save or stop once this step has ended; `end`: what a stop means."""
        self._asked.setdefault(what, why)
        if what == "stop" and self._ending is None:
            self._ending = Ending(end, why)

    def skip(self, why: str) -> None:
        """Drop the gradients of the phase being updated (from on_loss or on_grad)."""
        self._skip = why

    def record(self, name: str, value: Ratio | Tensor | float) -> None:
        """Add to a figure's mean over the log interval. Tensors stay on the device until then."""
        ratio = value if isinstance(value, Ratio) else Ratio(value, 1)
        self._totals[name] = _add(self._totals.get(name, [0.0, 0]), ratio)

    def rows(self) -> list[list[int]]:
        """The rows of the step in hand (in `on_step_end`: of the one just done), a list for each micro-batch."""
        return self.order.rows(self._rows_of)

    @property
    def logged_step(self) -> int:
        """The step up to which log lines belong to this state: one less while the log of this step is owed."""
        return self.step - 1 if "log" in self._asked or "eval" in self._asked else self.step

    @property
    def epoch(self) -> int:
        """Epochs begun, from 1; at an epoch's last step still that one."""
        return max(1, epochs_of(self.step, self.steps_per_epoch))

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
            self._emit("close", guarded=True)

    def _build(self) -> None:
        rng.seed(self.cfg.seed)
        self.model = self.stage.model().to(self.device)
        self._emit("on_build")
        self.optimizers = {
            phase: optim.adamw(self.stage.params(self.model, phase), self.cfg.lr, self.cfg.weight_decay)
            for phase in self.stage.phases
        }

    def _open_data(self) -> None:
        self._validation = self.stage.dataset("validation")
        self._workers = devices.loader_workers(self.device, self.cfg.num_workers)
        self._batches = training_batches(self.stage.dataset("train"), self.stage.collate, self.order, self.step,
                                         self.steps, self._workers, self.device.type == "cuda")

    def _loop(self, fresh: bool) -> Ending:
        self._last_save = time.monotonic()
        if fresh:
            self._save()
        if self._asked:
            self._act()  # what the interrupted run still owed
        while self._ending is None and self.step < self.steps:
            self._obey_signals()
            if self._ending is None:
                self._train_step()
                self._ask_by_interval()
                self._obey_signals()
            self._act()
        return self._ending or Ending("finished", "all steps done")

    def _ask_by_interval(self) -> None:
        last, epoch_end = self.step == self.steps, self.step % self.steps_per_epoch == 0
        if last or self.step % (self.cfg.eval_interval or self.steps_per_epoch) == 0:
            self.ask("eval", "interval")
        if last or self.step % self.cfg.log_interval == 0:
            self.ask("log", "interval")
        if last or epoch_end or (self.cfg.snapshot_interval and self.step % self.cfg.snapshot_interval == 0):
            self.ask("save", "interval")
        elif self.cfg.snapshot_minutes and time.monotonic() - self._last_save > 60 * self.cfg.snapshot_minutes:
            self.ask("save", "time")

    def _obey_signals(self) -> None:
        if self.signals.take_save():
            self.ask("save", "SIGUSR1")
        if self.signals.stop:
            self.ask("stop", f"{self.signals.stop} received", "stopped")

    def _act(self) -> None:
        """Do what was asked during the step, in one fixed order. What a stop leaves undone stays owed."""
        if "eval" in self._asked and not self._evaluate():
            self._obey_signals()
        else:
            if "eval" in self._asked or "log" in self._asked:
                self._log()
            self._asked.pop("eval", None)
            self._asked.pop("log", None)
        if self._asked.pop("save", "") or self._ending is not None:
            self._save()

    # -- a step -------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        self.model.train()
        self._emit("on_step_start")
        self._set_rates()
        self._rows_of = self.step
        self.micro_batches = [devices.move(next(self._batches), self.device) for _ in self.rows()]
        for batch in self.micro_batches:
            self._emit("on_batch", batch)
        self.dropped = torch.zeros((), device=self.device)
        for phase in self.stage.phases:
            self._update(phase)
        self.step += 1
        self._emit("on_step_end")
        self.micro_batches = []

    def _update(self, phase: str) -> None:
        """One optimizer update from all micro-batches, each sample of them weighing the same."""
        optimizer, self._skip = self.optimizers[phase], ""
        params = optim.parameters(optimizer)
        optimizer.zero_grad(set_to_none=True)
        count: Any = 0
        for batch in self.micro_batches:
            with devices.autocast(self.device, self.cfg.precision):
                loss, extras = self.stage.loss(self.model, batch, phase)
            self._emit("on_loss", phase, loss)
            loss.total.backward()
            count = count + loss.count
            self.record(self._train_name(phase, "loss"), loss)
            for name, ratio in extras.items():
                self.record(self._train_name(phase, name), ratio)
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_div_(grads, count)
        self._emit("on_grad", phase)
        if self._skip:
            log.warning("step %d: %s update skipped: %s", self.step + 1, phase, self._skip)
            return
        self._apply(phase, optimizer, params)

    def _apply(self, phase: str, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> None:
        """Clip and update. An update that is not finite is dropped on the device, so the host need not wait."""
        norm = torch.nn.utils.clip_grad_norm_(params, self.cfg.gradient_clip or math.inf)
        dropped = (~torch.isfinite(norm)).float()
        self.dropped = torch.maximum(self.dropped, dropped)
        self.record(self._phase_name("grad_norm", phase), norm)
        optim.drop_update(optimizer, dropped)
        optimizer.step()

    def _set_rates(self) -> None:
        self.lr = self.cfg.lr * optim.rate(self.step, self.steps, warmup=self.cfg.warmup_steps,
                                           min_ratio=self.cfg.min_lr_ratio, schedule=self.cfg.lr_schedule)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.lr

    def _train_name(self, phase: str, name: str) -> str:
        return "train/" + self._phase_name(name, phase)

    def _phase_name(self, name: str, phase: str) -> str:
        return name if len(self.stage.phases) == 1 else f"{phase}/{name}"

    # -- after a step -------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """Score the whole validation set; False if a stop came in between. Leaves the run's randomness alone."""
        self.evaluating = True
        self._emit("on_eval_start")
        with torch.no_grad(), rng.preserved():
            self.model.eval()
            sums = self._scores()
        metrics = {} if sums is None else {f"eval/{name}": _mean(total) for name, total in sums.items()}
        metrics |= self.stage.derive(metrics)
        if metrics:
            self._judge(metrics)
        self._emit("on_eval_end", metrics)
        self._eval_metrics, self.evaluating = metrics, False
        return bool(metrics)

    def _scores(self) -> dict[str, list[Any]] | None:
        sums: dict[str, list[Any]] = {}
        for batch in evaluation_batches(self._validation, self.stage.collate, self.cfg.batch_size, self._workers):
            if self.signals.stop:
                log.info("evaluation abandoned; it is done first when the run goes on")
                return None
            with devices.autocast(self.device, self.cfg.precision):
                scores = self.stage.score(self.model, devices.move(batch, self.device))
            for name, ratio in scores.items():
                sums[name] = _add(sums.get(name, [0.0, 0]), ratio)
        return sums

    def _judge(self, metrics: dict[str, float]) -> None:
        """Note the best evaluation so far; it is saved, and spared by the rotation."""
        name, mode = self.stage.best
        value = metrics[name]
        if math.isnan(self.best) or (value < self.best if mode == "min" else value > self.best):
            self.best, self.best_step = value, self.step
            self.ask("save", "best")

    def _log(self) -> None:
        """Turn the sums since the last log into floats: the only place where the host waits for the device."""
        metrics = {name: _mean(total) for name, total in self._totals.items()}
        metrics |= self.stage.derive(metrics)
        metrics["lr"] = self.lr
        if "eval" in self._asked:
            metrics |= self._eval_metrics
        self._totals, self.timings = {}, {}
        self._emit("on_log", metrics)

    def _save(self) -> None:
        by_epoch = self.step > 0 and self.step % self.steps_per_epoch == 0
        name = f"epoch_{self.step // self.steps_per_epoch:04d}" if by_epoch else f"step_{self.step:08d}"
        path = self.snapshots.save(f"snapshot_{name}", self.step, self.model.state_dict(), self.state_dict(),
                                   keep_last=self.cfg.keep_last_n_snapshots, best_step=self.best_step)
        self._last_save = time.monotonic()
        self._emit("on_save", path)

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """With the model's weights, the whole truth of a run."""
        return {
            "step": self.step, "steps": self.steps, "best": self.best, "best_step": self.best_step,
            "owed": {what: why for what, why in self._asked.items() if what in ("eval", "log")},
            "ended": self._ending.reason if self._ending and self._ending.state == "finished" else "",
            "lr": self.lr,
            "data": self.stage.fingerprint(), "rows": self.order.size,
            "totals": {name: list(total) for name, total in self._totals.items()},
            "optimizers": {phase: optimizer.state_dict() for phase, optimizer in self.optimizers.items()},
            "rng": rng.state_dict(),
            "callbacks": {c.key: {"acts": not c.is_monitor, "state": state}
                          for c in self.callbacks if (state := c.state_dict())},
        }

    def _restore(self, snapshot: Path) -> None:
        state = self.snapshots.load(snapshot, self.model, self.device)
        there = state["data"], state["rows"], state["steps"]
        here = self.stage.fingerprint(), self.order.size, self.steps
        if there != here:
            raise UserError("the data are not those of the interrupted run (fingerprint, rows, steps: %s %d %d there, "
                            "%s %d %d here): bring them back, or start a new run with --checkpoint_file %s"
                            % (*there, *here, snapshot))
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self._asked, self._totals, self.lr = dict(state["owed"]), state["totals"], state["lr"]
        self._ending = Ending("finished", state["ended"]) if state["ended"] else None
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])
        self._restore_callbacks(dict(state["callbacks"]))
        rng.load_state_dict(state["rng"])

    def _restore_callbacks(self, states: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.load_state_dict(states.pop(callback.key, {"state": {}})["state"])
        for key, saved in states.items():
            if saved["acts"]:
                raise UserError(f"the snapshot holds the state of {key}, which had a hand in this training and is "
                                "missing now: give the options that the run was started with")
            log.warning("the state of %s is dropped: this run does not have it", key)

    # -- events -------------------------------------------------------------------------------------------------

    def _emit(self, event: str, *args: Any, guarded: bool = False) -> None:
        """Tell every callback that listens. A monitor that raises is switched off; `guarded`: nothing gets out."""
        for callback in list(self._listeners[event]):
            try:
                getattr(callback, event)(self, *args)
            except Exception:
                if not (guarded or callback.is_monitor):
                    raise
                log.exception("%s failed in %s%s", callback.key, event, "" if guarded else "; it is switched off")
                self._switch_off(callback)

    def _switch_off(self, callback: Callback) -> None:
        self.switched_off.append(callback.key)
        for event, called in self._listeners.items():
            if callback in called and event != "close":
                called.remove(callback)


def _add(total: list[Any], ratio: Ratio) -> list[Any]:
    return [total[0] + _detached(ratio.total), total[1] + _detached(ratio.count)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _mean(total: list[Any]) -> float:
    return float(total[0]) / float(total[1]) if float(total[1]) else math.nan
