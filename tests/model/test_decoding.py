"""Decoding: the cache changes nothing, greedy is transformers' greedy, and what is drawn has the right odds."""

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from stoker.model.decoding import Sampling, generate
from stoker.model.gpt import GPT
from stoker.model.huggingface import gpt2_config, gpt2_weights

SIZE, VOCABULARY = 24, 101
GREEDY = Sampling(temperature=0)


@pytest.fixture
def model() -> GPT:
    """With weights large enough that what is likely changes from place to place."""
    torch.manual_seed(0)
    model = GPT(VOCABULARY, d_model=32, num_heads=4, num_layers=3, d_ff=80, max_seq_len=SIZE, dropout=0.5)
    for parameter in model.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return model.eval()


def together(model: GPT, prompt: Tensor, sampling: Sampling = GREEDY, *, count: int = 12, stop: int | None = None,
             seed: int = 0) -> Tensor:
    """(B, T) -> (B, N), what was generated."""
    generator = torch.Generator().manual_seed(seed)
    made = generate(model, prompt, sampling, max_new_tokens=count, stop=stop, generator=generator)
    return torch.stack(list(made), 1)


# -- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1] * SIZE, [SIZE], [7, 1, 1, 9, 6], [1, 23]])
@torch.no_grad()
def test_logits_are_the_same_with_the_cache(model: GPT, lengths: list[int]) -> None:
    tokens, cache = torch.randint(VOCABULARY, (3, SIZE)), model.new_cache(SIZE)
    parts = [model(part, cache=cache) for part in tokens.split(lengths, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.length == SIZE


@torch.no_grad()
def test_rows_of_a_batch_and_what_comes_later_do_not_matter(model: GPT) -> None:
    tokens = torch.randint(VOCABULARY, (3, SIZE))
    other = tokens.clone()
    other[1], other[:, 20:] = (tokens[1] + 1) % VOCABULARY, (tokens[:, 20:] + 1) % VOCABULARY

    def logits(given: Tensor) -> Tensor:
        cache = model.new_cache(SIZE)
        return torch.cat([model(part, cache=cache) for part in given.split([15, 9], 1)], 1)

    a, b = logits(tokens), logits(other)
    torch.testing.assert_close(a[[0, 2], :20], b[[0, 2], :20], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a[1], b[1]) and not torch.allclose(a[0, 20:], b[0, 20:])


def test_decoding_compiles_nothing(model: GPT) -> None:
    """Blocks compiled for training would be compiled anew for each length of the cache."""
    def backend(graph: object, inputs: object) -> None:
        raise AssertionError("compiled")

    for block in model.blocks:
        block.compile(backend=backend)
    assert together(model, torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 12)


# -- greedy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    safetensors.torch.save_file(gpt2_weights(model), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(gpt2_config(model, VOCABULARY - 1)))
    return tmp_path


def test_greedy_is_that_of_transformers(model: GPT, folder: Path) -> None:
    """Two prompts at once, of which one comes to the end-of-text earlier."""
    prompt = torch.randint(VOCABULARY, (2, 5))
    free = together(model, prompt, count=SIZE - 5)
    assert all(len(row.unique()) > 5 for row in free), "a model that says always the same would prove nothing"
    stop = next(int(token) for token in free[0, 3:] if token not in free[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        from transformers import GPT2LMHeadModel

        reference = GPT2LMHeadModel.from_pretrained(folder).eval()
        for end in (None, stop):
            expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                          max_new_tokens=SIZE - 5, eos_token_id=end, pad_token_id=end or 0)
            assert torch.equal(together(model, prompt, count=SIZE - 5, stop=end), expected[:, 5:])


def test_it_ends_when_all_rows_have_ended(model: GPT) -> None:
    prompt = torch.randint(VOCABULARY, (1, 5))
    free = together(model, prompt)
    stop = int(free[0, 4])
    first = free[0].tolist().index(stop)
    assert torch.equal(together(model, prompt, stop=stop), free[:, :first + 1])


@pytest.mark.parametrize("length", [1, 5, SIZE, 3 * SIZE])
@torch.no_grad()
def test_a_full_context_goes_on_with_its_newer_half(model: GPT, length: int) -> None:
    prompt = torch.randint(VOCABULARY, (2, length))
    context, made = prompt[:, -SIZE:], []
    for _ in range(4 * SIZE):
        if context.shape[1] > SIZE:
            context = context[:, -SIZE // 2:]
        made.append(model(context)[:, -1].argmax(-1))
        context = torch.cat([context, made[-1][:, None]], 1)
    assert torch.equal(together(model, prompt, count=4 * SIZE), torch.stack(made, 1))


# -- drawn ----------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.5, 0.5, -3.0, 1.0, 0.2])
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}  # of any table
WAYS = [Sampling(), Sampling(temperature=0.7), Sampling(top_k=3), Sampling(top_p=0.6), Sampling(1.3, 6, 0.8)]


def reference(sampling: Sampling, logits: Tensor) -> Tensor:
    """Probabilities (B, V) as transformers has them."""
    from transformers import generation

    empty = torch.zeros(len(logits), 0)
    logits = generation.TemperatureLogitsWarper(float(sampling.temperature))(empty, logits)
    if sampling.top_k:
        logits = generation.TopKLogitsWarper(sampling.top_k)(empty, logits)
    return generation.TopPLogitsWarper(sampling.top_p)(empty, logits).softmax(-1)


@pytest.mark.parametrize("sampling", WAYS)
def test_odds_are_those_of_transformers(sampling: Sampling) -> None:
    logits = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    weights, tokens = sampling.candidates(logits)
    odds = torch.zeros_like(logits).scatter(1, tokens, weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(odds, reference(sampling, logits))


@pytest.mark.parametrize("sampling", WAYS)
def test_tokens_are_drawn_by_these_odds(sampling: Sampling) -> None:
    """Chi-square, with a chance of 1 in 1,000 to fail for another seed; and nothing outside the allowed set."""
    count, odds = 40_000, reference(sampling, LOGITS[None])[0]
    drawn = sampling.choose(LOGITS.expand(count, -1), torch.Generator().manual_seed(0))
    seen, allowed = drawn.bincount(minlength=len(odds)), odds > 0
    assert not seen[~allowed].any()
    expected = count * odds[allowed]
    distance = ((seen[allowed] - expected).square() / expected).sum()
    assert distance < CHI_SQUARE_999[int(allowed.sum()) - 1]


def test_the_likeliest_token_is_left_by_the_narrowest_choice() -> None:
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-38), Sampling(temperature=0)):
        assert set(sampling.choose(LOGITS.expand(100, -1)).tolist()) == {1}


def test_a_seed_gives_the_same_text_and_leaves_the_global_randomness_alone(model: GPT) -> None:
    prompt, before = torch.zeros(2, 4, dtype=torch.int64), torch.get_rng_state()
    a, b, c = (together(model, prompt, Sampling(), count=40, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
