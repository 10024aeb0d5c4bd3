"""The mixture of experts against transformers' Qwen3-MoE and a loop that computes token by token."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from exported import of_transformers
from stoker.config import UserError
from stoker.model.experts import Experts, MixtureOfExperts
from stoker.model.thinker import Thinker
from stoker.training.core.blocks import checkpoint_blocks
from stoker.training.core.sums import Statistics, Summed

V, T, E, K = 101, 24, 6, 2
SHAPE: dict[str, Any] = dict(d_model=32, num_heads=4, num_kv_heads=2, num_layers=3, d_ff=80, max_seq_len=T)


def thinker() -> Thinker:
    torch.manual_seed(0)
    model = Thinker(V, **SHAPE, experts=Experts(E, K, 24))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def mixture(*, unused: bool = False) -> MixtureOfExperts:
    torch.manual_seed(0)
    made = MixtureOfExperts(16, Experts(E, K, 24))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if unused:  # the last expert never wins
        made.router.weight.data[-1] = 0
        made.router.weight.data[:-1].abs_()
    return made


# -- the output -----------------------------------------------------------------------------------------------------


def test_transformers_loads_the_folder_with_the_same_logits_and_gradients(tmp_path: Path) -> None:
    model, tokens = thinker().eval(), torch.randint(V, (2, T))
    reference = of_transformers(model, tmp_path)
    ours, theirs = model(tokens), reference(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward(), theirs.square().sum().backward()
    for i, layer in enumerate(reference.model.layers):
        mlp: Any = model.blocks[i].mlp
        gate_up = torch.cat([mlp.gate.grad, mlp.up.grad], 1)
        for mine, other in ((gate_up, layer.mlp.experts.gate_up_proj), (mlp.down.grad, layer.mlp.experts.down_proj),
                            (mlp.router.weight.grad, layer.mlp.gate.weight)):
            torch.testing.assert_close(mine, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()))


@pytest.mark.parametrize("unused", [False, True])
def test_it_is_the_sum_of_the_chosen_experts(unused: bool) -> None:
    model, x = mixture(unused=unused), torch.randn(2, 7, 16).abs().requires_grad_()
    y = model(x)
    rows = []
    for token in x.flatten(0, 1):
        probabilities = (model.router.weight @ token).softmax(0)
        chosen = probabilities.argsort(descending=True)[:K]
        each = [probabilities[i] / probabilities[chosen].sum()
                * (model.down[i] @ (F.silu(model.gate[i] @ token) * (model.up[i] @ token))) for i in chosen]
        rows.append(torch.stack(each).sum(0))
    expected = torch.stack(rows).view(2, 7, 16)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = [x, *model.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), weights),
                               torch.autograd.grad(expected.square().sum(), weights), rtol=1e-3, atol=1e-4)
    assert float(model.sums["given"][-1] == 0) == unused


@torch.no_grad()
def test_experts_compute_the_tokens_that_they_were_given_only() -> None:
    """What one of them would make of others' tokens is nowhere multiplied by 0: it may be NaN."""
    model, x = mixture(), torch.randn(2, 50, 16)
    expected = model(x)
    given = model.router(x).topk(K).indices
    for i in range(E):
        broken = copy.deepcopy(model)
        for weight in (broken.gate, broken.up, broken.down):
            weight.data[i] = torch.nan
        others = ~(given == i).any(-1)
        assert 0 < int(others.sum()) < 100
        made = broken(x)
        assert torch.equal(made[others], expected[others]) and bool(made[~others].isnan().all())


@pytest.mark.parametrize("wrong", [Experts(4, 5, 24), Experts(4, 0, 24), Experts(4, 2, 20)])
def test_sizes_that_do_not_go_together_are_refused(wrong: Experts) -> None:
    with pytest.raises(UserError, match=f"{wrong.per_token} of 4 experts of size {wrong.d_ff}"):
        MixtureOfExperts(16, wrong)
    with pytest.raises(UserError, match="hidden size 20"):
        MixtureOfExperts(20, Experts(4, 2, 24))


@torch.no_grad()
def test_under_autocast_experts_compute_in_bf16() -> None:
    model, x = mixture(), torch.randn(2, 7, 16)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert float((y - exact).norm() / exact.norm()) < 0.05


@torch.no_grad()
def test_logits_are_the_same_with_the_cache() -> None:
    model, tokens = thinker().eval(), torch.randint(V, (3, T))
    cache = model.new_cache(T)
    parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 9, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)


# -- balance --------------------------------------------------------------------------------------------------------


def step(model: Thinker, batches: list[Tensor], dropped: float = 0.0) -> Tensor:
    """A step over micro-batches, with the gradients of their balance, added up as the trainer does; returns its sum."""
    statistics, total = Statistics(model), torch.zeros(())
    statistics.begin(), statistics.begin_phase()
    for batch in batches:
        model(batch)
        statistics.add()
        balance = model.balance()
        balance.backward()
        total += balance.detach()
        statistics.clear()
    statistics.finish_phase(), statistics.apply(torch.tensor(dropped))
    return total


def test_balance_is_that_of_transformers(tmp_path: Path) -> None:
    """Of each layer by itself, when the step before had the same tokens; and so is its gradient."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model, tokens = thinker(), torch.randint(V, (2, T))
    reference = of_transformers(model, tmp_path)
    step(model, [tokens])
    model.zero_grad()
    balance = step(model, [tokens]) / tokens.numel()
    logits = reference(tokens, output_router_logits=True).router_logits
    expected = torch.stack([load_balancing_loss_func((layer,), E, K) for layer in logits]).mean()
    torch.testing.assert_close(balance, expected.detach(), rtol=1e-4, atol=1e-5)
    (expected * tokens.numel()).backward()
    for block, layer in zip(model.blocks, reference.model.layers):
        torch.testing.assert_close(block.mlp.router.weight.grad, layer.mlp.gate.weight.grad, rtol=1e-3, atol=1e-3)


def test_accumulation_changes_neither_balance_nor_load() -> None:
    tokens, sums = torch.randint(V, (8, T)), []
    for sizes in ([8], [1, 5, 2]):
        model = thinker()
        step(model, list(tokens.flip(0).split(sizes)))
        model.zero_grad()
        sums.append((step(model, list(tokens.split(sizes))), model.loads(), model.blocks[0].mlp.router.weight.grad))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-4)


def test_loads_are_the_shares_of_tokens() -> None:
    model, tokens = thinker(), torch.randint(V, (2, T))
    assert torch.allclose(model.loads(), torch.full((3, E), K / E))
    chosen: list[Tensor] = []
    for block in model.blocks:
        block.mlp.router.register_forward_hook(lambda module, x, y: chosen.append(y.topk(K).indices))
    step(model, [tokens])
    expected = torch.stack([F.one_hot(each.flatten(), E).sum(0) / tokens.numel() for each in chosen])
    torch.testing.assert_close(model.loads(), expected)
    step(model, [tokens.flip(1) % 7], dropped=1.0)
    torch.testing.assert_close(model.loads(), expected)
    assert all(isinstance(block.mlp, Summed) for block in model.blocks)
    model(tokens), model(tokens)  # a micro-batch that passes through twice
    for block, load in zip(model.blocks, expected):
        torch.testing.assert_close(block.mlp.sums["given"], 2 * load * tokens.numel())
        block.mlp.sums = {}
    model.eval()(tokens)
    assert all(not block.mlp.sums for block in model.blocks)


def test_balance_makes_loads_even() -> None:
    """All tokens go to two of the experts at first."""
    torch.manual_seed(0)
    model = thinker()
    for block in model.blocks:
        block.mlp.router.weight.data[K:] *= 0.1
        block.mlp.router.weight.data[:K] *= 3
    optimizer = torch.optim.Adam([block.mlp.router.weight for block in model.blocks], lr=0.02)
    tokens = torch.randint(V, (8, T))
    spread = []
    for _ in range(100):
        optimizer.zero_grad()
        step(model, [tokens])
        optimizer.step()
        spread.append(float(model.loads().std(1).mean()))
    assert spread[-1] < 0.5 * spread[0]


# -- with what the trainer does to blocks ---------------------------------------------------------------------------


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    """Although their routers run a second time, in the backward pass."""
    tokens, grads = torch.randint(V, (2, T)), []
    for checkpointed in (False, True):
        model = thinker()
        if checkpointed:
            checkpoint_blocks(list(model.blocks))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        (loss + model.balance()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as compile_blocks does
def test_blocks_compile() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, tokens = thinker(), torch.randint(V, (2, T))
    expected, balance = model(tokens), model.balance()
    torch.compiler.reset()
    model.blocks[0].compile(backend=backend, dynamic=False)
    for block in model.blocks:
        block.mlp.sums = {}
    assert torch.equal(model(tokens), expected) and torch.equal(model.balance(), balance)
    assert graphs and float(model.blocks[0].mlp.sums["given"].sum()) == K * tokens.numel()
    torch.compiler.reset()
