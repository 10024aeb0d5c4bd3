"""Checks what the methods of a stage return. A mistake is one line with the stage, the method and the value.

The trial before a run, the first step of each phase and every evaluation check it. Later steps only compare the names
of the terms, which takes no time.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from stoker.config import UserError
from stoker.training.core.figures import Batch, Loss, Moment, Ratio

if TYPE_CHECKING:
    from stoker.data.loader import Order
    from stoker.training.core.stage import Stage

LONGEST = 60  # characters of a value that a message shows
FEW = 8  # samples in each batch that is checked before a run
A_FIGURE = "a figure is a Ratio(total, count) of two numbers, or of two tensors with an entry for each sample"


def check_start(stage: "Stage", order: "Order", steps: int, examples: Iterable[tuple[Batch, Sequence[range]]]) -> None:
    """Raises UserError where no phase of a stage makes an update in a run of `steps` steps, or where its `size`,
    `counts` or `weights` are wrong for a few training batches. `examples`: batches, each with the spans of steps that
    may train on such rows."""
    if not any(phase.updates(steps) for phase in stage.phases()):
        begin = ", ".join(f"{phase.name} at step {phase.first}" for phase in stage.phases())
        _refuse(stage, [f"no phase makes an update in the {steps} steps of the run ({begin}): train longer, or let one "
                        "begin earlier"])
    counts: dict[str, list[Any]] = {}
    for batch, spans in examples:
        checked_size(f"stage {stage.name}", stage.size(batch))
        for phase in stage.phases():
            if phase.updates_in(spans):
                counts.setdefault(phase.name, []).append(stage.counts(batch, phase.name))
    for phase in stage.phases():
        found = counts.get(phase.name, [])
        check_counts(stage, phase.name, found)
        if found and not _counts_anything(found):  # what is rare may be missing in a few samples, not in a whole step
            dataset = stage.dataset("train")
            first = [stage.collate([dataset[item] for item in part]) for part in order.items(phase.first)]
            of_step = [stage.counts(batch, phase.name) for batch in first]
            check_counts(stage, phase.name, of_step)
            if not _counts_anything(of_step):
                _refuse(stage, [f"counts() returned 0 for every term ({', '.join(_terms_of(of_step))}) in all "
                                "micro-batches of a step, so there is nothing to divide the loss by: return the number "
                                "that each sum is over, such as the number of samples"], phase.name)
    check_weights(stage, _terms_of(each for found in counts.values() for each in found), steps)


def checked_batch(who: str, batch: Any) -> Batch:
    """The same batch. Raises UserError where it is no dict, or empty. `who`: the stage or evaluation that collated it,
    for the message."""
    if isinstance(batch, Mapping) and batch:
        return batch  # type: ignore[return-value]
    raise UserError(f'{who}: collate() returned {_shown(batch)}: return a dict, such as {{"x": torch.stack(samples)}}')


def rows(stage: "Stage", batch: Batch, method: str) -> int:
    """The length of the first value of a batch, which the default of `method` returns. Raises UserError where it has
    none."""
    name, value = next(iter(checked_batch(f"stage {stage.name}", batch).items()))
    try:
        return len(value)
    except TypeError as error:
        raise UserError(f"stage {stage.name}: {method}() counts the rows of the first value of a batch, but {name} is "
                        f"{_shown(value)}: declare {method}(), or put a value with rows first") from error


def check_loss(stage: "Stage", phase: str, loss: Any, counts: Any) -> None:
    """Raises UserError with everything that is wrong with what `loss` and `counts` returned for a micro-batch. Does not
    wait for the device, unless `loss` lacks a term."""
    problems = [*_names(counts)]
    if not isinstance(loss, Loss):
        problems.append(f'loss() returned {_shown(loss)}: return Loss({{"loss": total}})')
    elif not (isinstance(loss.terms, Mapping) and loss.terms):
        problems.append(f'loss() returned a Loss with the terms {_shown(loss.terms)}: return Loss({{"loss": total}})')
    else:
        problems += [*_terms(loss), *_figures(loss)]
        if not problems and (loss.terms.keys() - counts.keys()
                             or any(counts[term] for term in counts.keys() - loss.terms.keys())):
            problems.append(f"loss() returned the terms {', '.join(loss.terms)}, but counts() returned "
                            f"{', '.join(counts)}: return the same names, since each sum is divided by its count")
    _refuse(stage, problems, phase)


def check_counts(stage: "Stage", phase: str, counts: Sequence[Any]) -> None:
    """Raises UserError where one of the `counts` of micro-batches is no whole number. Waits for the device."""
    _refuse(stage, [problem for each in counts for problem in _names(each)] or [
        f"counts() returned {_shown(count)} for the term {term}: a count is a whole number, 0 or more"
        for each in counts for term, count in each.items() if not _is_count(count)], phase)


def check_weights(stage: "Stage", terms: Collection[str], steps: int) -> None:
    """Raises UserError where `weights` has a name that is none of `terms`, those of the loss in all phases, or has no
    finite number for it."""
    problems = list[str]()
    for moment in [Moment(phase.name, step, steps) for phase in stage.phases() for step in (0, steps)]:
        weights = stage.weights(moment)
        if not isinstance(weights, Mapping):
            problems.append(f'weights() returned {_shown(weights)}: return a dict, such as {{"loss": 0.5}}')
            continue
        for term, weight in weights.items():
            if term not in terms:
                problems.append(f"weights() has {term!r}, which is no term of the loss; the terms are "
                                f"{', '.join(sorted(terms))}. Correct the name; if only some batches have this term, "
                                "counts() must return 0 for it in the others")
            elif not (isinstance(weight, Real) and math.isfinite(weight)):
                problems.append(f"weights() has {_shown(weight)} for the term {term}: a weight is a number")
    _refuse(stage, problems)


def checked_size(who: str, size: Any) -> Mapping[str, int]:
    """The same `size`. Raises UserError where it has no numbers by unit. `who`: the stage or evaluation that returned
    it, for the message."""
    if isinstance(size, Mapping) and size and all(isinstance(amount, Real) for amount in size.values()):
        return size
    raise UserError(f'{who}: size() returned {_shown(size)}: return numbers by unit, such as '
                    '{"samples": len(batch["x"])}')


def check_scores(evaluation: str, method: str, figures: Any, *, plain: bool = False) -> None:
    """Raises UserError where an evaluation's `score` or `judge` did not return figures by name. `plain`: a figure may
    be a number."""
    if not isinstance(figures, Mapping):
        raise UserError(f"evaluation {evaluation}: {method}() returned {_shown(figures)}: return a dict of figures, "
                        'such as {"mae": Ratio(total, count)}')
    if problems := [f"evaluation {evaluation}: {method}() returned {_shown(value)} for {name}: {A_FIGURE}"
                    for name, value in figures.items() if not (_is_ratio(value) or plain and _is_number(value))]:
        raise UserError(*problems)


def check_gathered(evaluation: str, gathered: Any) -> None:
    """Raises UserError where an evaluation's `gather` did not return tensors with rows by name."""
    from torch import Tensor

    if not isinstance(gathered, Mapping) or any(not (isinstance(value, Tensor) and value.dim())
                                                for value in gathered.values()):
        raise UserError(f"evaluation {evaluation}: gather() returned {_shown(gathered)}: return a dict of tensors with "
                        "a row for each sample")


def _terms_of(counts: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """Their names, each once, in their order."""
    return dict.fromkeys(term for each in counts for term in each)


def _counts_anything(counts: Sequence[Mapping[str, Any]]) -> bool:
    return any(count for each in counts for count in each.values())


def _names(counts: Any) -> Iterator[str]:
    if not (isinstance(counts, Mapping) and counts):
        yield (f"counts() returned {_shown(counts)}: return the count of each term of the loss, such as "
               '{"loss": len(batch["x"])}')


def _terms(loss: Loss) -> Iterator[str]:
    import torch

    for term, total in loss.terms.items():
        if not isinstance(total, torch.Tensor) or total.dim():
            yield (f"loss() returned {_shown(total)} for the term {term}: a term is a tensor without dimensions, the "
                   "sum over the samples")
            return
    if torch.is_grad_enabled() and not any(total.requires_grad for total in loss.terms.values()):
        yield (f"no term of the loss ({', '.join(loss.terms)}) depends on weights that are trained: it was detached, "
               "or computed without the model")


def _figures(loss: Loss) -> Iterator[str]:
    total = {"loss"} if len(loss.terms) > 1 else set()
    for name, value in loss.figures.items():
        if not _is_ratio(value):
            yield f"loss() returned {_shown(value)} for the figure {name}: {A_FIGURE}"
        elif name in loss.terms.keys() | total:
            yield f"loss() returned a figure {name}, the name of a term or of the whole loss: choose another name"
    if unknown := loss.samples.keys() - loss.terms.keys():
        yield (f"loss() returned samples of {min(unknown)}, which is no term of the loss; the terms are "
               f"{', '.join(loss.terms)}")


def _is_count(count: Any) -> bool:
    return _is_number(count) and float(count) >= 0 and float(count).is_integer()


def _is_number(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


def _is_ratio(value: Any) -> bool:
    """Of two numbers, or of two tensors with an entry for each sample."""
    from torch import Tensor

    if not isinstance(value, Ratio):
        return False
    by_sample = isinstance(value.total, Tensor) and value.total.dim() == 1 and isinstance(value.count, Tensor)
    return by_sample and value.count.dim() == 1 or _is_number(value.total) and _is_number(value.count)


def _shown(value: Any) -> str:
    """A value as a message shows it: short, in one line."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.dim() else f"a tensor of {value.item():g}"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({type(value).__name__})"


def _refuse(stage: "Stage", problems: Sequence[str], phase: str = "") -> None:
    where = f", phase {phase}" if phase and len(stage.phases()) > 1 else ""
    if problems:
        raise UserError(*dict.fromkeys(f"stage {stage.name}{where}: {problem}" for problem in problems))  # each once
