"""A step against loops written by hand: micro-batches, terms of the loss, phases, statistics, random numbers."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.config import UserError
from stoker.model.gpt import GPT
from stoker.training.core import phases
from stoker.training.core.blocks import checkpoint_blocks
from stoker.training.core.callback import ACT, Callback
from stoker.training.core.evaluation import evaluate
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.options import Options
from stoker.training.core.phases import Group, Phase
from stoker.training.core.step import GradientSum, Step
from stoker.training.core.totals import Totals
from stoker.training.trainer import Trainer
from toys import GAN, Toy, TwoTerms, assert_same, new_run, planned, recording_in, step_of, train, with_callbacks

CPU = torch.device("cpu")


def tree(items: Sequence[Tensor]) -> Tensor:
    """The sum along the binary tree that its definition gives: the left part is the largest power of two."""
    if len(items) == 1:
        return items[0]
    left = 1
    while 2 * left < len(items):
        left *= 2
    return tree(items[:left]) + tree(items[left:])


def seed(*key: Any) -> None:
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest))


class Language(Toy):
    """A language model on made-up tokens: a row more in each micro-batch."""

    name = "language"

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return GPT(64, d_model=32, num_heads=2, num_layers=2, d_ff=64, max_seq_len=16, dropout=0.1)

    def counts(self, batch: Batch, phase: str) -> dict[str, int]:
        return {"loss": batch["targets"].numel()}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": model(batch["tokens"], batch["targets"])})


def batches(count: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(count)
    tokens = [torch.randint(64, (i + 1, 17), generator=draw) for i in range(count)]
    return [{"tokens": ids[:, :-1], "targets": ids[:, 1:]} for ids in tokens]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_dropout_and_accumulation_are_those_of_a_loop_written_by_hand(tmp_path: Path, count: int) -> None:
    """Bit for bit: gradients added along a tree and divided once, dropout keyed by (seed, step, phase, number)."""
    step, stage = step_of(Language(Toy.Config(), tmp_path)), Language(Toy.Config(), tmp_path)
    model = stage.model().train()
    decayed = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed[0], "weight_decay": 0.1},
                                   {"params": decayed[1], "weight_decay": 0.0}], 1e-2, (0.9, 0.95), fused=True)
    for number in range(3):
        step.run(number, batches(count))
        grads = []
        for i, batch in enumerate(batches(count)):
            seed(7, number, "main", i)
            loss = model(batch["tokens"], batch["targets"])
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        tokens = sum(batch["targets"].numel() for batch in batches(count))
        for parameter, own in zip(model.parameters(), zip(*grads)):
            parameter.grad = tree(own) / tokens
        torch.nn.utils.clip_grad_norm_([*decayed[0], *decayed[1]], 1.0)
        optimizer.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(step.model.parameters(), model.parameters()))


def test_the_tree_is_known_by_its_rounding() -> None:
    """Numbers whose sum depends on the order; a parameter without a gradient in some micro-batches."""
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for count in range(1, 12):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 10.0 ** torch.arange(count).neg()
        total = GradientSum([a, b])
        for i, value in enumerate(values):
            (a * value + (b * value if i in (1, 4) else 0)).sum().backward()
            total.add(i)
        total.finish()
        assert a.grad is not None and a.grad.item() == tree([value[None] for value in values]).item()
        assert (b.grad is None) == (count < 2)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_terms_with_counts_of_their_own_are_exact_under_accumulation(tmp_path: Path, parts: int) -> None:
    rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    figures = Totals()
    stage = TwoTerms(Toy.Config(), tmp_path)
    step = Step(stage, stage.model(), Options(lr=1e-2, warmup_steps=0, lr_schedule="constant", gradient_clip=0.0,
                                      precision="fp32"), 10,
                CPU, lambda *args: None, recording_in(figures))
    step.run(3, [{"x": part} for part in rows.chunk(parts)])
    model = stage.model()
    made = model(rows)
    near, positive = (made - rows).square().mean(1).sum() / 8, (made * (rows > 0)).abs().sum() / (rows > 0).sum()
    loss = near + 0.3 * positive
    loss.backward()
    for ours, theirs in zip(step.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert figures.means()["train/loss"] == pytest.approx(loss.item(), rel=1e-5)


class Weighed(TwoTerms):
    """Its first term alone, or in the company of the other, under the name of the whole loss; of weight 0.25."""

    name = "weighed"
    terms = {"loss": "near"}

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        counts = super().counts(batch, phase)
        return {name: counts[term] for name, term in self.terms.items()}

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"loss": 0.25}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss = super().loss(model, batch, moment)
        return Loss({name: loss.terms[term] for name, term in self.terms.items()})


class WeighedBoth(Weighed):
    name = "weighed_both"
    terms = {"loss": "near", "positive": "positive"}


@pytest.mark.parametrize("kind", [Weighed, WeighedBoth])
def test_a_term_is_weighed_also_alone_and_the_weighed_loss_is_logged(tmp_path: Path, kind: type[Weighed]) -> None:
    figures, rows = Totals(), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    stage = kind(Toy.Config(max_steps=20, batch_size=3, precision="fp32"), tmp_path)
    step = Step(stage, stage.model(), Options(gradient_clip=0.0, precision="fp32"), 10, CPU, lambda *args: None,
                recording_in(figures))
    model = stage.model()

    def expected(x: Tensor) -> Tensor:
        made = model(x)
        positive = (made * (x > 0)).abs().sum() / (x > 0).sum()
        return 0.25 * (made - x).square().mean() + (positive if kind is WeighedBoth else 0)

    step.run(3, [{"x": part} for part in rows.split([4, 2])])
    (loss := expected(rows)).backward()
    for ours, theirs in zip(step.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert figures.means()["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    data = stage.dataset("validation")
    done = evaluate(stage, model, data, stage.cfg, CPU, lambda: False)
    assert done and done.metrics["eval/loss"] == pytest.approx(
        expected(torch.stack([data[i] for i in range(len(data))])).item(), rel=1e-5)


class Absent(TwoTerms):
    """A term that is in some micro-batches only."""

    name = "absent"

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        found = {"near": len(batch["x"]), "positive": int((batch["x"] > 0).sum())}
        return found if found["positive"] else {"near": found["near"]}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss = super().loss(model, batch, moment)
        return Loss({term: loss.terms[term] for term in self.counts(batch, moment.phase)})


@pytest.mark.parametrize("first", [-1.0, 1.0])
@pytest.mark.parametrize("stage", [TwoTerms, Absent])
def test_a_term_may_find_nothing_in_a_micro_batch(tmp_path: Path, stage: type[Toy], first: float) -> None:
    rows = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    batches = [{"x": rows[:2] * first}, {"x": rows[2:] * -first}]
    step = step_of(stage(Toy.Config(), tmp_path), gradient_clip=0.0)
    step.run(3, batches)
    model, x = stage(Toy.Config(), tmp_path).model(), torch.cat([batch["x"] for batch in batches])
    made = model(x)
    ((made - x).square().mean(1).sum() / 4 + 0.3 * (made * (x > 0)).abs().sum() / (x > 0).sum()).backward()
    for ours, theirs in zip(step.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    step.run(4, [{"x": -rows}])
    assert not step.dropped and all(p.isfinite().all() for p in step.model.parameters())


def test_the_loss_of_an_evaluation_weighs_its_terms_as_the_end_of_the_run(tmp_path: Path) -> None:
    stage = TwoTerms(Toy.Config(max_steps=20, batch_size=3, precision="fp32"), tmp_path)
    model, rows = stage.model(), stage.dataset("validation")
    done = evaluate(stage, model, rows, stage.cfg, CPU, lambda: False)
    x = torch.stack([rows[i] for i in range(len(rows))])
    made = model(x).detach()
    near, positive = (made - x).square().mean(), (made * (x > 0)).abs().sum() / (x > 0).sum()
    found = {"near": float(near), "positive": float(positive), "loss": float(near + 2.0 * positive)}
    assert done and done.metrics == pytest.approx({f"eval/{name}": value for name, value in found.items()}, rel=1e-5)


@pytest.mark.parametrize("own, loss", [({"loss": Ratio(5.0, 1)}, 5.0), ({}, None)])
def test_a_loss_that_an_evaluation_scores_itself_stays(tmp_path: Path, own: dict[str, Ratio],
                                                       loss: float | None) -> None:
    """None is computed where not all terms were scored."""
    class Own(TwoTerms):
        def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
            scores = super().score(model, batch)
            return {**scores, **own} if own else {"near": scores["near"]}

    stage = Own(Toy.Config(max_steps=20, batch_size=3, precision="fp32"), tmp_path)
    done = evaluate(stage, stage.model(), stage.dataset("validation"), stage.cfg, CPU, lambda: False)
    assert done and "eval/near" in done.metrics and done.metrics.get("eval/loss") == loss


class Late(GAN):
    """The discriminator begins at step 20, and trains at every second one."""

    name = "late"

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("discriminator", (Group("discriminator.*"),), first=20, every=2, betas=(0.5, 0.9)),
                Phase("generator", (Group("generator.*bias", lr_factor=0.0), Group("generator.*"))))

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        if moment.phase == "discriminator":
            loss = super().loss(model, batch, moment)
            return loss._replace(passed={"noise": loss.passed, "more": [next(iter(loss.terms.values()))]})
        if moment.passed is None:
            return super().loss(model, batch, moment._replace(passed=torch.randn_like(batch["x"])))
        assert not moment.passed["more"][0].requires_grad, "one graph at a time"
        return super().loss(model, batch, moment._replace(passed=moment.passed["noise"]))


def test_a_phase_begins_late_and_runs_every_second_step(tmp_path: Path) -> None:
    class Watch(Callback):
        order = ACT

        def on_start(self, trainer: Trainer) -> None:
            biases.append(weights(trainer, "generator", "bias"))
            before.append(weights(trainer, "discriminator", ""))

        def on_grad(self, trainer: Trainer, phase: str) -> None:
            ran.append((trainer.step, phase))
            assert_same(self.grads, self.of_the_other(trainer, phase))
            assert all(p.grad is not None for p in trainer.model[phase].parameters())
            del self.grads

        def on_loss(self, trainer: Trainer, phase: str, loss: Ratio) -> None:
            if not hasattr(self, "grads"):
                self.grads = self.of_the_other(trainer, phase)

        def of_the_other(self, trainer: Trainer, phase: str) -> list[Tensor | None]:
            other = {"discriminator": "generator", "generator": "discriminator"}[phase]
            return [p.grad if p.grad is None else p.grad.clone() for p in trainer.model[other].parameters()]

        def on_step_end(self, trainer: Trainer) -> None:
            assert all(p.requires_grad for p in trainer.model.parameters())
            if trainer.step == 20:
                before.append(weights(trainer, "discriminator", ""))

    def weights(trainer: Trainer, side: str, part: str) -> Tensor:
        return torch.cat([p.detach().flatten() for name, p in trainer.model[side].named_parameters() if part in name])

    ran: list[tuple[int, str]] = []
    before: list[Tensor] = []
    biases: list[Tensor] = []
    trainer, ending = train(with_callbacks(Late, Watch()), new_run(tmp_path, Late), max_steps=25)
    assert ending.state == "finished"
    assert [step for step, phase in ran if phase == "discriminator"] == [20, 22, 24]
    assert [step for step, phase in ran if phase == "generator"] == list(range(25))
    assert torch.equal(before[0], before[1]) and not torch.equal(before[1], weights(trainer, "discriminator", ""))
    assert torch.equal(biases[0], weights(trainer, "generator", "bias")), "a factor of 0"
    assert trainer.optimizers["discriminator"].param_groups[0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize("phase, steps, ran", [
    (Phase(), 4, [0, 1, 2, 3]), (Phase(first=2), 5, [2, 3, 4]), (Phase(every=3), 8, [0, 3, 6]),
    (Phase(first=1, every=2, last=6), 9, [1, 3, 5]), (Phase(last=0), 3, []),
])
def test_when_a_phase_runs(phase: Phase, steps: int, ran: list[int]) -> None:
    """And how many updates it has made: what its learning rate follows."""
    assert [step for step in range(steps) if phase.runs(step)] == ran
    before = [sum(each < step for each in ran) for step in range(steps + 1)]
    assert [phase.updates(step) for step in range(steps + 1)] == before


@pytest.mark.parametrize("declared, problem", [
    ((), "returns none: nothing would be trained"),
    ((Phase("a"), Phase("b"), Phase("a")), "2 phases are called a: each has a name of its own"),
    ((Phase(every=0),), "phase 'main': every is 0"),
    ((Phase(first=-1),), "from step -1 to before step None"),
    ((Phase(first=5, last=4),), "from step 5 to before step 4"),
    ((Phase(lr_schedule="cosinus"),), "no lr_schedule 'cosinus'; there are cosine, wsd, linear, constant"),
    ((Phase("a/b"),), "phase 'a/b': a name has lower case letters"),
])
def test_what_phases_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path, declared: tuple[Phase, ...],
                                                                     problem: str) -> None:
    """Names key the optimizers: of two phases with one name, both would be the second's."""
    phased = type("Phased", (GAN,), {"phases": lambda self: declared})
    with pytest.raises(UserError, match=problem):
        planned(phased(phased.Config(), tmp_path))


@pytest.mark.parametrize("groups, problem", [
    ((Group("generator.*"),), "4 parameters are in no phase, the first is discriminator.0.weight"),
    ((Group("*.0.weight"), Group("*"), ), ""),
    ((Group("encoder.*"),), "phase main trains nothing: no trainable parameter fits encoder.*"),
])
def test_every_parameter_is_in_a_phase(tmp_path: Path, groups: tuple[Group, ...], problem: str) -> None:
    model = GAN(Toy.Config(), tmp_path).model()
    if problem:
        with pytest.raises(UserError, match=problem.replace("*", r"\*")):
            phases.check((Phase(groups=groups),), model)
    else:
        phases.check((Phase(groups=groups),), model)
        first, rest = Phase(groups=groups).parameters(model)
        assert list(first[1]) == ["generator.0.weight", "discriminator.0.weight"] and len(rest[1]) == 6


DECAY = 0.9


class Codebook(nn.Module):
    """Averages of the rows next to each of its entries (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1); a
    row that holds NaN spoils the step. One of its sums is made in some forward passes only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        draw = torch.Generator().manual_seed(5)
        self.register_buffer("entries", torch.randn(3, 8, generator=draw))
        self.register_buffer("count", torch.ones(3))
        self.register_buffer("total", self.entries.clone())
        self.sums: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        near = F.one_hot(torch.cdist(x, self.entries).argmin(1), 3).to(x.dtype)
        if self.training:
            found = {"count": near.sum(0), "total": near.T @ x, **({"late": x.sum()} if x[0, 0] > 0 else {})}
            self.sums = {name: self.sums.get(name, 0) + value for name, value in found.items()}
        return self.linear(x - near @ self.entries)

    def apply_sums(self, sums: dict[str, Tensor], dropped: Tensor) -> None:
        assert not any(value.requires_grad for value in sums.values())
        count, total = (DECAY * old + (1 - DECAY) * sums[name] for name, old in self.averages().items())
        for buffer, value in ((self.count, count), (self.total, total), (self.entries, total / count[:, None])):
            buffer.copy_(torch.where(dropped > 0, buffer, value))

    def averages(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total}


class Averaging(Toy):
    """`early`: a step before which the codebook is not used."""

    name = "averaging"
    early = 0

    def model(self) -> nn.Module:
        torch.manual_seed(2)
        return nn.ModuleDict({"codebook": Codebook(), "out": nn.Linear(8, 8)})

    def blocks(self, model: Any) -> list[nn.Module]:
        return [model["codebook"]]

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        x = batch["x"] if moment.step < self.early else model["codebook"](batch["x"])
        return Loss({"loss": F.mse_loss(model["out"](x), batch["x"], reduction="sum")})


def averaged(codebook: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The entries and counts after a step on these rows, in double precision: the paper's equations 6 to 8."""
    near = (rows.double()[:, None] - codebook.entries.double()).square().sum(2).argmin(1)
    own = [rows.double()[near == entry] for entry in range(3)]
    count = DECAY * codebook.count.double() + (1 - DECAY) * torch.tensor([float(len(each)) for each in own])
    total = DECAY * codebook.total.double() + (1 - DECAY) * torch.stack([each.sum(0) for each in own])
    return total / count[:, None], count


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_statistics_are_sums_over_the_micro_batches_applied_once(tmp_path: Path, parts: int,
                                                                 checkpointed: bool) -> None:
    """1 x 8 rows are 4 x 2, also where the backward pass computes the forward pass a second time."""
    step, rows = step_of(Averaging(Toy.Config(), tmp_path)), torch.randn(8, 8)
    if checkpointed:
        checkpoint_blocks([step.model["codebook"]])
    codebook = step.model["codebook"]
    for number in range(3):
        entries, count = averaged(codebook, rows + number)
        codebook.eval()(rows), codebook.train()(rows)  # neither an evaluation counts nor a pass outside of a step
        step.run(number, [{"x": part} for part in (rows + number).chunk(parts)])
        torch.testing.assert_close(codebook.entries.double(), entries, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(codebook.count.double(), count, rtol=1e-6, atol=1e-6)


def test_statistics_of_a_step_that_is_not_finite_are_not_applied(tmp_path: Path) -> None:
    step, rows = step_of(Averaging(Toy.Config(), tmp_path)), torch.randn(8, 8)
    codebook = step.model["codebook"]
    before = codebook.entries.clone()
    step.run(1, [{"x": rows}, {"x": torch.full((1, 8), torch.nan)}])
    assert step.dropped == 1 and torch.equal(codebook.entries, before)
    entries, _ = averaged(codebook, rows[:3])
    step.run(2, [{"x": rows[:3]}])
    torch.testing.assert_close(codebook.entries.double(), entries, rtol=1e-5, atol=1e-6)


def test_statistics_are_not_applied_where_nothing_was_summed(tmp_path: Path) -> None:
    """`apply_sums` would fail for want of the sums."""
    step = step_of(type("Late", (Averaging,), {"early": 1})(Toy.Config(), tmp_path))
    before = step.model["codebook"].entries.clone()
    step.run(0, [{"x": torch.randn(8, 8)}])
    assert torch.equal(step.model["codebook"].entries, before)
    step.run(1, [{"x": torch.randn(8, 8)}])
    assert not torch.equal(step.model["codebook"].entries, before)


def test_statistics_are_added_along_the_tree_of_the_gradients(tmp_path: Path) -> None:
    """So that processes which share micro-batches out in powers of two add them to the same bits."""
    class Watched(Codebook):
        def apply_sums(self, sums: dict[str, Tensor], dropped: Tensor) -> None:
            found.update(sums)

    class Watching(Averaging):
        def model(self) -> nn.Module:
            return nn.ModuleDict({"codebook": Watched(), "out": nn.Linear(8, 8)})

    found: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    for count in range(1, 10):
        rows = [torch.randn(3, 8, generator=draw) * 10.0**-i for i in range(count)]
        step_of(Watching(Toy.Config(), tmp_path)).run(0, [{"x": each} for each in rows])
        own = [Codebook().train() for _ in rows]
        for module, each in zip(own, rows):
            module(each)
        assert torch.equal(found["total"], tree([module.sums["total"] for module in own]))
        late = [module.sums["late"] for module in own if "late" in module.sums]
        if late:
            torch.testing.assert_close(found["late"], torch.stack(late).sum())


def test_two_runs_that_share_micro_batches_draw_the_same(tmp_path: Path) -> None:
    """Whatever was drawn between: what others compute in the same process changes nothing."""
    steps = [step_of(Language(Toy.Config(), tmp_path)) for _ in range(2)]
    for number in range(2):
        for i, step in enumerate(steps):
            torch.rand(i * 5)
            step.run(number, batches(2))
    assert all(torch.equal(a, b) for a, b in zip(*(step.model.parameters() for step in steps)))
