"""Our GPT as a Hugging Face model folder, out and in again. Needs no torch but for weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.model.gpt import GPT

NAMES = {
    "token_embedding.": "wte.", "position_embedding.": "wpe.", "final_norm.": "ln_f.", "blocks.": "h.",
    ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".attention.qkv.": ".attn.c_attn.", ".attention.out.": ".attn.c_proj.",
    ".mlp.up.": ".mlp.c_fc.", ".mlp.down.": ".mlp.c_proj.",
}
# What a config.json may leave out, and means then; our GPT is nothing else.
SUPPORTED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}


# -- out ------------------------------------------------------------------------------------------------------------


def gpt2_weights(model: "GPT") -> "dict[str, Tensor]":
    """The weights under `GPT2LMHeadModel`'s names. Its Conv1D keeps matrices transposed; the tied head is left out."""
    return {f"transformer.{_their_name(name)}": _turned(name, tensor).contiguous().cpu()
            for name, tensor in model.state_dict().items()}


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

    theirs = _read(folder)
    head = theirs.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in theirs and not torch.equal(head, theirs["wte.weight"]):
        raise UserError(f"{folder}: its head is not tied to the token embedding, that of this GPT is")
    expected = {_their_name(name): _turned(name, tensor).shape for name, tensor in model.state_dict().items()}
    different = [name for name in expected | theirs
                 if name not in theirs or name not in expected or theirs[name].shape != expected[name]]
    if different:
        there, here = (tuple(shapes[different[0]]) if different[0] in shapes else "missing"
                       for shapes in ({name: tensor.shape for name, tensor in theirs.items()}, expected))
        raise UserError(f"{folder} does not fit: {different[0]} is {there} there and {here} here, and so for "
                        f"{len(different)} of {len(expected | theirs)} tensors")
    model.load_state_dict({name: _turned(name, theirs[_their_name(name)]) for name in model.state_dict()})


def _read(folder: Path) -> "dict[str, Tensor]":
    """The tensors of all safetensors of a folder, without the prefix, and without the causal masks of old ones."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
            if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def _their_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _turned(name: str, tensor: "Tensor") -> "Tensor":
    """A Conv1D keeps its matrix transposed."""
    return tensor.T if ".c_" in _their_name(name) and name.endswith("weight") else tensor
