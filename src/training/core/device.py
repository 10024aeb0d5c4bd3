"""The device of a run, its precision, and the settings that make its results repeatable."""

import ctypes
import logging
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from stoker.config import UserError
from stoker.daemon import machine
from stoker.training.core.figures import Batch

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu" and machine.has_nvidia_gpu():
            log.warning("This machine has an NVIDIA GPU that torch %s cannot use, so the CPU computes: %s Update the "
                        "driver, or install another build of torch: docs/operations.md, Setting up",
                        torch.__version__, _why_no_cuda())
    kind, _, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= there:
        raise UserError(f"--device {name}: this machine has {there} such device{'s' * (there != 1)}; "
                        "leave --device out to take what there is")
    return torch.device(name)


def _why_no_cuda() -> str:
    """torch's own words, as far as the first sentence."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # without CUDA; the driver is too old, or does not answer
        return str(error).splitlines()[0].partition(". ")[0].rstrip(".") + "."
    return "torch gives no reason."


def describe(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def configure(threads: int) -> None:
    """Make results repeatable, with a fixed number of threads and deterministic algorithms, and steps fast."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # filling memory that is about to be written takes 7 % of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    keep_memory()


def permit(device: torch.device, nondeterministic: Mapping[str, str]) -> None:
    """Let operators without a deterministic form run on a device for which a stage declares one; torch warns of them.
    Call it after `configure`. Raises UserError where the stage declares it for a kind of device that there is not."""
    if unknown := nondeterministic.keys() - {"cpu", "cuda", "mps"}:
        raise UserError(f"the stage declares what is nondeterministic on {', '.join(sorted(unknown))}: the kinds of "
                        "device are cpu, cuda and mps")
    if device.type in nondeterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        log.info("Determinism: %s; a resumed run is the uninterrupted one to rounding, not bit for bit",
                 to_rounding(device, nondeterministic))


def to_rounding(device: torch.device, nondeterministic: Mapping[str, str]) -> str:
    """Why results on a device are the same to rounding only; '' where they are the same bit for bit."""
    operator = nondeterministic.get(device.type)
    return f"{operator} has no deterministic form on {device.type}" if operator else ""


def keep_memory() -> None:
    """Let glibc keep memory that was freed instead of giving it back: each step on a CPU needs the same again, and to
    have it mapped anew took a tenth to a fifth of it. Other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype=DTYPES[precision]) if precision != "fp32" else nullcontext()


def resolve_precision(device: torch.device, precision: str) -> str:
    """What `auto` means: bf16 on a GPU that computes in it, fp16 on one that does not, fp32 elsewhere. On a CPU that
    multiplies bf16 a run decides by a trial of its model: assembly/decide.py."""
    if precision != "auto" or device.type != "cuda":
        return "fp32" if precision == "auto" else precision
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def multiplies_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device is a CPU with instructions that multiply bf16: AVX-512 or AMX of x86, or those of Arm."""
    try:
        flags = cpuinfo.read_text()
    except OSError:  # not Linux
        return False
    return device.type == "cpu" and bool(
        re.search(r"^(flags|Features)\b.*\b(avx512_bf16|amx_bf16|bf16)\b", flags, re.M))


def loader_workers(device: torch.device, asked: int | None) -> int:
    """Processes that read data: beside a GPU a few; on a CPU none, since they would take the cores that compute."""
    if asked is not None:
        return asked
    return min(4, (os.cpu_count() or 2) // 2) if device.type == "cuda" else 0


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on its device; what is not a tensor stays as it is."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def of(model: torch.nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def wait(device: torch.device) -> None:
    """Until everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def threads() -> int:
    return torch.get_num_threads()
