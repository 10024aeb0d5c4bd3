"""How much a planned run does: its steps, samples, evaluations and snapshots."""

from dataclasses import dataclass

from stoker.training.core.plan import Plan


@dataclass(frozen=True)
class Length:
    """How much a run does."""

    steps: int
    samples: float  # trained on
    scored: dict[str, int]  # rows of each evaluation, whenever it is done
    evaluations: int  # steps after which there are any
    snapshots: int

    @classmethod
    def of(cls, plan: Plan) -> "Length":
        """The length of a planned run. It supposes that a test set is as large as the validation set, and that each
        evaluation is the best so far, which is saved."""
        cfg, steps, known, tested = plan.cfg, plan.steps, plan.evaluations, "test" in plan.stage.splits()
        per_epoch = plan.order.steps_per_epoch
        done = {name: _multiples(interval, steps) for name, interval in known.intervals.items()}
        evaluated = set[int]().union(*done.values())
        scored = {each.name: (len(done[each.name]) + tested) * len(rows.dataset)
                  for each in known.declared if (rows := known.rows(each, "validation"))}
        saved = evaluated | _multiples(per_epoch, steps) | _multiples(cfg.snapshot_interval or per_epoch, steps)
        return cls(steps, plan.order.samples(steps), scored, len(evaluated) + tested, len(saved) + 1)


def _multiples(interval: int, last: int) -> set[int]:
    """The steps up to the last at which an interval ends; the last is one in any case."""
    return {*range(interval, last + 1, interval), last}
