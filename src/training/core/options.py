"""The options of every stage, and the length of a run that follows from them and the number of samples."""

import math
import os
from collections.abc import Collection
from contextlib import AbstractContextManager, chdir, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from stoker.config import ENDLESS, UserError, opt
from stoker.training.core.ending import Request
from stoker.training.core.phases import SCHEDULES

FIRINGS = 20  # each monitor, snapshot and evaluation fires at least so often in a run
T = TypeVar("T", bound="Options")


@dataclass
class Length:
    """Training length"""

    epochs: int = opt(20, "passes through the training data", ge=1, aliases=("num_epochs",))
    max_steps: int | None = opt(None, "end after N steps, with as many epochs as that takes; with --epochs too, "
                                "whichever comes first", ge=1, aliases=("max_iters",))
    max_samples: int = opt(0, "train on the first N samples only, for a quick test (0: all)", ge=0)
    max_minutes: float = opt(0.0, "save and stop after so many minutes; when the run is resumed, it trains as long "
                             "again (0: no limit)", ge=0, may_change=True)


@dataclass
class Optimization:
    """Optimization"""

    batch_size: int = opt(32, "samples in a micro-batch", ge=1, usual=(1, 256))
    grad_accum_steps: int = opt(1, "micro-batches in a step", ge=1, aliases=("gradient_accumulation_steps",))
    lr: float = opt(3e-4, "peak learning rate", gt=0, le=1e-2, aliases=("learning_rate",))
    lr_schedule: str = opt("cosine", "learning rate after the warm-up", choices=SCHEDULES)
    warmup_steps: int = opt(1000, "steps of linear warm-up; unless you set it, at most a tenth of the run", ge=0,
                            aliases=("warmup",))
    min_lr_ratio: float = opt(0.1, "learning rate at the end of the run, as a share of the peak", ge=0, le=1)
    optimizer: str = opt("adamw", "adamw, or muon (Muon for the matrices and convolutions of the blocks, AdamW for all "
                         "other weights)",
                         choices=("adamw", "muon"))
    weight_decay: float = opt(0.1, "weight decay (not applied to biases and norms)", ge=0, lt=1)
    gradient_clip: float = opt(1.0, "clip the gradients to this norm (0: do not clip)", ge=0,
                               aliases=("max_grad_norm",))
    ema_decay: float = opt(0.0, "evaluate and export an exponential moving average (EMA) of the weights with this "
                           "decay, such as 0.999 (0: no average)", ge=0, lt=1)
    seed: int = opt(42, "seed of all random numbers", ge=0, lt=2**63)


@dataclass
class Machine:
    """Hardware"""

    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps", may_change=True)
    precision: str = opt("auto", "precision of the forward pass; auto: bf16 on a GPU that supports it, fp16 with loss "
                         "scaling on other GPUs; on a CPU that multiplies bf16 in hardware, bf16 where a trial before "
                         "the run shows that it is faster by a fifth, else fp32",
                         choices=("auto", "fp32", "bf16", "fp16"))
    amp: bool = opt(True, "allow mixed precision, see --precision; --no_amp is the same as --precision fp32",
                      aliases=("use_amp",))
    compile: bool | None = opt(None, "compile the model's blocks with torch.compile; by default only in a long run, if "
                               "a trial before it shows that it pays", aliases=("use_compile",))
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, about a third "
                                       "more time", may_change=True)
    threads: int = opt(0, "CPU threads (0: torch chooses); with another number, results may differ in the last "
                       "bits", ge=0, may_change=True)
    num_workers: int | None = opt(None, "processes that load data (default: 0 on a CPU, up to 4 for a GPU)", ge=0,
                                  may_change=True)
    num_processes: int = opt(1, "processes that train the model together; only 1 is supported so far", ge=1)

    def problems(self) -> list[str]:
        found = device_problems(self.device)
        if not self.amp and self.precision not in ("auto", "fp32"):
            found.append(f"--no_amp means --precision fp32, but --precision is {self.precision}: give one of them")
        if self.num_processes > 1:
            found.append(f"--num_processes {self.num_processes}: a run is trained by one process so far; leave it out")
        return found


@dataclass
class Keeping:
    """Snapshots and output"""

    snapshot_interval: int = opt(10000, "steps between snapshots, beside those at each epoch's end and every "
                                 "--snapshot_minutes (0: only those)", ge=0, may_change=True,
                                 aliases=("snapshot", "save_steps", "save_every"))
    snapshot_minutes: float = opt(10.0, "take a snapshot when the last one is so many minutes old (0: off)", ge=0,
                                   may_change=True)
    keep_last_n_snapshots: int = opt(3, "keep the newest N snapshots and the best, delete others (0: keep all)", ge=0,
                                     may_change=True)
    keep_best_k_snapshots: int = opt(1, "keep the snapshots of the N best evaluations", ge=1, may_change=True)
    keep_every_n_steps: int = opt(0, "also keep the snapshots whose step is a multiple of N, until the run has "
                                  "finished (0: off)", ge=0, may_change=True)
    disk_full_minutes: float = opt(60.0, "while the disk is full, train on and try to save again for so many "
                                   "minutes; then stop (exit code 75)", ge=0, may_change=True)
    delete_snapshots_after_training: bool = opt(True, "when the run has finished, delete all snapshots but the newest "
                                                "and the best", may_change=True)
    result_dir: str = opt("", "folder that holds the runs (default: result/ of the project)", path=(), may_change=True,
                          aliases=("checkpoint_dir", "save_dir"))
    run_name: str = opt("", "name of the run and of its folder; the name of an unfinished run resumes that run",
                        may_change=True)
    working_folder: str = opt("", "folder from which relative paths in a CSV file start, where they are not found "
                              "beside the CSV file (default: the folder in which the run is started; a resumed run "
                              "keeps it)", path=(), may_change=True)
    on_end: str = opt("", "a shell command to run when the run has finished, failed or stopped (not after kill -9 or a "
                      "second stop signal); its environment has STOKER_RUN (the run's folder), STOKER_STATE and "
                      "STOKER_REASON", may_change=True)


@dataclass
class Recovery:
    """Recovery"""

    nan_recoveries: int = opt(3, "after a loss or gradient that is NaN or infinite, go back to the snapshot before it "
                              "and skip the samples that caused it; the run stops when this has happened more than N "
                              "times (0: only drop the update; three in a row stop the run)", ge=0)
    spike_recovery: bool = opt(False, "after a spike in the loss, go back to the snapshot before it and skip the "
                               "samples of that step; at most ten times")
    skip_rows: str = opt("", "skip the samples that another run on the same data had to skip: the path of an incident "
                         "of that run, a folder in its incidents/", path=())


@dataclass
class Resuming:
    """Resuming and initializing"""

    resume: str = opt("", "resume a run with all its options, by its name, PID or folder, or from a snapshot; "
                      "without a value: the newest unfinished run of this stage. From an older snapshot, training "
                      "continues in a new run, and the old run stays as it is", bare="newest", may_change=True,
                      aliases=("checkpoint_file",))
    extend_steps: int = opt(0, "with --resume: train N steps more than planned; the learning rate then follows the "
                            "schedule of the longer run", ge=0, may_change=True)
    init_from: str = opt("", "start a new run with the weights, the shape and the tokenizer of a run, a snapshot, a "
                         "model folder or hf://ORG/NAME; without a value: of the newest finished run of this stage",
                         path=(), bare="newest")
    eval_only: bool = opt(False, "evaluate the weights of --init_from or --resume, train nothing", may_change=True)
    split: str = opt("validation", "what --eval_only evaluates: the validation or the test split, or all rows of the "
                     "data set", choices=("validation", "test", "all"), may_change=True)
    confusions: bool = opt(False, "with --eval_only, where texts are heard or read: also print which words or "
                           "characters were most often wrong, the ten worst rows, and error rates by speaker or group "
                           "and by length", may_change=True)
    json: bool = opt(False, "print what --eval_only prints as one JSON document", may_change=True)
    supervise: bool = opt(False, "start a second, small process that watches the trainer: it kills a trainer that "
                          "stalls and resumes the run from its newest snapshot when the trainer has died; after five "
                          "deaths without a new snapshot the run has failed",
                          may_change=True)
    yes: bool = opt(False, "do not ask for confirmation", aliases=("y",), may_change=True)

    @property
    def evaluated_split(self) -> str:
        """What a model that is not trained is evaluated on, a split or "all"; "" where it is trained."""
        return self.split if self.eval_only else ""

    def problems(self) -> list[str]:
        if self.eval_only:
            return []
        found = [f"--{name} is for --eval_only: leave it out" for name in ("confusions", "json") if getattr(self, name)]
        if self.split != "validation":
            found.append(f"--split {self.split} is for --eval_only: leave it out, a run is validated on its validation "
                         "split")
        return found


@dataclass
class Monitoring:
    """Monitoring (an interval of 0 is off; in a short run, defaults are reduced so that each fires 20 times)"""

    eval_interval: int = opt(0, "steps between evaluations (0: each epoch)", ge=0, aliases=("eval_every",))
    eval_max_rows: int = opt(0, "evaluate at most N samples, evenly spread over the validation set (0: all)", ge=0)
    log_interval: int = opt(100, "steps between log lines; the first step has one too", ge=1, may_change=True)
    sanity_check_interval: int = opt(10000, "steps between checks for NaN and Inf in weights, gradients and "
                                     "optimizer; the loss is checked at every step", ge=0, may_change=True)
    gradient_monitor: bool = opt(True, "log the norm of the gradients, by part of the model", may_change=True)
    gradient_monitor_interval: int = opt(100, "steps between these logs; --monitor_interval sets both this and "
                                         "--weight_monitor_interval", ge=0, may_change=True,
                                         aliases=("monitor_interval",))
    weight_monitor: bool = opt(True, "log the size of the updates relative to the weights, by part of the model",
                                may_change=True)
    weight_monitor_interval: int = opt(100, "steps between these logs; --monitor_interval sets both this and "
                                       "--gradient_monitor_interval", ge=0, may_change=True,
                                       aliases=("monitor_interval",))
    weight_monitor_sample_size: int = opt(1024, "entries of each tensor that both monitors sample", ge=1,
                                          may_change=True)
    spike_factor: float = opt(10.0, "report a loss as a spike where it is so many median deviations above the median "
                              "of the steps before it (0: off)", ge=0, may_change=True)
    samples: bool = opt(True, "show examples of the model's output at each evaluation", may_change=True)
    callback: str = opt("", "a callback of your own: FILE.py:CLASS, or FILE.py:CLASS:key=value,other=3 with "
                        "arguments, or the name of one that an installed package provides; for several, give "
                        "--callback several times, or put commas between them", repeats=True, may_change=True)
    use_wandb: bool = opt(False, "also log to Weights & Biases; the logs stay on disk where it cannot be reached",
                          may_change=True)


@dataclass
class EarlyStopping:
    """Early stopping"""

    early_stopping: bool = opt(False, "stop when the validation metric stops improving; the log says at the start "
                               "whether epochs or evaluations are counted")
    early_stop_patience: int = opt(5, "epochs without improvement before stopping (evaluations, in a run shorter than "
                                   "an epoch)", ge=1)
    early_stop_min_delta: float = opt(0.001, "smallest improvement that counts", ge=0)
    early_stop_restore_best: bool = opt(True, "export the best model, not the last, as models/final")
    early_stop_overfit_patience: int = opt(0, "stop when the validation loss is above the training loss and the gap "
                                           "between them has grown for so many epochs (or evaluations, as above) in "
                                           "a row, without a new best evaluation (0: off)", ge=0)
    early_stop_overfit_min_delta: float = opt(0.01, "smallest growth of that gap that counts", ge=0)


@dataclass
class Options(EarlyStopping, Monitoring, Resuming, Recovery, Keeping, Machine, Optimization, Length):
    """What every stage's Config inherits."""


def here() -> str:
    """The working folder; '' where it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def working_in(folder: str) -> AbstractContextManager[None]:
    """A context in which relative paths start from `folder`, if that still exists."""
    return chdir(folder) if folder and Path(folder).is_dir() else nullcontext()


def without_effect(cfg: Options, typed: Collection[str]) -> list[str]:
    """A line for each option that was typed and changes nothing."""
    idle = [] if cfg.early_stopping else sorted(name for name in typed if name.startswith("early_stop_"))
    return [f"--{name} changes nothing without --early_stopping" for name in idle]


def device_problems(name: str) -> list[str]:
    kind, _, number = name.partition(":")
    if kind in ("auto", "cpu", "cuda", "mps") and (not number or (kind == "cuda" and number.isdigit())):
        return []
    return [f"--device: {name!r} is none of auto, cpu, cuda, cuda:N, mps"]


# What the options of one start are in the config of a run.
OF_ONE_START: dict[str, Any] = {"resume": "", "yes": False, "extend_steps": 0}

# Reduced so that what they time fires FIRINGS times a run, unless they were typed. Monitors that read all weights take
# up to a tenth of a small model's step, so they do not fire more often than every MONITORED steps.
INTERVALS = ("log_interval", "snapshot_interval")
MONITORS = ("sanity_check_interval", "gradient_monitor_interval", "weight_monitor_interval")
MONITORED = 5


def run_length(cfg: Options, typed: Collection[str], steps_per_epoch: int) -> int:
    """How many updates the run has. Raises UserError where that is not said."""
    if steps_per_epoch == ENDLESS and cfg.max_steps is None:
        raise UserError("the training data are a stream, which has no epochs: say with --max_steps how long to train")
    if cfg.max_steps is None:
        return cfg.epochs * steps_per_epoch
    return min(cfg.max_steps, cfg.epochs * steps_per_epoch) if "epochs" in typed else cfg.max_steps


def fit_to_length(cfg: T, typed: Collection[str], steps: int, steps_per_epoch: int) -> tuple[T, list[str]]:
    """The config with the run's length, in `max_steps` and `epochs`, and its defaults cut to it; a line about each cut
    and each odd value typed."""
    cuts: dict[str, Any] = {}
    lines: list[str] = []
    longest = max(1, steps // FIRINGS)
    for name in (*INTERVALS, *MONITORS):
        most = max(MONITORED, longest) if name in MONITORS else longest
        if name not in typed and getattr(cfg, name) > most:
            cuts[name] = most
    if "eval_interval" not in typed and steps_per_epoch > longest:
        cuts["eval_interval"] = longest
    if "warmup_steps" not in typed and cfg.warmup_steps > steps // 10:
        cuts["warmup_steps"] = steps // 10
    elif cfg.warmup_steps >= steps:
        lines.append(f"warmup_steps {cfg.warmup_steps} is not shorter than the run's {steps} steps: "
                     "the learning rate never reaches its peak")
    if cuts:
        reduced = ", ".join(f"{name} {value}" for name, value in cuts.items())
        lines.append(f"The run has {steps:,} steps, so these defaults are reduced: {reduced}")
    return replace(cfg, **cuts, max_steps=steps, epochs=math.ceil(steps / steps_per_epoch)), lines


def due(cfg: Options, step: int, steps: int, steps_per_epoch: int, *, evaluation: bool) -> list[Request]:
    """What the intervals ask for after a step (from 1). The first is logged: a sign of life, and where curves start.

    `evaluation`: whether the interval of one ends there."""
    last, epoch_end = step == steps, step % steps_per_epoch == 0
    asked: dict[Request, bool] = {
        "eval": last or evaluation,
        "log": last or step == 1 or step % cfg.log_interval == 0,
        "save": last or epoch_end or (cfg.snapshot_interval > 0 and step % cfg.snapshot_interval == 0),
    }
    return [what for what, is_due in asked.items() if is_due]


def resolve_length(cfg: T, typed: Collection[str], steps_per_epoch: int) -> tuple[T, list[str]]:
    """The config with the run's length and what depends on it; lines about it."""
    return fit_to_length(cfg, typed, run_length(cfg, typed, steps_per_epoch), steps_per_epoch)
