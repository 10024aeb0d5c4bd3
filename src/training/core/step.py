"""One step of training: each phase that runs at it makes one update from all micro-batches."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stoker.config import ENDLESS
from stoker.training.core import device as devices
from stoker.training.core import optim, phases, rng
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.options import Options
from stoker.training.core.phases import Phase
from stoker.training.core.stage import Stage
from stoker.training.core.sums import Statistics, Tree

log = logging.getLogger(__name__)


class Step:
    """Makes the updates of a step, and holds what they need: optimizers and loss scales, by phase.

    `emit` calls the callbacks' `on_loss` and `on_grad`, `record` adds to a figure's mean over the log interval.
    """

    def __init__(self, stage: Stage, model: nn.Module, cfg: Options, steps: int, device: torch.device,
                 emit: Callable[..., None], record: Callable[[str, Any], None]):
        self.stage, self.model, self.cfg, self.steps, self.device = stage, model, cfg, steps, device
        self.emit, self.record = emit, record
        self.phases = stage.phases()
        phases.check(self.phases, model)
        self.statistics = Statistics(model)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizers = {phase.name: optim.build(phase, model, cfg, stage.blocks(model)) for phase in self.phases}
        self.loss_scales = {phase.name: optim.LossScale(device) for phase in self.phases if cfg.precision == "fp16"}
        self.dropped = torch.zeros((), device=device)  # 1 where an update of the last step was not finite, not applied
        self.grad_norms: dict[str, Tensor] = {}  # phase -> norm of each tensor's gradient, before clipping
        self.updated = False  # whether a phase of the step in hand has changed weights
        self.lr = cfg.lr
        self._skipped = ""

    def run(self, step: int, batches: Sequence[Batch]) -> None:
        """Step number `step`, counted from 0. Raises what a forward or backward pass raises."""
        self.updated, self.dropped, self.grad_norms = False, torch.zeros((), device=self.device), {}
        running = [phase for phase in self.phases if phase.runs(step)]
        for phase in running:
            self._set_rate(phase, step)
        if not batches:
            return
        self.statistics.begin()
        passed: list[Any] = [None] * len(batches)
        for phase in running:
            passed = self._update(phase, step, batches, passed)
        self.statistics.apply(self.dropped)

    def skip(self, why: str) -> None:
        """Drop the gradients of the phase being updated (from `on_loss` or `on_grad`)."""
        self._skipped = why

    def _set_rate(self, phase: Phase, step: int) -> None:
        lr = self.cfg.lr * optim.rate(phase.updates(step), phase.updates(self.steps),
                                      **phase.schedule(self.cfg, self.steps))
        optim.set_rate(self.optimizers[phase.name], lr)
        if phase is [each for each in self.phases if each.spans(step)][-1]:
            self.lr = lr

    def _update(self, phase: Phase, step: int, batches: Sequence[Batch], passed: list[Any]) -> list[Any]:
        """One optimizer update from all micro-batches. Returns what the next phase is given for each of them."""
        name, self._skipped = phase.name, ""
        optimizer, scale = self.optimizers[name], self.loss_scales.get(name)
        parameters = optim.parameters(optimizer)
        counts = [self.stage.counts(batch, name) for batch in batches]
        divide = Division(counts, self.stage.weights(Moment(name, step, self.steps)), scale)
        gradients = GradientSum(parameters)
        self.statistics.begin_phase()
        self._train_only(parameters)
        total, left = torch.zeros((), device=self.device), []
        for i, batch in enumerate(batches):
            rng.begin(self.cfg.seed, step, name, i)
            moment = Moment(name, step, self.steps, passed[i])
            with devices.autocast(self.device, self.cfg.precision):
                loss = self.stage.loss(self.model, batch, moment)
            self.statistics.add()
            self.emit("on_loss", name, divide.own(loss, i))
            value = divide.loss(loss)
            (value * divide.factor).backward()
            self.statistics.clear()
            gradients.add(i)
            total = total + value.detach()
            self._record(name, loss, counts[i], divide)
            left.append(_detached(loss.passed))
        gradients.finish()
        self.statistics.finish_phase()
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divide.divisor)
        self._train_only(self.trainable)
        if divide.several:
            self.record("train/" + self._named("loss", name), Ratio(total, 1))
        self.emit("on_grad", name)
        if self._skipped:
            log.warning("step %d: %s update skipped: %s", step + 1, name, self._skipped)
        else:
            self._apply(phase, optimizer, parameters, total)
        return left

    def _record(self, phase: str, loss: Loss, counts: dict[str, Any], divide: "Division") -> None:
        figures = {("loss" if not divide.several else term): Ratio(total, counts[term])
                   for term, total in loss.terms.items() if not (divide.several and term == "loss")}  # else added to it
        for name, ratio in {**figures, **loss.figures}.items():
            self.record("train/" + self._named(name, phase), ratio)

    def _train_only(self, parameters: Sequence[nn.Parameter]) -> None:
        """What a phase does not train gets no gradient in it."""
        if len(self.phases) > 1:
            wanted = {id(parameter) for parameter in parameters}
            for parameter in self.trainable:
                parameter.requires_grad_(id(parameter) in wanted)

    def _apply(self, phase: Phase, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter],
               loss: Tensor) -> None:
        """Clip and update. What is not finite is dropped on the device, so the host need not wait."""
        name, largest = phase.name, self.cfg.gradient_clip if phase.clip is None else phase.clip
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(parameters, largest or math.inf, norm)
        dropped = unhealthy = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        if scale := self.loss_scales.get(name):  # an overflow is the scale's business while there is room to halve it
            unhealthy = dropped * ((scale.value <= 1) | ~torch.isfinite(loss))
            self.record(self._named("health/loss_scale", name), scale.value)
            self.record(self._named("health/overflow_share", name), dropped - unhealthy)
            scale.update(dropped)
        self.dropped, self.grad_norms[name] = torch.maximum(self.dropped, unhealthy), norms
        self.record(self._named("grad_norm", name), norm)
        self.updated = True
        optim.update(optimizer, dropped)

    def _named(self, figure: str, phase: str) -> str:
        return figure if len(self.phases) == 1 else f"{phase}/{figure}"


class Division:
    """Turns the sums of the terms into the loss of the step.

    One term of weight 1: its sum goes through the backward pass as it is, and the gradients are divided by its count
    once. Otherwise each term is multiplied by its weight over its count in the whole step, before the backward pass.
    """

    def __init__(self, counts: Sequence[dict[str, Any]], weights: dict[str, float], scale: "optim.LossScale | None"):
        self.counts, self.weights = counts, weights
        self.all = {term: _at_least_one(sum(each.get(term, 0) for each in counts))
                    for term in dict.fromkeys(term for each in counts for term in each)}
        self.several = len(self.all) > 1 or any(weights.get(term, 1.0) != 1.0 for term in self.all)
        only = next(iter(self.all))
        self.factor: Any = 1.0  # of the loss in the backward pass; with fp16 the loss scale
        if scale:
            self.factor = scale.value if self.several else scale.value / _at_least_one(counts[0].get(only, 0))
        self.divisor = self.factor * (1 if self.several else self.all[only])  # of the gradients after it

    def loss(self, loss: Loss) -> Tensor:
        """What goes through the backward pass, but for the factor."""
        if not self.several:
            return next(iter(loss.terms.values()))
        parts = [total * (self.weights.get(term, 1.0) / self.all[term]) for term, total in loss.terms.items()]
        return torch.stack(parts).sum()

    def own(self, loss: Loss, number: int) -> Ratio:
        """The loss of one micro-batch by itself."""
        counts = self.counts[number]
        if not self.several:
            (term, total), = loss.terms.items()
            return Ratio(total, counts[term])
        return Ratio(sum(total.detach() * (self.weights.get(term, 1.0) / _at_least_one(counts[term]))
                         for term, total in loss.terms.items()), 1)


def losses(stage: Stage, model: nn.Module, batch: Batch, device: torch.device, precision: str,
           steps: Sequence[range] = (range(ENDLESS),), number: int | None = None) -> Iterator[Ratio]:
    """The loss of each phase that runs in these steps, on one batch by itself, its graph still there. With the `number`
    of a micro-batch of the first of the steps, it draws the random numbers that the step draws."""
    passed = None
    for phase in stage.phases():
        if not any(phase.updates(some.stop) > phase.updates(some.start) for some in steps):
            continue
        if number is not None:
            rng.begin(stage.cfg.seed, steps[0].start, phase.name, number)
        moment = Moment(phase.name, passed=passed)
        with devices.autocast(device, precision):
            loss = stage.loss(model, batch, moment)
        division = Division([stage.counts(batch, phase.name)], stage.weights(moment), None)
        passed = _detached(loss.passed)
        yield Ratio(division.loss(loss), 1 if division.several else division.divisor)


def _at_least_one(count: Any) -> Any:
    """A term may find nothing in a micro-batch, or in a step: its sum is 0 then."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)


class GradientSum:
    """Sums the gradients of a step's micro-batches along a tree. Two are added by autograd itself; more take one more
    set of gradients for each level."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters, self.pairs = parameters, Tree(_plus)
        self._take()

    def add(self, number: int) -> None:
        """The backward pass of micro-batch `number` (from 0) is done: its gradients are in `grad`."""
        if number % 2:  # an even one's neighbour, if there is one, is added to it in place
            self.pairs.add(self._take())

    def finish(self) -> None:
        """Put the sum of all into `grad`."""
        for parameter, grad in zip(self.parameters, self.pairs.total(self._take())):
            parameter.grad = grad

    def _take(self) -> list[Tensor | None]:
        grads = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return grads


def _plus(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    """The sum, in place of the left one where there is one."""
    both = [(a, b) for a, b in zip(left, right) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right)]


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(each) for key, each in value.items()}
    return type(value)(map(_detached, value)) if isinstance(value, (list, tuple)) else value
