"""Folders of Qwen3 and Qwen3-MoE that transformers writes, read into our thinker."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stoker.config import UserError
from stoker.model.experts import Experts
from stoker.model.qwen3 import load_qwen3, qwen3_config, qwen3_options, qwen3_weights
from stoker.model.thinker import Thinker

SIZES: dict[str, Any] = dict(
    vocab_size=101, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=24, bos_token_id=0, eos_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6})
MOE: dict[str, Any] = dict(num_experts=12, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)


def written(folder: Path, *, headless: bool = False, how: dict[str, Any] = {},
            **sizes: Any) -> Any:
    """A Qwen3 of transformers, saved in a folder; every tensor differs from its first value, and can be
    written in bf16 exactly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

        torch.manual_seed(0)
        model = (Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | sizes)) if "num_experts" in sizes
                 else Qwen3ForCausalLM(Qwen3Config(**SIZES | sizes))).eval()
        for parameter in model.parameters():
            parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).bfloat16().float()
        (model.model if headless else model).save_pretrained(folder, **how)
    return model


def built(options: dict[str, Any]) -> Thinker:
    options = dict(options)
    count, per_token, d_ff = (options.pop(name) for name in ("num_experts", "experts_per_token", "expert_d_ff"))
    return Thinker(**options, experts=Experts(count, per_token, d_ff) if count else None).eval()


def loaded(folder: Path) -> Thinker:
    model = built(qwen3_options(folder))
    load_qwen3(model, folder)
    return model


@torch.no_grad()
def assert_same_logits(folder: Path, reference: Any) -> None:
    tokens = torch.randint(101, (2, 24))
    torch.testing.assert_close(loaded(folder)(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [{}, MOE, {"tie_word_embeddings": True}, MOE | {"tie_word_embeddings": True},
                                   {"rope_parameters": None, "rms_norm_eps": 1e-3}])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "30KB"}])
def test_its_logits_are_those_of_transformers(tmp_path: Path, sizes: dict[str, Any], how: dict[str, Any]) -> None:
    """In one file or several, with a head of its own or none."""
    reference = written(tmp_path, how=how, **sizes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in how)
    assert_same_logits(tmp_path, reference)


def test_weights_in_bf16_and_without_prefix(tmp_path: Path) -> None:
    """A folder of the model without its head, which is tied; read into a model in fp32."""
    reference, path = written(tmp_path, headless=True, tie_word_embeddings=True), tmp_path / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in safetensors.torch.load_file(path).items()}
    assert "embed_tokens.weight" in tensors
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert_same_logits(tmp_path, reference)
    assert {weight.dtype for weight in loaded(tmp_path).parameters()} == {torch.float32}


def test_the_config_of_the_hub_is_read(tmp_path: Path) -> None:
    """As released for transformers 4, where rope_theta stands beside the others; and with a head, though tied."""
    reference = written(tmp_path, tie_word_embeddings=True)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    content = json.loads(path.read_text())
    del content["rope_parameters"], content["layer_types"]
    path.write_text(json.dumps(content | {"rope_theta": 1000000, "rope_scaling": None, "sliding_window": None}))
    tensors = safetensors.torch.load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    assert qwen3_options(tmp_path)["rope_theta"] == 1e6
    assert_same_logits(tmp_path, reference)
    tensors["lm_head.weight"] += 1
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="head is not tied"):
        loaded(tmp_path)


@pytest.mark.parametrize("experts", [{"num_experts": 0, "experts_per_token": 0, "expert_d_ff": 0},
                                     {"num_experts": 4, "experts_per_token": 2, "expert_d_ff": 24}])
@pytest.mark.parametrize("tied", [True, False])
def test_out_and_in_again_is_the_same(tmp_path: Path, experts: dict[str, int], tied: bool) -> None:
    options = dict(vocab_size=101, d_model=32, num_heads=4, num_kv_heads=2, num_layers=2, d_ff=72, max_seq_len=16,
                   head_dim=6, rope_theta=5000.0, norm_eps=1e-5, tied=tied) | experts
    torch.manual_seed(1)
    model = built(options)
    safetensors.torch.save_file(qwen3_weights(model), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(qwen3_config(model, 100)))
    assert qwen3_options(tmp_path) == options
    again = loaded(tmp_path).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("sizes, change, why", [
    ({}, lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"),
     r"layers.1.self_attn.k_norm.weight is missing there and \(16,\) here"),
    ({}, lambda t: t.pop("lm_head.weight"), r"lm_head.weight is missing there"),
    ({}, lambda t: t.update(more=torch.zeros(3)), r"more is \(3,\) there and missing here"),
    ({}, lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"norm.weight is \(33,\) there and \(32,\) here"),
    (MOE, lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"), "of expert 0 to 11 is missing for one"),
    (MOE, lambda t: t.pop("model.layers.1.mlp.experts.11.up_proj.weight"),
     r"layers.1.mlp.experts.up_proj.weight is \(11, 24, 32\) there and \(12, 24, 32\) here"),
    (MOE, lambda t: t.update({"model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(1, 2)}), "different shapes"),
])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, sizes: dict[str, Any], change: Any, why: str) -> None:
    written(tmp_path, **sizes)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=why):
        loaded(tmp_path)


@pytest.mark.parametrize("changed, why", [
    ({"model_type": "qwen2"}, "model_type qwen2"), ({"hidden_act": "gelu"}, "hidden_act gelu"),
    ({"attention_bias": True}, "attention_bias True"), ({"use_sliding_window": True}, "use_sliding_window True"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "type linear"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
    ({"model_type": "qwen3_moe", **MOE, "norm_topk_prob": False}, "norm_topk_prob False"),
    ({"model_type": "qwen3_moe", **{name: MOE[name] for name in MOE if name != "norm_topk_prob"}}, "norm_topk_prob"),
    ({"model_type": "qwen3_moe", **MOE, "mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
    ({"model_type": "qwen3_moe", **MOE, "decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ({"hidden_size": None}, "describes no Qwen3 .*hidden_size None"), ({"head_dim": "a"}, "describes no Qwen3"),
    ({"num_key_value_heads": 0}, "describes no Qwen3 .*num_key_value_heads 0"),
])
def test_other_models_are_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3", **SIZES} | changed))
    with pytest.raises(UserError, match=why):
        qwen3_options(tmp_path)


def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3MoeConfig

    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                            "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}
    for model, config, more in (("qwen3", Qwen3Config, {}), ("qwen3_moe", Qwen3MoeConfig, MOE)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model, **sizes, **more}))
        options, theirs = qwen3_options(tmp_path), config(**sizes, **more)
        assert options["head_dim"] == getattr(theirs, "head_dim", 32 // 4)
        assert options["norm_eps"] == theirs.rms_norm_eps and options["tied"] == theirs.tie_word_embeddings
        assert options["rope_theta"] == theirs.rope_parameters["rope_theta"]
        assert options["num_experts"] == getattr(theirs, "num_experts", 0)


def test_no_json_is_refused(tmp_path: Path) -> None:
    for text in ("", "[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="describes no Qwen3"):
            qwen3_options(tmp_path)
