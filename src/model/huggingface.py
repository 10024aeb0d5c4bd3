"""Our GPT as a Hugging Face model folder, and its names there."""

from typing import Any

from torch import Tensor

from model.gpt import GPT, Block

NAMES = {
    "token_embedding.": "wte.", "position_embedding.": "wpe.", "final_norm.": "ln_f.", "blocks.": "h.",
    ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".attention.qkv.": ".attn.c_attn.", ".attention.out.": ".attn.c_proj.",
    ".mlp.up.": ".mlp.c_fc.", ".mlp.down.": ".mlp.c_proj.",
}


def gpt2_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under `GPT2LMHeadModel`'s names. Its Conv1D keeps matrices transposed; the tied head is left out."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        is_conv1d = ".c_" in name and name.endswith("weight")
        weights[f"transformer.{name}"] = (tensor.T if is_conv1d else tensor).contiguous().cpu()
    return weights


def gpt2_config(model: GPT, end_of_text: int) -> dict[str, Any]:
    """The content of config.json."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    vocab_size, d_model = model.token_embedding.weight.shape
    dropout = model.dropout.p
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": vocab_size, "n_positions": model.position_embedding.num_embeddings, "n_embd": d_model,
        "n_layer": len(model.blocks), "n_head": block.attention.num_heads, "n_inner": block.mlp.up.out_features,
        "layer_norm_epsilon": model.final_norm.eps, "resid_pdrop": dropout, "embd_pdrop": dropout,
        "attn_pdrop": dropout, "bos_token_id": end_of_text, "eos_token_id": end_of_text, "tie_word_embeddings": True,
        "dtype": "float32",
    }
