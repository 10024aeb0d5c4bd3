"""Our thinker as a Hugging Face model folder of Qwen3 or Qwen3-MoE, out and in. Needs no torch but for weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.config import UserError
from stoker.model.huggingface import read_tensors
from stoker.model.names import Row, Table

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.model.thinker import Thinker

# Of Qwen3ForCausalLM and Qwen3MoeForCausalLM, without `model.`. The weights of all experts of a layer are one tensor of
# ours, and a tensor for each expert, `experts.0.gate_proj.weight` and so on, of theirs: `_split` and `_stacked`.
NAMES = Table((
    Row("token_embedding.weight", "embed_tokens.weight"),
    Row("final_norm.weight", "norm.weight"),
    Row("head", "lm_head.weight"),
    Row("blocks.*.norm1.weight", "layers.*.input_layernorm.weight"),
    Row("blocks.*.norm2.weight", "layers.*.post_attention_layernorm.weight"),
    Row("blocks.*.attention.q.weight", "layers.*.self_attn.q_proj.weight"),
    Row("blocks.*.attention.k.weight", "layers.*.self_attn.k_proj.weight"),
    Row("blocks.*.attention.v.weight", "layers.*.self_attn.v_proj.weight"),
    Row("blocks.*.attention.out.weight", "layers.*.self_attn.o_proj.weight"),
    Row("blocks.*.attention.q_norm.weight", "layers.*.self_attn.q_norm.weight"),
    Row("blocks.*.attention.k_norm.weight", "layers.*.self_attn.k_norm.weight"),
    Row("blocks.*.mlp.gate.weight", "layers.*.mlp.gate_proj.weight"),
    Row("blocks.*.mlp.up.weight", "layers.*.mlp.up_proj.weight"),
    Row("blocks.*.mlp.down.weight", "layers.*.mlp.down_proj.weight"),
    Row("blocks.*.mlp.router.weight", "layers.*.mlp.gate.weight"),
    Row("blocks.*.mlp.gate", "layers.*.mlp.experts.gate_proj.weight"),
    Row("blocks.*.mlp.up", "layers.*.mlp.experts.up_proj.weight"),
    Row("blocks.*.mlp.down", "layers.*.mlp.experts.down_proj.weight"),
))
# What a config.json may leave out, and means then; our thinker is nothing else.
SUPPORTED: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "quantization_config": None,
}
SUPPORTED_OF_EXPERTS: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
LEFT_OUT_MEANS: dict[str, Any] = {"norm_topk_prob": False}  # where that is not what ours is


# -- out ------------------------------------------------------------------------------------------------------------


def qwen3_weights(model: "Thinker") -> "dict[str, Tensor]":
    """The weights under the names of `Qwen3ForCausalLM`, or of `Qwen3MoeForCausalLM`; a tied head is left out."""
    renamed = dict(NAMES.to_theirs(name, weight.detach()) for name, weight in model.named_parameters())
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor.contiguous().cpu()
            for name, tensor in _split(renamed).items()}


def qwen3_config(model: "Thinker", end_of_text: int) -> dict[str, Any]:
    """The content of config.json."""
    attention: Any = model.blocks[0].attention
    vocab_size, d_model = model.token_embedding.weight.shape
    kind: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if experts := model.experts:
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts.count,
                "num_experts_per_tok": experts.per_token, "moe_intermediate_size": experts.d_ff,
                **SUPPORTED_OF_EXPERTS}
    return {
        **kind, "vocab_size": vocab_size, "hidden_size": d_model, "intermediate_size": model.d_ff,
        "num_hidden_layers": len(model.blocks), "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads, "head_dim": model.head_dim, "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len, "rms_norm_eps": model.final_norm.eps,
        "rope_theta": model.rope_theta, "rope_scaling": None, "tie_word_embeddings": model.head is None,
        "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None,
        "bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": "float32",
    }


def _split(theirs: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The stacked weights of experts (E, ...) as a tensor for each expert."""
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        before, experts, after = name.partition(".experts.")
        each = {f"{before}.experts.{i}.{after}": part for i, part in enumerate(tensor)} if experts else {name: tensor}
        found |= each
    return found


# -- in -------------------------------------------------------------------------------------------------------------


def qwen3_options(folder: Path) -> dict[str, Any]:
    """The sizes of the thinker that a folder's config.json describes, as keyword arguments of `Thinker`, but with
    `num_experts`, `experts_per_token` and `expert_d_ff` (0 where there are no experts) in place of `experts`. Raises
    UserError where it is another model."""
    path = folder / "config.json"
    try:
        content = dict(json.loads(path.read_text()))
        if different := _unsupported(content):
            raise UserError(f"{path} describes another model than the Qwen3 trained here: {', '.join(different)}")
        return _options(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} describes no Qwen3 ({error!r})") from error


def _unsupported(content: Mapping[str, Any]) -> list[str]:
    model, rope = content.get("model_type"), _rope(content)
    expected = SUPPORTED | (SUPPORTED_OF_EXPERTS if model == "qwen3_moe" else {})
    found = [] if model in ("qwen3", "qwen3_moe") else [f"model_type {model}"]
    for name, value in expected.items():
        there = content.get(name, LEFT_OUT_MEANS.get(name, value))
        if (there or None) != (value or None):  # null and [] mean false too
            found.append(f"{name} {there}")
    found += [f"{name} {rope[name]}" for name in ("rope_type", "type", "partial_rotary_factor")
              if rope.get(name) not in (None, "default", 1)]
    found += [f"layer_types {kind}" for kind in set(content.get("layer_types") or ()) - {"full_attention"}]
    return found


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    def size(name: str) -> int:
        if type(content[name]) is not int or content[name] < 1:
            raise ValueError(f"{name} {content[name]}")
        return int(content[name])

    experts, head_dim = {"num_experts": 0, "experts_per_token": 0, "expert_d_ff": 0}, 128  # transformers' own default
    if content["model_type"] == "qwen3_moe":
        head_dim = size("hidden_size") // size("num_attention_heads")
        count = "num_experts" if "num_experts" in content else "num_local_experts"
        experts = {"num_experts": size(count), "experts_per_token": size("num_experts_per_tok"),
                   "expert_d_ff": size("moe_intermediate_size")}
    return {
        "vocab_size": size("vocab_size"), "d_model": size("hidden_size"), "num_heads": size("num_attention_heads"),
        "num_kv_heads": size("num_key_value_heads"), "num_layers": size("num_hidden_layers"),
        "d_ff": size("intermediate_size"), "max_seq_len": size("max_position_embeddings"),
        "head_dim": size("head_dim") if "head_dim" in content else head_dim,
        "rope_theta": float(_rope(content).get("rope_theta") or content.get("rope_theta") or 10000.0),
        "norm_eps": float(content.get("rms_norm_eps", 1e-6)), "tied": bool(content.get("tie_word_embeddings")),
        **experts,
    }


def _rope(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the rotary positions, where releases of transformers before and since 5 write them."""
    return content.get("rope_parameters") or content.get("rope_scaling") or {}


def load_qwen3(model: "Thinker", folder: Path) -> None:
    """Fill the model from a folder's safetensors, named with or without `model.`.

    Raises UserError where a tensor is missing, too many, or of another shape.
    """
    import torch

    theirs = _stacked(read_tensors(folder, "model."), folder)
    embedding = theirs.get("embed_tokens.weight")
    if model.head is None and embedding is not None and "lm_head.weight" in theirs:
        if not torch.equal(theirs.pop("lm_head.weight"), embedding):
            raise UserError(f"{folder}: its head is not tied to the token embedding, as its config.json says")
    weights = NAMES.converted(theirs, dict(model.named_parameters()), folder)
    model.load_state_dict(weights, strict=False)  # they are complete; the load of experts is no weight


def _stacked(theirs: "Mapping[str, Tensor]", folder: Path) -> "dict[str, Tensor]":
    """The weights of each expert as one tensor of all (E, ...)."""
    import torch

    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in theirs.items():
        if match := re.fullmatch(r"(.+\.experts\.)(\d+)\.(.+)", name):
            stacks.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    for name, experts in stacks.items():
        if sorted(experts) != list(range(len(experts))) or len({tensor.shape for tensor in experts.values()}) > 1:
            raise UserError(f"{folder} does not fit: {name} of expert {min(experts)} to {max(experts)} is missing for "
                            "one, or has different shapes")
        found[name] = torch.stack([experts[i] for i in range(len(experts))])
    return found
