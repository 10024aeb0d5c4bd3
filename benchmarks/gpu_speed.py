"""The sections of gpu.py on speed: the machine, training in tokens a second, the monitors' cost, a snapshot's stall."""

import gc
import itertools
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import monitoring
import plain_gpt
import rig
import snapshot
import torch
from gpu_page import NOT_ON_A_CPU, Asked, Failed
from torch import nn

from stoker.daemon import machine
from stoker.training.assembly import estimate
from stoker.training.core import blocks
from stoker.training.core import device as devices
from stoker.training.trainer import Trainer

# TFLOP/s of dense products in bf16 with sums in fp32, by the name that torch gives the GPU, without its maker's. These
# are the figures of the makers' data sheets; of the GeForce cards, those of the white papers on their architectures.
DATA_SHEET = {
    r"A100(-SXM4|-PCIE)?(-| )\d+GB( PCIe)?": 312.0, r"H100 80GB HBM3": 989.4, r"H100 PCIe": 756.0, r"H100 NVL": 835.0,
    r"H200": 989.4, r"H200 NVL": 835.0, r"L4": 121.0, r"L40S": 362.0, r"A10": 125.0,
    r"T4": 65.0,  # in fp16: it has no bf16
    r"GeForce RTX 3090": 71.0, r"GeForce RTX 4090": 165.2,
}
AIM = 0.50  # model-FLOP utilisation of medium
WARM, STEPS = 3, 10  # steps before the measurement, and in each of its rounds
ALIKE = 0.02  # how far the first steps' loss and gradient norm may lie from those of eager mode


def data_sheet_flops(name: str) -> float | None:
    """Floating-point operations a second; None where the GPU is not known, or is a part of one (MIG)."""
    short = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    return next((1e12 * figure for pattern, figure in DATA_SHEET.items() if re.fullmatch(pattern, short)), None)


def model_flops(model: nn.Module, cfg: Any) -> float:
    """Floating-point operations of a token, forward and backward: 6 for each weight that is multiplied with it and
    12 x layers x width of all heads x length for attention, the causal mask not counted off (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B)."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    looked_up = {"position_embedding.weight", *(["token_embedding.weight"] if "head" in weights else [])}
    heads = cfg.num_heads * (getattr(cfg, "head_dim", 0) or cfg.d_model // cfg.num_heads)
    multiplied = sum(weight.numel() for name, weight in weights.items() if name not in looked_up)
    return float(6 * multiplied + 12 * cfg.num_layers * heads * cfg.max_seq_len)


# -- the machine ----------------------------------------------------------------------------------------------------


def the_machine(asked: Asked) -> Iterator[str]:
    """What is measured here, and the FLOP/s that the shares below are of."""
    device, precision = asked.device, devices.resolve_precision(asked.device, "auto")
    yield f"- {devices.describe(device)}, beside it {machine.processor()}; precision {precision}"
    yield f"- torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if not asked.on_gpu:
        yield "- models are tiny, and times a few milliseconds: this page shows only that the script works"
    if asked.on_gpu:
        found = torch.cuda.get_device_properties(device)
        yield (f"- {found.total_memory / 2**30:.1f} GiB, {found.multi_processor_count} multiprocessors, compute "
               f"capability {found.major}.{found.minor}")
    peak = estimate.peak_flops(device, precision)
    asked.note("peak", peak)
    yield f"- bare {precision} matrix products: {peak / 1e12:.3g} TFLOP/s, the peak measured"
    sheet = data_sheet_flops(torch.cuda.get_device_name(device)) if asked.on_gpu else None
    if sheet:
        asked.note("sheet", sheet)
        yield f"- the data sheet's dense products: {sheet / 1e12:.4g} TFLOP/s"
    else:
        yield f"- the data sheet's figure: {'not known for this GPU' if asked.on_gpu else NOT_ON_A_CPU}"


# -- training speed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """`first` are figures of the first steps, which must not depend on how the model is run."""

    tokens: float  # a second
    step: float  # seconds
    flops: float  # a second
    memory: float  # bytes at the peak, of a GPU
    first: dict[str, float]

    def row(self, asked: Asked, preset: str, how: str) -> str:
        shares = [f"{self.flops / whole:.1%}" if (whole := asked.noted(name)) else "-" for name in ("peak", "sheet")]
        plain = asked.noted(f"plain {preset}")
        return _row(preset, how, f"{self.tokens:,.0f}", f"{1000 * self.step:.2f}", f"{self.flops / 1e12:.3g}", *shares,
                    f"{self.tokens / plain:.2f}" if plain else "-",
                    f"{self.memory / 2**30:.1f}" if self.memory else "-")


COLUMNS = ("preset", "how", "tokens/s", "ms a step", "TFLOP/s", "of peak", "of sheet", "x plain", "GiB")
WIDTHS = (8, 24, 11, 9, 8, 7, 8, 7, 6)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.rjust(width) if i > 1 else cell.ljust(width)
                             for i, (cell, width) in enumerate(zip(cells, WIDTHS))) + " |"


def _head() -> Iterator[str]:
    yield ("of peak, of sheet: the model's FLOP/s by the peak measured and by the data sheet's; x plain: tokens/s by "
           "those of the plain loop, compiled.\n")
    yield _row(*COLUMNS)
    yield "|" + "|".join("-" * (width + 1) + (":" if i > 1 else "-") for i, width in enumerate(WIDTHS)) + "|"


def _timed(step: Callable[[], Any], asked: Asked) -> float:
    """Seconds of a step, the median of some rounds."""
    steps = STEPS if asked.on_gpu else 1

    def several() -> None:
        for _ in range(steps):
            step()

    return estimate.in_turn({"steps": several}, asked.device).seconds("steps", busy=False) / steps


def clear(asked: Asked) -> None:
    """Before the next model is measured."""
    torch.compiler.reset()
    gc.collect()
    if asked.on_gpu:
        torch.cuda.init()  # without it there are no statistics to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(asked.device)


def _memory(asked: Asked) -> float:
    return float(torch.cuda.max_memory_allocated(asked.device)) if asked.on_gpu else 0.0


def _with_cuda_graphs(modules: list[nn.Module]) -> None:
    for module in modules:
        module.compile(mode="reduce-overhead", dynamic=False)


WAYS: dict[str, Callable[[list[nn.Module]], None]] = {
    "eager": lambda modules: None, "compiled": blocks.compile_blocks, "compiled, CUDA graphs": _with_cuda_graphs}


def ours(asked: Asked, stage: type[Any], preset: str, way: str) -> Speed:
    """The trainer's own steps, without monitors; its blocks are run in one of the WAYS."""
    clear(asked)
    with rig.trainer(preset, asked.kind(stage), **asked.options()) as trainer:
        rig.open_up(trainer, monitors=False)
        WAYS[way](trainer.stage.blocks(trainer.model))
        cfg: Any = trainer.cfg

        def step() -> None:
            if way.endswith("CUDA graphs"):
                torch.compiler.cudagraph_mark_step_begin()
            trainer._train_step()

        for _ in range(WARM):
            step()
        figures = trainer._totals.means()
        seconds = _timed(step, asked)
        if trainer.order.micro:
            raise Failed(f"a batch of {cfg.batch_size} did not fit: micro-batches of {trainer.order.micro}")
        tokens = cfg.batch_size * cfg.max_seq_len / seconds
        return Speed(tokens, seconds, tokens * model_flops(trainer.model, cfg), _memory(asked),
                     {name: figures[name] for name in ("train/loss", "grad_norm")})


def plain(asked: Asked) -> Iterator[str]:
    """The plain loop, at the language model's sizes. It has a process of its own, so that nothing of the trainer's
    settings is in it."""
    yield from _head()
    for preset in asked.presets:
        stage = asked.kind(rig.Random)
        cfg = stage.Config(**dict(stage.presets[preset]) | asked.options())
        cfg.precision = devices.resolve_precision(asked.device, "auto")
        for compiled in (False, True):
            if compiled and asked.quick:
                yield _row(preset, "compiled whole", "not measured with --quick")
                continue
            clear(asked)
            with plain_gpt.step(cfg, stage.vocabulary, asked.device, compiled=compiled) as step:
                for _ in range(WARM):
                    step()
                seconds = _timed(step, asked)
            tokens = cfg.batch_size * cfg.max_seq_len / seconds
            if compiled or asked.quick:
                asked.note(f"plain {preset}", tokens)
            yield Speed(tokens, seconds, tokens * _flops_of(stage, cfg), _memory(asked), {}).row(
                asked, preset, "compiled whole" if compiled else "eager")


def _flops_of(stage: type[Any], cfg: Any) -> float:
    made = stage(cfg, None)
    made.prepare()
    with torch.device("meta"):
        return model_flops(made.model(), cfg)


def training(stage: type[Any], asked: Asked) -> Iterator[str]:
    """Every preset in each of the WAYS; CUDA graphs come last, since what goes wrong with them may leave the GPU
    unusable for this process."""
    yield from _head()
    wrong, eager, best = list[str](), dict[str, Speed](), dict[str, Speed]()
    for way, preset in itertools.product(WAYS, asked.presets):
        if missing := _not_measured(asked, way):
            yield _row(preset, way, missing)
            continue
        try:
            speed = ours(asked, stage, preset, way)
        except (RuntimeError, AssertionError) as error:  # the product has no CUDA graphs: that they fail is a result
            if not way.endswith("CUDA graphs"):
                raise
            yield _row(preset, way, f"cannot be used: {blocks.first_line(error)}")
            continue
        yield speed.row(asked, preset, way)
        if differs := _differs(speed, eager.setdefault(preset, speed)):
            yield f"  {way}: {differs}"
            wrong += [] if way.endswith("CUDA graphs") else [f"{preset} {way}: {differs}"]
        elif preset not in best or speed.tokens > best[preset].tokens:
            best[preset] = speed
    yield from _aim(asked, best)
    if wrong:
        raise Failed("; ".join(wrong))


def _not_measured(asked: Asked, way: str) -> str:
    if way.endswith("CUDA graphs") and not asked.on_gpu:
        return NOT_ON_A_CPU
    return "not measured with --quick" if way != "eager" and asked.quick else ""


def _differs(speed: Speed, eager: Speed) -> str:
    """Which figures of the first steps are not those of eager mode."""
    return ", ".join(f"{name} {value:.5g} instead of {eager.first[name]:.5g}" for name, value in speed.first.items()
                     if not abs(value - eager.first[name]) <= ALIKE * abs(eager.first[name]))


def _aim(asked: Asked, best: dict[str, Speed]) -> Iterator[str]:
    """Model-FLOP utilisation is of the data sheet's figure where that is known."""
    peak, sheet = asked.noted("peak"), asked.noted("sheet")
    if "medium" in best and (whole := sheet or peak):
        yield (f"\nmedium: {best['medium'].flops / whole:.1%} model-FLOP utilisation of the "
               f"{'data sheet' if sheet else 'peak measured'} (aim {AIM:.0%})")


# -- monitors and snapshots -----------------------------------------------------------------------------------------


def monitors(asked: Asked) -> Iterator[str]:
    """The time that callbacks take: in their own methods, on the host; and in all, from steps with and without them."""
    steps = monitoring.STEPS if asked.on_gpu else 5
    options = asked.options() | {"precision": "auto"}
    preset, stage = asked.presets[-1], asked.kind(rig.Random)
    yield from monitoring.lines(monitoring.measure(preset, stage, steps=steps, **options))
    every: dict[str, Any] = {"log_interval": steps, "sanity_check_interval": 10_000}
    with rig.trainer(preset, stage, **options, **every) as watched, rig.trainer(preset, stage, **options) as bare:
        rig.open_up(watched)
        rig.open_up(bare, monitors=False)
        works: dict[str, Callable[[], Any]] = {
            "with": partial(_steps, watched, steps, log=True), "without": partial(_steps, bare, steps, log=False)}
        for work in works.values():
            work()
        rounds = estimate.in_turn(works, asked.device)
        watched._emit("close")
    ratios = sorted(a.computing / b.computing for a, b in zip(rounds.took["with"], rounds.took["without"]))
    yield (f"\n{steps} steps and a log line, with all callbacks against none: {statistics.median(ratios) - 1:+.2%} (of "
           f"{len(ratios)} rounds from {ratios[0] - 1:+.2%} to {ratios[-1] - 1:+.2%}; aim below "
           f"{monitoring.PROMISED:.0%})")
    if watched.events.switched_off:
        raise Failed(f"switched off: {watched.events.switched_off}")


def _steps(trainer: Trainer, count: int, *, log: bool) -> None:
    for _ in range(count):
        trainer._train_step()
    if log:
        trainer._log({})


def snapshots(asked: Asked) -> Iterator[str]:
    """How long a snapshot keeps training waiting."""
    for preset in reversed(asked.presets):
        yield snapshot.measure(preset, asked.kind(rig.Random), **asked.options())
