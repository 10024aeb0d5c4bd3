"""Our GPT against transformers' GPT-2, and the properties of a causal language model."""

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stoker.model.gpt import GPT
from stoker.model.huggingface import gpt2_config, gpt2_weights
from stoker.training.core.stage import discover

SHAPE = dict(d_model=32, num_heads=4, num_layers=3, d_ff=80, max_seq_len=24)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(101, **SHAPE).eval()


def test_transformers_loads_the_folder_with_the_same_logits(model: GPT, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        from transformers import GPT2LMHeadModel

        for parameter in model.parameters():  # biases and gains that differ from their first values
            parameter.data += 0.1 * torch.randn_like(parameter)
        safetensors.torch.save_file(gpt2_weights(model), tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(gpt2_config(model, 100)))
        reference, told = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"] and set(told["missing_keys"]) <= {"lm_head.weight"}
    tokens = torch.randint(101, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_no_position_sees_what_comes_after_it(model: GPT) -> None:
    tokens = torch.randint(101, (2, 24))
    with torch.no_grad():
        whole = model(tokens)
        for length in (1, 7, 23):
            torch.testing.assert_close(model(tokens[:, :length]), whole[:, :length], rtol=1e-5, atol=1e-5)


def test_loss_is_that_of_the_logits(model: GPT) -> None:
    tokens, targets = torch.randint(101, (2, 2, 24))
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-5, atol=1e-4)


def test_first_loss_is_that_of_guessing(model: GPT) -> None:
    tokens, targets = torch.randint(101, (2, 8, 24))
    mean = model(tokens, targets).detach() / targets.numel()
    assert abs(float(mean) - torch.tensor(101.0).log()) < 0.2


@pytest.mark.parametrize("preset, millions", [("tiny", 16.1), ("small", 44.9), ("medium", 124.4)])
def test_presets_have_the_published_sizes(preset: str, millions: float) -> None:
    """With GPT-2's 50,257 pieces and the head tied; 124.4 M is GPT-2 itself."""
    stage = discover()["lm"]
    cfg = stage.Config(**stage.presets[preset])
    with torch.device("meta"):
        model = GPT(50257, d_model=cfg.d_model, num_heads=cfg.num_heads, num_layers=cfg.num_layers, d_ff=cfg.d_ff,
                    max_seq_len=cfg.max_seq_len)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
