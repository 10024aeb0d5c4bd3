"""One session of a run: prepare the data, build trainer and callbacks, train, export the models."""

import gc
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # which torch's optimizers and determinism import, but not in launch's `importing`

from stoker import config, files
from stoker.config import Damaged, Parsed, UserError
from stoker.daemon import machine, registry
from stoker.daemon.inbox import Inbox
from stoker.daemon.pulse import ESTIMATING, PREPARING, Pulse
from stoker.daemon.rundir import RunDir
from stoker.monitors import plots
from stoker.monitors.console import Console
from stoker.monitors.goodput import Goodput
from stoker.monitors.gradients import Gradients
from stoker.monitors.journal import JournalWriter
from stoker.monitors.pace import Pace
from stoker.monitors.profiler import Profiler
from stoker.monitors.progress import Progress
from stoker.monitors.repetition import Repetition
from stoker.monitors.samples import Samples
from stoker.monitors.sanity import Sanity
from stoker.monitors.speed import Speed
from stoker.monitors.spikes import Spikes
from stoker.monitors.status import StatusWriter
from stoker.monitors.system import System
from stoker.monitors.tensorboard import TensorBoard
from stoker.monitors.wandb import WandB
from stoker.monitors.weights import Weights
from stoker.training.assembly import decide, estimate, plugins, receipt
from stoker.training.assembly.estimate import Estimate
from stoker.training.assembly.export import export_models
from stoker.training.assembly.job import Job
from stoker.training.assembly.length import Length
from stoker.training.callbacks.begin import Begin
from stoker.training.callbacks.blocks import Blocks
from stoker.training.callbacks.early_stopping import EarlyStopping
from stoker.training.callbacks.ema import EMA
from stoker.training.callbacks.examination import Examination
from stoker.training.callbacks.load_weights import LoadWeights
from stoker.training.callbacks.rotation import Rotation
from stoker.training.callbacks.time_limit import TimeLimit
from stoker.training.core import blocks, incident, manifest, pretrained
from stoker.training.core import device as devices
from stoker.training.core.callback import Callback
from stoker.training.core.ending import Ending
from stoker.training.core.options import Options
from stoker.training.core.plan import Plan, Setup, resolve
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.signals import Signals
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)

SPIKE_RECOVERIES = 10  # in a run; later spikes are only reported


class Session:
    """Trains a job in its run directory. The caller holds the run's lock."""

    def __init__(self, job: Job, run: RunDir, signals: Signals, begun: threading.Event):
        """`begun` is set once nothing can be refused any more."""
        self.job, self.run, self.signals, self.begun = job, run, signals, begun
        self.pulse = Pulse(run)
        self.began = time.monotonic()
        self.failures: list[Ending] = []  # for which it went back
        self.examination: Examination | None = None  # of the last step that was bad
        self.ledger: list[dict[str, Any]] = []  # as it was at the last one: the snapshot gone back to may be older
        self.micro = 0  # as well

    def train(self) -> Ending:
        """Raises UserError before training has begun, and Interrupted if a stop came before that."""
        trainer, snapshot = self.prepare()
        self.signals.interruptible = False  # from here on there is something to save
        with self.signals.children_spared():
            while (ending := trainer.fit(snapshot)).state == "back":
                try:
                    self._turn_back(trainer, ending)
                except UserError as error:
                    return Ending("halted", f"{ending.reason}, and there is nothing to go back to: {error}")
                del trainer
                gc.collect()  # the old model's memory is needed for the new one
                trainer, snapshot = self.prepare()
            return self._export(trainer, ending) if ending.state == "finished" else ending

    def _export(self, trainer: Trainer, ending: Ending) -> Ending:
        try:
            export_models(trainer, self.run)
        except (OSError, RuntimeError, MemoryError) as error:
            if not (files.may_pass(error) or devices.is_out_of_memory(error)):
                raise
            return Ending("halted", f"{ending.reason}, but the model could not be written ({blocks.first_line(error)}"
                          "): make room, or free memory, and resume: nothing is trained again")
        _draw(self.run)
        self.pulse.write(busy_seconds=self.pulse.busy_seconds)
        return ending

    def _turn_back(self, trainer: Trainer, ending: Ending) -> None:
        """The job that resumes the run from before a step that failed."""
        snapshot = manifest.newest_good(self.run.snapshots, before=ending.step)
        if snapshot is None:
            raise UserError(f"no snapshot of a step before {ending.step} is left")
        log.warning("%s: going back to %s", ending.reason, snapshot.name)
        parsed = Parsed(trainer.cfg, frozenset(vars(trainer.cfg)), self.job.parsed.preset)
        self.job = replace(self.job, parsed=parsed, run=self.run, snapshot=snapshot)
        self.failures.append(ending)
        if ending.why:
            self.examination = Examination(ending.step, ending.why, self.run.incidents, self.run.metrics)
        self.ledger, self.micro = trainer.ledger, trainer.order.micro

    def prepare(self) -> tuple[Trainer, Path | None]:
        """The trainer of this sitting, and the snapshot to resume from. Whoever finds a damaged file in the cache
        removes it, so a second try makes it again."""
        try:
            return self._prepare()
        except Damaged as damaged:
            log.warning("%s", damaged)
        return self._prepare()

    def _prepare(self) -> tuple[Trainer, Path | None]:
        self.pulse.enter(PREPARING)
        setup = resolve(self.job.stage, self.job.cfg, self.run.path)
        self._report_start(setup)
        kept = Snapshots(self.run.snapshots, {})
        kept.tidy()
        files.tidy(self.run.path)
        snapshot = self._where_to_go_on(kept)
        setup.prepare(pretrained.find(str(snapshot)) if snapshot else None)
        self.signals.check()
        plan = setup.plan(self.job.parsed.typed).with_micro(self.micro)
        _report_plan(plan)
        plan, expected = self._estimate(plan, begins=snapshot is None)
        if not self.failures:  # else training is under way, and the saver waits for room
            _check_room(kept, snapshot, expected)
        cfg, stage = plan.cfg, plan.stage
        weights = None if snapshot else self._initial_weights(cfg)
        own = [*stage.callbacks(), *plugins.load(cfg.callback)]
        kept = replace(kept, made_by=receipt.made_by(stage, plan.rows, plan.device, _begun_with(weights, snapshot), own,
                                                     self.run.status().script))
        # now, or in an earlier sitting
        extended = self.job.cfg.extend_steps > 0 or cfg.max_steps == self.run.status().of
        changed = _show_receipt(snapshot, kept.made_by, type(cfg), extended) if snapshot else []
        callbacks = [*self._persistent_callbacks(cfg),
                     *_callbacks(plan, self.run, self.pulse, weights, expected, own),
                     *own,
                     Repetition(self.run.metrics, changed),
                     Begin(self.run, self.begun)]
        plugins.check_keys(callbacks)
        return Trainer(plan, kept, callbacks, self.signals, self.ledger if snapshot else _ledger(cfg.skip_rows),
                       inbox=Inbox(self.run.requests)), snapshot

    def _persistent_callbacks(self, cfg: Options) -> list[Callback]:
        """The callbacks that keep their state when the run goes back: limits, and `Examination` of the failed step."""
        times = len([failure for failure in self.failures if failure.why == incident.NON_FINITE])
        found: list[Callback] = [Sanity(self.run.alerts, self.run.incidents, cfg.sanity_check_interval, times)]
        if cfg.spike_factor:
            found.append(Spikes(self.run.alerts, cfg.spike_factor, SPIKE_RECOVERIES if cfg.spike_recovery else 0))
        if cfg.max_minutes:
            found.append(TimeLimit(cfg.max_minutes, self.began))
        return [*found, *([self.examination] if self.examination else [])]

    def _report_start(self, setup: Setup) -> None:
        device = devices.describe(setup.device)
        log.info("Device: %s", device)
        self.run.write_status(replace(self.run.status(), device=device))
        for line in [*self.job.notes, *config.unusual(setup.cfg), *machine.warnings(), *self._neighbours()]:
            log.warning("%s", line)

    def _neighbours(self) -> list[str]:
        """A line for each other run that computes on the same device now."""
        device = self.run.status().device
        return [f"{run.name} (process {holder.pid}) computes on {device} too: both will be slower"
                for run in registry.runs()
                if run.path != self.run.path and run.status().device == device and (holder := run.holder())]

    def _where_to_go_on(self, kept: Snapshots) -> Path | None:
        """The snapshot to resume from, its receipt in the log; None for a new run and one that had not begun."""
        if self.job.run is None:
            return None
        snapshot = self.job.snapshot or kept.newest_good()
        if snapshot is None and (step := self.run.status().step):
            raise UserError(f"run {self.run.name} has reached step {step}, but there is no snapshot in "
                            f"{self.run.snapshots} any more: bring one back, or start a new run")
        if snapshot is None:
            log.info("no snapshot yet: the run had not begun, it starts now")
            return None
        if self.job.snapshot:
            manifest.verified(snapshot)
        return snapshot

    def _estimate(self, plan: Plan, *, begins: bool) -> tuple[Plan, Estimate | None]:
        """What the run will take, and whether it is compiled; a resumed run keeps to what was found then."""
        if begins:
            self.pulse.enter(ESTIMATING)
            started = self.run.status().started or time.time()
            plan, expected, length, lines = decide.expect(plan, started)
            for line in [*lines, expected.describe(length, plan.cfg.batch_size)]:
                log.info("%s", line)
            files.write_json(self.run.estimate, asdict(expected))
        else:
            plan, known = _still_compiled(plan), estimate.read(self.run.estimate)
            if known is None or known.device != devices.describe(plan.device):
                return plan, None
            length, peak = Length.of(plan), estimate.peak_flops(plan.device, plan.cfg.precision)
            expected = replace(known, peak_flops=peak)  # of the threads of now
        self.run.write_status(replace(self.run.status(), expected_seconds=expected.seconds(length)))
        return plan, expected

    def _initial_weights(self, cfg: Options) -> Pretrained | None:
        """What a run takes its weights from when it begins."""
        return pretrained.find(cfg.init_from, (self.job.stage.name,)) if cfg.init_from else None


def _ledger(path: str) -> list[dict[str, Any]]:
    """The rows to leave out from the start. Raises UserError where the file holds none."""
    return incident.read(Path(path)).ledger if path else []


def _check_room(kept: Snapshots, snapshot: Path | None, expected: Estimate | None) -> None:
    """Raises UserError where the next snapshot will not fit."""
    size = expected.memory(0)["snapshot"] if expected else 0
    if snapshot:
        size = sum(entry["size"] for entry in manifest.read(snapshot)["files"].values())
    try:
        kept.check_room(size)
    except OSError as error:
        raise UserError(f"{error.strerror} in {kept.folder}: make room, or choose another --result_dir") from error


def _begun_with(weights: Pretrained | None, snapshot: Path | None) -> dict[str, str]:
    """The weights that a run begins with, or began with; a resumed run no longer needs their files."""
    if weights:
        return weights.identity
    return dict(manifest.read(snapshot)["made_by"].get("begun_with", {})) if snapshot else {}


def _show_receipt(snapshot: Path, made_by: Mapping[str, Any], options: type, extended: bool) -> list[str]:
    """Log what differs from the interrupted run. Raises UserError where a difference is not allowed."""
    log.info("Resuming from %s, step %d", snapshot, manifest.read(snapshot)["step"])
    changed = receipt.compare(snapshot, made_by, options, extended=extended)
    log.info("Receipt: %s", f"{len(changed)} differences from the interrupted run" if changed else
             "same configuration, data, code, packages, device and threads as the interrupted run")
    for line in changed:
        log.warning("  %s", line)
    return changed


def _still_compiled(plan: Plan) -> Plan:
    """The plan of a resumed run. A compiled run is no longer compiled where the compiler is missing now."""
    if plan.cfg.compile and (why := blocks.compiler_problem(plan.device)):
        log.warning("not compiled any more, so the last bits will differ: %s", why)
        return plan.with_compile(False)
    return plan


def _draw(run: RunDir) -> None:
    try:
        log.info("Plots: %s", plots.draw(run))
    except Exception:  # a page is no reason for a run to fail that has done all it should
        log.exception("the plots could not be drawn")


def _report_plan(plan: Plan) -> None:
    batch, accum = plan.cfg.batch_size, plan.cfg.grad_accum_steps
    log.info("Loaded %s samples", "a stream of" if plan.rows is None else f"{plan.rows:,}")
    if plan.rows is not None and plan.order.steps_per_epoch == 1 and batch * accum > plan.rows:
        log.warning("--batch_size %s x --grad_accum_steps %s is more than the %s samples, so each epoch is one step: "
                    "lower one of them", f"{batch:,}", f"{accum:,}", f"{plan.rows:,}")
    for line in plan.notes:
        log.info("%s", line)


def _callbacks(plan: Plan, run: RunDir, pulse: Pulse, weights: Pretrained | None, expected: Estimate | None,
               own: Sequence[Callback]) -> list[Callback]:
    """What every run has beside the stage's and the user's `own`. Their order in the loop comes from their bands."""
    cfg, speed = plan.cfg, Speed()
    if expected:
        length = Length.of(plan)
        speed = Speed(expected.sample_flops, expected.peak_flops, expected.evaluation_seconds(length),
                      expected.step_seconds(length))
    callbacks: list[Callback] = [speed, Goodput(run), System(run.path, run.alerts), Pace(run.alerts),
                                 Progress(run.alerts), Profiler(run.path)]
    if cfg.samples:
        callbacks.append(Samples(run.samples))
    if weights:
        callbacks.append(LoadWeights(weights))
    if cfg.compile or cfg.gradient_checkpointing:
        callbacks.append(Blocks())
    if cfg.ema_decay:
        callbacks.append(EMA(cfg.ema_decay))
    if cfg.early_stopping:
        callbacks.append(EarlyStopping.of(cfg, plan.stage.best))
    if cfg.gradient_monitor and cfg.gradient_monitor_interval:
        callbacks.append(Gradients(cfg.gradient_monitor_interval, cfg.weight_monitor_sample_size, run.alerts))
    if cfg.weight_monitor and cfg.weight_monitor_interval:
        callbacks.append(Weights(cfg.weight_monitor_interval, cfg.weight_monitor_sample_size, run.alerts))
    if not any(isinstance(callback, Rotation) for callback in own):
        callbacks.append(Rotation(cfg.keep_last_n_snapshots, cfg.keep_best_k_snapshots, cfg.keep_every_n_steps))
    views = [JournalWriter(run.metrics, run.timings), Console(), TensorBoard(run.tensorboard),
             StatusWriter(pulse), *([WandB(run)] if cfg.use_wandb else [])]
    return [*callbacks, *views]
