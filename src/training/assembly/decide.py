"""Decisions before a run, by a trial of its model: the precision, and whether to compile it."""

import logging
import time
from dataclasses import replace
from functools import partial

from stoker.training.assembly import estimate
from stoker.training.assembly.estimate import Estimate, Trial
from stoker.training.assembly.length import Length
from stoker.training.core import blocks, rng
from stoker.training.core.plan import Plan

log = logging.getLogger(__name__)

PAYS = 1.2  # times as fast: bf16 is chosen from this speedup on
WORTH_A_TRIAL = 10.0  # seconds of training
LONG = 600.0  # seconds: in a shorter run compiling is not worth the trial
NOTICEABLE = 1.05  # times as fast: smaller speedups are within the scatter of timings


def expect(plan: Plan, started: float) -> tuple[Plan, Estimate, Length, list[str]]:
    """Decide the precision and whether to compile, and estimate the time and memory of a run. Returns the plan with
    both decisions, the estimate, the length of the run, and lines for the log: what a trial of each showed, if there
    was one, and whether the machine is too busy to trust the measurements.

    `started`: when the program started (`time.time()`)."""
    log.info("Estimating time and memory, on a few batches and a copy of the model")
    length = Length.of(plan)
    plan, of_precision = decide_precision(plan, length)
    found = estimate.measure(plan)
    compiled, found, of_compile = decide_compile(found, plan, found.seconds(length))
    lines = [line for line in (of_precision, of_compile) if line]
    if found.busy:
        lines.append(f"The machine is busy: measurements scatter by a factor of {found.scatter:.1f}; the estimate is "
                     "for an idle machine")
    return plan.with_compile(compiled), replace(found, start_seconds=time.time() - started), length, lines


def decide_precision(plan: Plan, length: Length) -> tuple[Plan, str]:
    """The plan with the precision decided, and a line for the log: bf16 where --precision auto may choose it and a
    trial of the model's own steps shows that it is faster. A run of a few seconds has no trial: it would not pay."""
    if not plan.may_be_bf16:
        return plan, ""
    with rng.preserved(), estimate.room_for_two(plan.device):
        trial, size, seconds = estimate.begin_trial(plan)
        if seconds * length.samples < WORTH_A_TRIAL:
            return plan.with_precision("fp32"), ""
        batches = trial.batches(size)
        works = {kind: partial(trial.step, batches, kind) for kind in ("fp32", "bf16")}
        rounds = estimate.in_turn(works, plan.device, estimate.FEWEST)
    speedup = rounds.ratio("fp32", "bf16")
    precision = "bf16" if speedup >= PAYS else "fp32"
    return plan.with_precision(precision), f"Precision {precision}: bf16 was {speedup:.2f} times as fast in a trial"


def decide_compile(found: Estimate, plan: Plan, seconds: float) -> tuple[bool, Estimate, str]:
    """Whether the run is compiled (as the option says or, by default, where a trial that can be trusted shows that it
    pays), the estimate with that, and a line for the log. `seconds`: how long the run takes uncompiled."""
    asked = plan.cfg.compile
    if asked is False or (asked is None and seconds < LONG):
        return False, found, ""
    if asked is None and found.busy:
        return False, found, ("torch.compile not tried, since a trial on a busy machine shows nothing; --compile uses "
                              "it nevertheless")
    if why := blocks.compiler_problem(plan.device):
        return False, found, f"{why}, so it is not used"
    log.info("Trying torch.compile, which may take minutes")
    try:
        tried = try_compiled(found, plan)
    except RuntimeError as error:  # the compiler's, or not enough memory for two of the model
        return False, found, f"torch.compile not used: a trial failed ({blocks.first_line(error)})"
    gain = 1 - 1 / tried.compiled_speedup  # of the time of a step
    measured = (f"torch.compile tried: a step takes {abs(gain):.0%} {'less' if gain > 0 else 'more'} time here, and "
                f"{tried.compile_seconds:.0f} s to compile")
    pays = tried.compiled_speedup > NOTICEABLE and (
        seconds * gain > 2 * tried.compile_seconds)
    if asked is None and tried.busy:
        return False, replace(found, scatter=tried.scatter), (
            f"{measured}; not used, since these measurements scatter by a factor of {tried.scatter:.1f}: --compile "
            "uses it nevertheless")
    if asked is None and not pays:
        return False, found, f"{measured}; not used"
    return True, replace(tried, sample_seconds=found.sample_seconds / tried.compiled_speedup), f"{measured}; used"


def try_compiled(found: Estimate, plan: Plan) -> Estimate:
    """The estimate with the time that compiling takes and the speed that it gains, from steps of a plain and of a
    compiled model in turn."""
    with rng.preserved():
        plain, compiled = Trial(plan), Trial(plan, compiled=True)
        batches = plain.batches(found.tried_size)
        first = [estimate.timed(partial(trial.step, batches), plan.device).wall for trial in (plain, compiled)][1]
        rounds = estimate.in_turn({"plain": partial(plain.step, batches), "compiled": partial(compiled.step, batches)},
                                  plan.device)
    return replace(found, compile_seconds=max(0.0, first - rounds.seconds("compiled", busy=False)),
                   compiled_speedup=rounds.ratio("plain", "compiled"), scatter=max(found.scatter, rounds.scatter))
