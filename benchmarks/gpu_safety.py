"""The sections of gpu.py on safety: kill and resume, memory, NaN, and the GPU's alerts."""

import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import kill_matrix
import rig
import safetensors.torch
import torch
from gpu_page import FORK, NOT_ON_A_CPU, Asked, Failed
from gpu_speed import clear
from torch import Tensor

from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.monitors import system
from stoker.training.assembly import session
from stoker.training.core import incident
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.ending import Ending
from stoker.training.core.figures import Batch, Loss, Moment
from stoker.training.core.snapshots import Snapshots
from stoker.training.trainer import Trainer

# -- kill and resume ------------------------------------------------------------------------------------------------

KILLED_AT = 23  # the step from which on the training is killed, of kill_matrix.STEPS
TRAININGS = {"lm": "--no_compile", "text": "--no_compile", "lm compiled": "--compile"}
LESS = "--num_workers 0 --no_samples --eval_interval 20".split()  # with --quick


@dataclass
class Training:
    """A run of a stage's real script, in a process that this one's imports are already in."""

    folder: Path
    stage: str
    options: list[str]
    killed: bool = False

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "run")

    def start(self) -> None:
        """Start the training, or resume it."""
        self.folder.mkdir(exist_ok=True)
        words = ["--resume", "run"] if self.run.path.exists() else [
            "--dataset", str(self.folder.parent / "text.txt"), "--result_dir", ".", "--run_name", "run",
            *_without(kill_matrix.OPTIONS, self.options), *kill_matrix.OF_STAGE[self.stage], *self.options]
        self.process = FORK.Process(target=self._train, args=([*words, "--yes"],))
        self.process.start()

    def _train(self, words: list[str]) -> None:
        os.chdir(self.folder)
        os.environ |= {"STOKER_HOME": str(self.folder / "home")}  # also what is compiled: nothing is shared
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        script = str(kill_matrix.SCRIPTS / f"train_{self.stage}.py")
        sys.argv[:] = [script, *words]
        with mock.patch.object(session, "_draw"):  # the page of plots takes longer than the training
            runpy.run_path(script, run_name="__main__")

    def kill_at(self, step: int) -> int:
        """Kill it once it has logged this step, unless it has ended before; the last step that it had logged."""
        while (last := self._last()) < step and self.process.exitcode is None:
            time.sleep(0.02)
        self.process.kill()
        self.process.join()
        self.killed = self.process.exitcode == -signal.SIGKILL
        return last

    def _last(self) -> int:
        return max((row["step"] for row in Journal(self.run.metrics).rows()), default=0)


def _without(options: list[str], typed: list[str]) -> Iterator[str]:
    """The options but for those that are typed too."""
    for option in " ".join(options).split("--")[1:]:
        name, *value = option.split()
        if f"--{name}" not in typed:
            yield from (f"--{name}", *value)


def resuming(asked: Asked) -> Iterator[str]:
    """Each training is run undisturbed, and beside that once more, killed and resumed; then the bits are compared."""
    wanted = {name: how for name, how in TRAININGS.items() if not asked.quick or name == "lm"}
    machine, less = ["--device", asked.device_name, "--threads", "1"], LESS if asked.quick else []
    pairs: dict[str, list[Training]] = {}
    for name, how in wanted.items():
        folder = asked.folder / f"resume {name}"
        folder.mkdir()
        kill_matrix.write_text(folder / "text.txt")
        pairs[name] = [Training(folder / side, name.split()[0], [*machine, how, *less]) for side in ("alone", "killed")]
        for training in pairs[name]:
            training.start()
    steps, wrong = dict[str, int](), list[str]()
    for name, (_, killed) in pairs.items():
        steps[name] = killed.kill_at(KILLED_AT)
        killed.start()
    for name, (alone, killed) in pairs.items():
        found = _compared(alone, killed)
        yield (f"{name:12s} {kill_matrix.STEPS} steps on {killed.run.status().device}, killed (SIGKILL) when it had "
               f"logged step {steps[name]}, resumed: " + (found[0] if found else
                                                          "the same bits in all that kill_matrix.py compares"))
        wrong += [name] if found else []
    if wrong:
        raise Failed(f"not as left alone: {', '.join(wrong)}")


def _compared(alone: Training, killed: Training) -> list[str]:
    """What differs, once both have ended."""
    if not killed.killed:
        return ["it had ended before it could be killed"]
    for side, training in (("alone", alone), ("resumed", killed)):
        training.process.join()
        if not kill_matrix.finished(training.folder):
            return [f"the training {side} ended with {training.process.exitcode}"]
    if "Resuming from" not in killed.run.latest_log.read_text():
        return ["it started from step 0 instead of resuming"]
    left_alone, resumed = (kill_matrix.outcome(training.run.path) for training in (alone, killed))
    found = list(kill_matrix.differences(left_alone, resumed, ""))
    return [f"{len(found)} DIFFERENCES: {'; '.join(found[:3])}"] if found else []


# -- memory ---------------------------------------------------------------------------------------------------------

TOLERANCE = 2e-2  # of the gradient's norm: the same sums in another order, in bf16
ROOM = 100 * 2**20  # bytes, of a CPU's memory


def memory(asked: Asked) -> Iterator[str]:
    """A step that does not fit is done again in smaller micro-batches, and has the same gradients, to rounding."""
    options = asked.options() | {"num_workers": 0}
    if asked.on_gpu:
        options |= {"batch_size": 32}  # so that activations take more than what cannot be made smaller
        whole, _, room = _first_step(asked, options)
        parts, micro, _ = _first_step(asked, options, room)
    else:  # first the small one: malloc keeps what the large one has freed
        options |= {"batch_size": 64, "max_seq_len": 512}
        parts, micro, _ = _first_step(asked, options, ROOM)
        whole, _, _ = _first_step(asked, options)
    if not 0 < micro < options["batch_size"]:
        raise Failed(f"the memory was limited, but the micro-batches are of {micro or options['batch_size']} samples")
    apart = float((parts - whole).norm() / whole.norm())
    yield (f"with less memory than a step takes, micro-batches of {options['batch_size']} became such of {micro}; "
           f"their gradient differs from that of the whole batch by {apart:.1e} of its norm (at most {TOLERANCE:.0e})")
    if not apart <= TOLERANCE:
        raise Failed("the gradients are not those of the whole batch")


def _first_step(asked: Asked, options: dict[str, Any], room: float = 0) -> tuple[Tensor, int, float]:
    """The gradient of the first step, the size of its micro-batches where that was reduced (else 0), and three quarters
    of the bytes that the step took on a GPU. `room`: the bytes that the step may take; 0: no limit."""
    clear(asked)
    with rig.trainer(asked.presets[-1], asked.kind(rig.Random), **options) as trainer:
        rig.open_up(trainer, monitors=False)
        before = torch.cuda.memory_allocated(asked.device) if asked.on_gpu else 0
        with _limited(asked, room):
            trainer._train_step()
        took = torch.cuda.max_memory_allocated(asked.device) - before if asked.on_gpu else 0
        grads = [weight.grad.cpu().flatten() for weight in trainer.model.parameters() if weight.grad is not None]
        return torch.cat(grads), trainer.order.micro, 0.75 * took


@contextmanager
def _limited(asked: Asked, room: float) -> Iterator[None]:
    """Within it, the process gets no more than `room` bytes in addition to what it has; with 0, all there are."""
    if room and asked.on_gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(asked.device).total_memory
        share = (torch.cuda.memory_allocated(asked.device) + room) / total
        torch.cuda.set_per_process_memory_fraction(share, asked.device)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if room and not asked.on_gpu:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + int(room), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if room and asked.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, asked.device)


# -- NaN ------------------------------------------------------------------------------------------------------------

ROW, MARK = 5, 7  # the poisoned row, all of whose tokens are the same


class Poisoned(rig.Random):
    """One row of the training set makes the loss NaN."""

    vocabulary = 512

    def dataset(self, split: str) -> Any:
        rows = list(super().dataset(split))
        return [torch.full_like(row, MARK) if split == "train" and number == ROW else row
                for number, row in enumerate(rows)]

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss = super().loss(model, batch, moment)
        bad = (batch["tokens"] == MARK).all(1).any()
        return Loss({"loss": loss.terms["loss"] * torch.where(bad, torch.nan, 1.0)})


@dataclass
class Hit(Callback):
    """Sets a weight to NaN on the device before step `at` + 1, once."""

    order = ACT
    at: int = 5
    done: bool = field(default=False)

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == self.at and not self.done:
            self.done = True
            next(trainer.model.parameters()).data[0, 0] = torch.nan


class Damaged(rig.Random):
    """A stage of which `hit` turns a weight into NaN."""

    vocabulary = 512
    hit = Hit(done=True)

    def callbacks(self) -> list[Callback]:
        return [self.hit]


class Unexported(rig.Unestimated):
    """A session that trains, and exports nothing."""

    def _export(self, trainer: Trainer, ending: Ending) -> Ending:
        return ending


STEPS = 12


def not_a_number(asked: Asked) -> Iterator[str]:
    """NaN from a row, and in a weight: the run goes back to a snapshot by itself, and ends with the same bits as a run
    without NaN."""
    options = asked.options() | {"batch_size": 8, "max_steps": STEPS, "log_interval": 3, "snapshot_interval": 3,
                                 "eval_interval": STEPS, "sanity_check_interval": STEPS, "samples": False,
                                 "gradient_monitor": False, "weight_monitor": False, "num_workers": 0,
                                 "keep_last_n_snapshots": 0}
    with rig.session("nano", Poisoned, Unexported, **options) as tried:
        bits = _trained(tried)
        folders = [path for path in tried.run.incidents.iterdir() if path.is_dir()]
        kept = [incident.read(path) for path in folders]
        if [each.left_out for each in kept] != [[ROW]]:
            raise Failed(f"left out were {[each.left_out for each in kept]}, not row {ROW} alone")
        with rig.session("nano", Poisoned, Unexported, **options, skip_rows=str(folders[0])) as warned:
            same = not list(kill_matrix.differences(_trained(warned), bits, ""))
        yield (f"row {ROW} makes the loss NaN: step {kept[0].step} failed (first in {kept[0].where}), the run went "
               f"back {len(tried.failures)} time, skipped the row and did all {STEPS} steps: "
               f"{'the same' if same else 'DIFFERENT'} bits as without the row from the start")
    ends = []
    for hit in (Hit(done=True), Hit()):
        Damaged.hit = hit
        with rig.session("nano", Damaged, Unexported, **options) as tried:
            ends.append(_trained(tried))
    healed = not list(kill_matrix.differences(ends[0], ends[1], ""))
    yield (f"a weight becomes NaN at step {Hit.at + 1}: the run went back {len(tried.failures)} time, left out no row "
           f"and did all {STEPS} steps: {'the same' if healed else 'DIFFERENT'} bits as undisturbed")
    if not (same and healed and tried.failures):
        raise Failed("the run did not recover")


def _trained(tried: rig.Unestimated) -> dict[str, Any]:
    """What stands in the last snapshot, but for the monitors' states."""
    ending = tried.train()
    if ending.state != "finished":
        raise Failed(f"the run {ending.state}: {ending.reason}")
    last = Snapshots(tried.run.snapshots, {}).found()[-1]
    state = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
    return {"weights": safetensors.torch.load_file(last / "model.safetensors"),
            "optimizers": state["optimizers"], "rng": state["rng"], "step": state["step"]}


# -- the GPU's alerts -----------------------------------------------------------------------------------------------

INJECTED = [*[(70.0, 60.0)] * 5, (95.0, 86.0)]  # percent and degrees at each log line
EXPECTED = ["gpu idle", "gpu hot"]


def alerts(asked: Asked) -> Iterator[str]:
    """The alerts fire on readings that are injected where NVML is asked; then the real readings."""
    if not asked.on_gpu:
        yield NOT_ON_A_CPU
        return
    with rig.trainer(asked.presets[-1], rig.Random, **asked.options()) as trainer:
        rig.open_up(trainer)
        yield from fired(trainer, INJECTED)
        for _ in range(20):
            trainer._train_step()
        trainer._log({})
        names = ("gpu_percent", "gpu_celsius", "gpu_allocated_mb", "gpu_peak_mb")
        yield "really, while it trains: " + ", ".join(
            f"{name} {trainer.timings[f'system/{name}']:.0f}" for name in names if f"system/{name}" in trainer.timings)
        if "system/gpu_percent" not in trainer.timings:
            raise Failed("the GPU's use and temperature cannot be measured here")


def fired(trainer: Trainer, readings: Sequence[tuple[float, float]]) -> Iterator[str]:
    """The alerts that the trainer's own monitors report at log lines with these readings."""
    for percent, celsius in readings:
        reading = {"system/gpu_percent": percent, "system/gpu_celsius": celsius}
        with mock.patch.object(system, "gpu_figures", lambda device, reading=reading: reading):
            trainer.step += 1
            trainer._log({})
    monitor = next(callback for callback in trainer.callbacks if isinstance(callback, system.System))
    rows = [row for row in Journal(monitor.alerts).rows() if row["kind"].startswith("gpu")]
    yield from (f"injected: alert `{row['kind']}`: {row['message']}" for row in rows)
    if [row["kind"] for row in rows] != EXPECTED:
        raise Failed(f"alerts {[row['kind'] for row in rows]}, expected {EXPECTED}")
