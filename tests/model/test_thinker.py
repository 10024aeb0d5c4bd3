"""The thinker against transformers' Qwen3, and the properties of a causal language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from exported import of_transformers
from stoker.config import UserError
from stoker.model.decoding import Sampling, generate
from stoker.model.experts import Experts
from stoker.model.qwen3 import qwen3_weights
from stoker.model.thinker import Thinker
from stoker.training.core import adapters
from stoker.training.core.parts import Lora

V, T = 101, 24
SHAPE: dict[str, Any] = dict(d_model=32, num_heads=4, num_kv_heads=2, num_layers=3, d_ff=80, max_seq_len=T)


def thinker(**more: Any) -> Thinker:
    """With weights large enough that what is likely changes from place to place, and norms that are not 1."""
    torch.manual_seed(0)
    model = Thinker(V, **(SHAPE | more)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def tokens_of(rows: int, length: int = T) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


# -- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"tied": True}, {"num_kv_heads": 1, "head_dim": 14, "rope_theta": 1e6},
                                  {"num_kv_heads": 4, "norm_eps": 1e-3}])
def test_transformers_loads_the_folder_with_the_same_logits_and_gradients(more: dict[str, Any], tmp_path: Path) -> None:
    model = thinker(**more)
    reference, tokens = of_transformers(model, tmp_path), tokens_of(2)
    assert type(reference).__name__ == "Qwen3ForCausalLM"
    assert reference.lm_head.weight is reference.model.embed_tokens.weight or not more.get("tied")
    torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)

    model(tokens[:, :-1], tokens[:, 1:]).backward()
    expected = reference(tokens[:, :-1]).logits
    F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    theirs = dict(reference.named_parameters())
    renamed = {name: weight for weight, name in zip(model.parameters(), qwen3_weights(model))}
    assert renamed.keys() == theirs.keys()
    for name, weight in renamed.items():
        torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-3, atol=1e-3, msg=name)


def test_its_autocast_is_that_of_transformers(tmp_path: Path) -> None:
    """In bf16, with norms and softmax in fp32."""
    model, tokens = thinker(), tokens_of(2)
    reference = of_transformers(model, tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(tokens), reference(tokens).logits
        states = model.hidden(tokens)
    assert ours.dtype == torch.bfloat16 and states.dtype == torch.float32
    exact = model(tokens).detach()
    assert float((ours - exact).norm()) < 1.3 * float((theirs - exact).norm()) < 0.1 * float(exact.norm())


def test_greedy_is_that_of_transformers(tmp_path: Path) -> None:
    model, prompt = thinker(num_layers=2), tokens_of(2, 5)
    model.token_embedding.weight.data *= 4  # what is likely depends on the token before
    made = torch.stack(list(generate(model, prompt, Sampling(temperature=0), max_new_tokens=T - 5)), 1)
    assert all(len(row.unique()) > 5 for row in made), "a model that says always the same would prove nothing"
    expected = of_transformers(model, tmp_path).generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=T - 5, eos_token_id=None,
        pad_token_id=0)
    assert torch.equal(made, expected[:, 5:])


# -- a causal language model ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_position_sees_what_comes_after_it() -> None:
    model, tokens = thinker(), tokens_of(2)
    whole = model(tokens)
    for length in (1, 7, 23):
        torch.testing.assert_close(model(tokens[:, :length]), whole[:, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_that_of_the_logits(tied: bool) -> None:
    model = thinker(tied=tied)
    tokens, targets = tokens_of(4).unflatten(0, (2, 2))
    each = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(2, T)
    torch.testing.assert_close(model(tokens, targets), each.sum(), rtol=1e-5, atol=1e-4)
    total, rows = model(tokens, targets, by_row=True)
    torch.testing.assert_close((total, rows), (each.sum(), each.sum(1).detach()), rtol=1e-5, atol=1e-4)


def test_first_loss_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    model, tokens = Thinker(V, **SHAPE), tokens_of(16)
    mean = model(tokens[:8], tokens[8:]).detach() / tokens[8:].numel()
    assert abs(float(mean) - torch.tensor(float(V)).log()) < 0.2


def test_blocks_add_to_the_residual_less_the_more_there_are() -> None:
    torch.manual_seed(0)
    model = Thinker(V, **SHAPE | {"d_model": 256, "d_ff": 512, "num_layers": 8})
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert bool((weight == 1).all()), name
        else:
            adds = name.endswith(("out.weight", "down.weight"))
            assert float(weight.detach().std()) == pytest.approx(0.005 if adds else 0.02, rel=0.1), name


@pytest.mark.parametrize("experts", [None, Experts(4, 2, 16)])
def test_with_zero_init_it_begins_as_its_embedding_and_its_head(experts: Experts | None) -> None:
    """All other weights are those of a network without it, and the zeros learn from the first step on."""
    torch.manual_seed(3)
    usual = Thinker(V, **SHAPE, experts=experts)
    torch.manual_seed(3)
    model, tokens = Thinker(V, **SHAPE, experts=experts, zero_init=True), tokens_of(2)
    hidden = model.token_embedding(tokens)
    expected = hidden / hidden.square().mean(-1, keepdim=True).add(1e-6).sqrt() @ model.head_weight.T
    torch.testing.assert_close(model(tokens), expected)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, usual.state_dict()[name])}
    down = "down" if experts else "down.weight"
    assert changed == {f"blocks.{i}.{name}" for i in range(len(model.blocks))
                       for name in ("attention.out.weight", f"mlp.{down}")}
    model(tokens, tokens).backward()
    assert all(weight.grad.count_nonzero() for name, weight in model.named_parameters() if name in changed)


def test_the_guides_tiny_has_its_size() -> None:
    with torch.device("meta"):
        model = Thinker(32000, d_model=256, num_heads=4, num_kv_heads=2, num_layers=4, d_ff=1024, max_seq_len=512)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 20.3


@pytest.mark.parametrize("wrong", [{"num_kv_heads": 3}, {"num_heads": 2, "head_dim": 15}])
def test_sizes_that_do_not_go_together_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="heads of size"):
        thinker(**wrong)


def test_dropout_is_for_training() -> None:
    model, tokens = thinker(dropout=0.5), tokens_of(2)
    a, b, c, d = (model.train(training)(tokens) for training in (True, True, False, False))
    assert not torch.equal(a, b) and torch.equal(c, d)


# -- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1] * T, [T], [7, 1, 1, 9, 6], [1, 23]])
@pytest.mark.parametrize("heads", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4}])
@torch.no_grad()
def test_logits_are_the_same_with_the_cache(lengths: list[int], heads: dict[str, int]) -> None:
    model, tokens = thinker(**heads), tokens_of(3)
    cache = model.new_cache(T)
    parts = [model(part, cache=cache) for part in tokens.split(lengths, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.length == T and cache.layers[0]._keys.shape == (3, model.blocks[0].attention.num_kv_heads, T, 8)


@pytest.mark.parametrize("how", ["autocast", "converted"])
@torch.no_grad()
def test_the_cache_in_bf16_is_as_exact_as_none(how: str) -> None:
    """Under autocast, and for weights in bf16; to rounding of bf16, which has 8 bits."""
    model, tokens = thinker(), tokens_of(3)
    exact = model(tokens)
    if how == "converted":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        cache, whole = model.new_cache(T), model(tokens)
        cached = torch.cat([model(part, cache=cache) for part in tokens.split([7, 1, 1, 9, 6], 1)], 1)
    assert cache.layers[0]._keys.dtype == cache.layers[0]._values.dtype == torch.bfloat16
    error, of_cached = (float((logits - exact).norm() / exact.norm()) for logits in (whole, cached))
    assert of_cached < 1.3 * error < 0.1


# -- documents ------------------------------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([[3] * 5 + [4] * 1 + [9] * 18, [9] * 24, [0] * 23 + [1], [2] * 12 + [3] * 12])


@torch.no_grad()
def test_documents_are_computed_as_if_each_stood_alone() -> None:
    """Although the positions of the second one do not begin at 0. The second row begins with the number with which the
    first one ends."""
    model, tokens = thinker(), tokens_of(4)
    together = model(tokens, documents=DOCUMENTS)
    for row, numbers in enumerate(DOCUMENTS):
        for number in numbers.unique():
            own = tokens[row, numbers == number]
            torch.testing.assert_close(together[row, numbers == number], model(own[None])[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], model(tokens)[0], atol=0.1)


def test_gradients_within_documents_are_those_of_a_mask() -> None:
    model, tokens = thinker().double(), tokens_of(4)
    model(tokens, documents=DOCUMENTS).square().sum().backward()
    grads = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    allowed = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None]).tril()[:, None]

    def masked(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), allowed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stoker.model.thinker.attend", masked)
        model(tokens).square().sum().backward()
    torch.testing.assert_close(grads, [weight.grad for weight in model.parameters()])


# -- memory and speed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_memory_grows_linearly_with_the_context(packed: bool) -> None:
    """That of all tensors which are kept for the backward pass, and of the largest that is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return made

    def measured(length: int) -> tuple[float, float]:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = tokens_of(1, length)
        documents = (torch.arange(length) // 100)[None] if packed else None
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest() as largest:
            states = model.hidden(tokens, documents=documents)
        with largest:
            states.sum().backward()
        return sum(kept.values()), largest.numbers

    model = thinker(num_layers=1)
    assert measured(2048) == pytest.approx([2 * size for size in measured(1024)], rel=0.05)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as compile_blocks does
def test_blocks_compile_whole() -> None:
    """Without a graph break, and not again for other documents."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, tokens = thinker(num_layers=1), tokens_of(4)
    expected = model(tokens), model(tokens, documents=DOCUMENTS)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    assert torch.equal(model(tokens), expected[0]) and len(graphs) == 1
    assert torch.equal(model(tokens, documents=DOCUMENTS), expected[1])
    count = len(graphs)
    model(tokens, documents=DOCUMENTS.flip(0)), model(tokens, documents=DOCUMENTS[:1].expand(4, -1))
    assert len(graphs) == count
    torch.compiler.reset()


def test_adapters_fit_its_linear_layers(tmp_path: Path) -> None:
    model, tokens = thinker(), tokens_of(2)
    before = model(tokens)
    adapters.add(model, Lora(rank=2, alpha=4.0, layers=("*.attention.*", "*.mlp.*")), "thinker")
    torch.testing.assert_close(model(tokens), before)
    assert {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} == {
        f"blocks.{i}.{layer}" for i in range(3) for layer in (
            "attention.q", "attention.k", "attention.v", "attention.out", "mlp.gate", "mlp.up", "mlp.down")}
    for name, weight in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(weight)
    changed = model(tokens)
    assert not torch.allclose(changed, before, atol=0.1)
    with adapters.merged([model]), torch.no_grad():
        reference = of_transformers(model, tmp_path)
        torch.testing.assert_close(reference(tokens).logits, changed, rtol=1e-4, atol=1e-3)
