"""Folders that transformers writes, read into our GPT."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stoker.config import UserError
from stoker.model.gpt import GPT
from stoker.model.huggingface import gpt2_config, gpt2_options, gpt2_weights, load_gpt2

SIZES = dict(vocab_size=101, n_positions=24, n_embd=32, n_layer=3, n_head=4)


def written(folder: Path, *, headless: bool = False, sizes: dict[str, Any] = SIZES, **how: Any) -> Any:
    """A GPT-2 of transformers, saved in a folder; every tensor differs from its first value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        (model.transformer if headless else model).save_pretrained(folder, **how)
    return model


def loaded(folder: Path) -> GPT:
    model = GPT(101, **gpt2_options(folder)).eval()
    load_gpt2(model, folder)
    return model


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@torch.no_grad()
def assert_same_logits(folder: Path, reference: Any) -> None:
    tokens = torch.randint(101, (2, 24))
    torch.testing.assert_close(loaded(folder)(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"headless": True}, {"max_shard_size": "60KB"},
                                 {"headless": True, "max_shard_size": "60KB"}])
def test_its_logits_are_those_of_transformers(tmp_path: Path, how: dict[str, Any]) -> None:
    """Named with or without `transformer.`, in one file or several."""
    reference = written(tmp_path, **how)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in how)
    assert_same_logits(tmp_path, reference)


def test_old_folders_hold_masks_and_the_head_again(tmp_path: Path) -> None:
    reference = written(tmp_path)

    def as_of_old(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        for i in range(3):
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path, as_of_old)
    assert_same_logits(tmp_path, reference)


def test_out_and_in_again_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = dict(d_model=32, num_heads=4, num_layers=2, d_ff=72, max_seq_len=16)
    model = GPT(101, **sizes)
    safetensors.torch.save_file(gpt2_weights(model), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(gpt2_config(model, 100)))
    assert gpt2_options(tmp_path) == sizes
    again = loaded(tmp_path).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("change, why", [
    (lambda t: t.pop("transformer.h.1.ln_1.weight"), r"h.1.ln_1.weight is missing there and \(32,\) here"),
    (lambda t: t.update(more=torch.zeros(3)), r"more is \(3,\) there and missing here"),
    (lambda t: t.update({"transformer.wte.weight": torch.zeros(128, 32)}), r"wte.weight is \(128, 32\) there and"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(101, 32)}), "head is not tied"),
])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: Any, why: str) -> None:
    written(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=why):
        loaded(tmp_path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        loaded(tmp_path)


@pytest.mark.parametrize("changed, why", [
    ({"model_type": "llama"}, "model_type llama"), ({"activation_function": "relu"}, "activation_function relu"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"), ({"n_embd": None}, "describes no GPT-2"),
])
def test_other_models_are_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    written(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=why):
        gpt2_options(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="describes no GPT-2 .*RecursionError"):
        gpt2_options(tmp_path)
