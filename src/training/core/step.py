"""One step of training: each phase that is due makes one update from all micro-batches of the step."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stoker.config import ENDLESS
from stoker.training.core import contract, optim, phases, rng
from stoker.training.core import device as devices
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.options import Options
from stoker.training.core.phases import Phase
from stoker.training.core.stage import Stage
from stoker.training.core.sums import Statistics, Tree

log = logging.getLogger(__name__)


class Step:
    """Makes the updates of a step, and holds the optimizer and the loss scale of each phase.

    `emit` calls the callbacks' `on_loss` and `on_grad`; `record(name, value, part)` adds a value to the mean of a
    figure over the log interval, or of a part of it.
    """

    def __init__(self, stage: Stage, model: nn.Module, cfg: Options, steps: int, device: torch.device,
                 emit: Callable[..., None], record: Callable[..., None]):
        self.stage, self.model, self.cfg, self.steps, self.device = stage, model, cfg, steps, device
        self.emit, self.record = emit, record
        self.phases = stage.phases()
        phases.check(self.phases, model)
        self.statistics = Statistics(model)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizers = {phase.name: optim.build(phase, model, cfg, stage.blocks(model)) for phase in self.phases}
        self.loss_scales = {phase.name: optim.LossScale(device) for phase in self.phases if cfg.precision == "fp16"}
        self.dropped = torch.zeros((), device=device)  # 1 where the last step dropped an update that was not finite
        self.grad_norms: dict[str, Tensor] = {}  # phase -> norm of each tensor's gradient, before clipping
        self.updated = False  # whether a phase of the current step has changed weights
        self.lr = cfg.lr
        self._skipped = ""
        self._checked: set[str] = set()  # phases that have made a step: what the stage returns for them was checked

    def run(self, step: int, batches: Sequence[Batch]) -> None:
        """Do step number `step`, counted from 0. Raises what a forward or backward pass raises."""
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
        """Make no update in the current phase; for callbacks, in `on_loss` or `on_grad`. `why` is logged."""
        self._skipped = why

    def _set_rate(self, phase: Phase, step: int) -> None:
        lr = self.cfg.lr * optim.rate(phase.updates(step), phase.updates(self.steps),
                                      **phase.schedule(self.cfg, self.steps))
        optim.set_rate(self.optimizers[phase.name], lr)
        if phase is [each for each in self.phases if each.spans(step)][-1]:
            self.lr = lr

    def _update(self, phase: Phase, step: int, batches: Sequence[Batch], passed: list[Any]) -> list[Any]:
        """Make one optimizer update from all micro-batches. Returns `Loss.passed` of each, for the next phase."""
        name, self._skipped = phase.name, ""
        optimizer, scale = self.optimizers[name], self.loss_scales.get(name)
        parameters = optim.parameters(optimizer)
        counts = [self.stage.counts(batch, name) for batch in batches]
        if name not in self._checked:
            contract.check_counts(self.stage, name, counts)
        division = Division(counts, self.stage.weights(Moment(name, step, self.steps)), scale)
        if division.is_empty:
            self.skip("counts() is 0 for every term of the loss")
        gradients = GradientSum(parameters)
        self.statistics.begin_phase()
        self._train_only(parameters)
        total, to_pass = torch.zeros((), device=self.device), []
        for i, batch in enumerate(batches):
            rng.begin(self.cfg.seed, step, name, i)
            loss = self._loss(batch, Moment(name, step, self.steps, passed[i]), counts[i])
            self.statistics.add()
            self.emit("on_loss", name, division.micro_batch_loss(loss, i))
            value = division.loss(loss)
            (value * division.factor).backward()
            self.statistics.clear()
            gradients.add(i)
            total = total + value.detach()
            self._record(name, loss, counts[i], division)
            to_pass.append(_detached(loss.passed))
        gradients.finish()
        self.statistics.finish_phase()
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], division.divisor)
        self._train_only(self.trainable)
        self._record_terms(name, division)
        self.emit("on_grad", name)
        if self._skipped:
            log.warning("step %d: %s update skipped: %s", step + 1, name, self._skipped)
        else:
            self._apply(phase, optimizer, parameters, total, division)
        self._checked.add(name)
        return to_pass

    def _loss(self, batch: Batch, moment: Moment, counts: dict[str, Any]) -> Loss:
        with devices.autocast(self.device, self.cfg.precision):
            loss = self.stage.loss(self.model, batch, moment)
        if moment.phase not in self._checked or loss.terms.keys() != counts.keys():
            contract.check_loss(self.stage, moment.phase, loss, counts)
        return loss

    def _record(self, phase: str, loss: Loss, counts: dict[str, Any], division: "Division") -> None:
        """Record the figures of a micro-batch. A loss of several terms is recorded once, after the last micro-batch."""
        if not division.several and not division.is_empty:
            (term, total), = loss.terms.items()
            self.record("train/" + self._named("loss", phase), Ratio(total, counts[term]))
        for name, ratio in loss.figures.items():
            self.record("train/" + self._named(name, phase), ratio)

    def _record_terms(self, phase: str, division: "Division") -> None:
        """Record the terms of a loss that has several, and the loss: the sum of their means, each times its weight."""
        for term, ratio in division.totals().items():
            if term != "loss":
                self.record("train/" + self._named(term, phase), ratio)
            weighed = Ratio(ratio.total * division.weights.get(term, 1.0), ratio.count)
            self.record("train/" + self._named("loss", phase), weighed, term)

    def _train_only(self, parameters: Sequence[nn.Parameter]) -> None:
        """Compute no gradients for the other trainable parameters: the current phase does not train them."""
        if len(self.phases) > 1:
            wanted = {id(parameter) for parameter in parameters}
            for parameter in self.trainable:
                parameter.requires_grad_(id(parameter) in wanted)

    def _apply(self, phase: Phase, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter],
               loss: Tensor, division: "Division") -> None:
        """Clip and update. The device itself drops an update that is not finite or, where counts are tensors, one for
        which nothing was counted. So the host need not wait."""
        name, max_norm = phase.name, self.cfg.gradient_clip if phase.clip is None else phase.clip
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
        dropped = unhealthy = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        if scale := self.loss_scales.get(name):  # an overflow is no alarm as long as the scale can be halved
            unhealthy = dropped * ((scale.value <= 1) | ~torch.isfinite(loss))
            self.record(self._named("health/loss_scale", name), scale.value)
            self.record(self._named("health/overflow_share", name), dropped - unhealthy)
            scale.update(dropped)
        if isinstance(division.counted, Tensor):
            empty = (division.counted == 0).float()
            dropped = torch.maximum(dropped, empty)
            self.record(self._named("health/empty_share", name), empty)
        self.dropped, self.grad_norms[name] = torch.maximum(self.dropped, unhealthy), norms
        self.record(self._named("grad_norm", name), norm)
        self.updated = True
        optim.update(optimizer, dropped)

    def _named(self, figure: str, phase: str) -> str:
        return figure if len(self.phases) == 1 else f"{phase}/{figure}"


class Division:
    """Divides the sums of the terms of a loss by their counts in the whole step.

    With one term of weight 1, the backward pass starts from the sum, and the gradients are divided by the count once,
    at the end. Otherwise each sum is multiplied by its weight and divided by its count before the backward pass. A term
    whose count is 0 then adds nothing.
    """

    def __init__(self, counts: Sequence[dict[str, Any]], weights: dict[str, float], scale: "optim.LossScale | None"):
        self.counts, self.weights = counts, weights
        self.all = {term: sum(each.get(term, 0) for each in counts)
                    for term in dict.fromkeys(term for each in counts for term in each)}
        known = sum(count for count in self.all.values() if not isinstance(count, Tensor))
        self.counted = known or sum(self.all.values())  # 0: nothing; a tensor where only the device knows
        self.several = len(self.all) > 1 or any(weights.get(term, 1.0) != 1.0 for term in self.all)
        self.shares = {term: _share(weights.get(term, 1.0), count) for term, count in self.all.items()
                       if self.several}
        self.sums: dict[str, Tensor] = {}  # of several terms, over the micro-batches so far
        only = next(iter(self.all), "")
        self.factor: Any = 1.0  # multiplies the loss before the backward pass; with fp16 from the loss scale
        if scale:
            self.factor = scale.value if self.several else scale.value / _at_least_one(counts[0].get(only, 0))
        # divides the gradients after it
        self.divisor = self.factor * (1 if self.several else _at_least_one(self.all.get(only, 0)))

    @property
    def is_empty(self) -> bool:
        """Whether no term counts anything in the whole step, as far as the host knows."""
        return not isinstance(self.counted, Tensor) and not self.counted

    def loss(self, loss: Loss) -> Tensor:
        """The scalar to call `backward` on, before it is multiplied by the factor. Of several terms it also adds up the
        sums, for `totals`."""
        if not self.several:
            return next(iter(loss.terms.values()))
        for term, total in loss.terms.items():
            self.sums[term] = self.sums.get(term, 0) + total.detach()
        return torch.stack([total * self.shares[term] for term, total in loss.terms.items()]).sum()

    def totals(self) -> dict[str, Ratio]:
        """The sums and counts of several terms, without those of which the host knows that they count nothing."""
        return {term: Ratio(total, self.all[term]) for term, total in self.sums.items()
                if isinstance(self.all[term], Tensor) or self.all[term]}

    def micro_batch_loss(self, loss: Loss, number: int) -> Ratio:
        """The mean loss of micro-batch `number` by itself, divided by its own counts."""
        counts = self.counts[number]
        if not self.several:
            (term, total), = loss.terms.items()
            return Ratio(total, counts[term])
        return Ratio(sum(total.detach() * _share(self.weights.get(term, 1.0), counts[term])
                         for term, total in loss.terms.items()), 1)


def losses(stage: Stage, model: nn.Module, batch: Batch, device: torch.device, precision: str,
           steps: Sequence[range] = (range(ENDLESS),), number: int | None = None) -> Iterator[Ratio]:
    """The loss of each phase that runs in `steps`, on one batch by itself, with its autograd graph. With `number`, it
    draws the random numbers that the first of the steps draws for its micro-batch of that number."""
    passed = None
    for phase in stage.phases():
        if not phase.updates_in(steps):
            continue
        if number is not None:
            rng.begin(stage.cfg.seed, steps[0].start, phase.name, number)
        moment, counts = Moment(phase.name, passed=passed), stage.counts(batch, phase.name)
        with devices.autocast(device, precision):
            loss = stage.loss(model, batch, moment)
        contract.check_loss(stage, phase.name, loss, counts)
        division = Division([counts], stage.weights(moment), None)
        passed = _detached(loss.passed)
        yield Ratio(division.loss(loss), 1 if division.several else division.divisor)


def _at_least_one(count: Any) -> Any:
    """The count as a divisor. It is 0 where a micro-batch or a step has nothing for a term, and then so is the sum."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)


def _share(weight: float, count: Any) -> Any:
    """The weight divided by the count; 0 where that is 0."""
    if isinstance(count, Tensor):
        return (weight / count).nan_to_num(0.0, 0.0, 0.0)
    return weight / count if count else 0.0


class GradientSum:
    """Sums the gradients of a step's micro-batches along a tree. Autograd itself adds those of two; beyond two, each
    level of the tree keeps one more set of gradients in memory."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters, self.pairs = parameters, Tree(_plus)
        self._take()

    def add(self, number: int) -> None:
        """Call this after the backward pass of micro-batch `number` (from 0): its gradients are in `grad`."""
        if number % 2:  # autograd adds those of an odd number in place to those of the even number before it
            self.pairs.add(self._take())

    def finish(self) -> None:
        """Write the sum over all micro-batches into `grad`."""
        for parameter, grad in zip(self.parameters, self.pairs.total(self._take())):
            parameter.grad = grad

    def _take(self) -> list[Tensor | None]:
        grads = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return grads


def _plus(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    """The sums, written over the tensors of `left` where it has them."""
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
