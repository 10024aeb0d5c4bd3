"""Our GPT as a Hugging Face model folder, out and in again. Needs no torch but for weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.config import UserError
from stoker.model.names import Row, Table

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.model.gpt import GPT

# Of GPT2LMHeadModel, without `transformer.`. Its Conv1D keeps matrices transposed; old folders hold causal masks.
NAMES = Table((
    Row("token_embedding.weight", "wte.weight"),
    Row("position_embedding.weight", "wpe.weight"),
    Row("final_norm.*", "ln_f.*"),
    Row("blocks.*.norm1.*", "h.*.ln_1.*"),
    Row("blocks.*.norm2.*", "h.*.ln_2.*"),
    Row("blocks.*.attention.qkv.*", "h.*.attn.c_attn.*", transposed=True),
    Row("blocks.*.attention.out.*", "h.*.attn.c_proj.*", transposed=True),
    Row("blocks.*.mlp.up.*", "h.*.mlp.c_fc.*", transposed=True),
    Row("blocks.*.mlp.down.*", "h.*.mlp.c_proj.*", transposed=True),
), unused=("h.*.attn.bias", "h.*.attn.masked_bias"))
# What a config.json may leave out, and means then; our GPT is nothing else.
SUPPORTED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}


# -- out ------------------------------------------------------------------------------------------------------------


def gpt2_weights(model: "GPT") -> "dict[str, Tensor]":
    """The weights under `GPT2LMHeadModel`'s names; the tied head is left out."""
    renamed = (NAMES.to_theirs(name, tensor) for name, tensor in model.state_dict().items())
    return {f"transformer.{name}": tensor.contiguous().cpu() for name, tensor in renamed}


def gpt2_config(model: "GPT", end_of_text: int) -> dict[str, Any]:
    """The content of config.json."""
    block: Any = model.blocks[0]
    vocab_size, d_model = model.token_embedding.weight.shape
    dropout = model.dropout.p
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": vocab_size, "n_positions": model.max_seq_len, "n_embd": d_model,
        "n_layer": len(model.blocks), "n_head": block.attention.num_heads, "n_inner": block.mlp.up.out_features,
        "layer_norm_epsilon": model.final_norm.eps, "resid_pdrop": dropout, "embd_pdrop": dropout,
        "attn_pdrop": dropout, "bos_token_id": end_of_text, "eos_token_id": end_of_text, "tie_word_embeddings": True,
        "dtype": "float32",
    }


# -- in -------------------------------------------------------------------------------------------------------------


def gpt2_options(folder: Path) -> dict[str, int]:
    """The sizes of the GPT that a folder's config.json describes. Raises UserError where it is another model."""
    path = folder / "config.json"
    try:
        content = dict(json.loads(path.read_text()))
        if different := [f"{name} {content[name]}" for name, value in SUPPORTED.items()
                         if content.get(name, value) != value]:
            raise UserError(f"{path} describes another model than the GPT-2 trained here: {', '.join(different)}")
        return {"d_model": content["n_embd"], "num_heads": content["n_head"], "num_layers": content["n_layer"],
                "d_ff": content.get("n_inner") or 4 * content["n_embd"], "max_seq_len": content["n_positions"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} describes no GPT-2 ({error!r})") from error


def load_gpt2(model: "GPT", folder: Path) -> None:
    """Fill the model from a folder's safetensors, named with or without `transformer.`.

    Raises UserError where a tensor is missing, too many, or of another shape.
    """
    import torch

    theirs = read_tensors(folder, "transformer.")
    head = theirs.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in theirs and not torch.equal(head, theirs["wte.weight"]):
        raise UserError(f"{folder}: its head is not tied to the token embedding, that of this GPT is")
    model.load_state_dict(NAMES.converted(theirs, model.state_dict(), folder))


def read_tensors(folder: Path, prefix: str) -> "dict[str, Tensor]":
    """The tensors of all safetensors of a folder, without the prefix where a name has it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
