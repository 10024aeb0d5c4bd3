"""A thinker as transformers loads it."""

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch

from stoker.model.qwen3 import qwen3_config, qwen3_weights
from stoker.model.thinker import Thinker


def of_transformers(model: Thinker, folder: Path) -> Any:
    """The folder that is exported, as transformers loads it."""
    safetensors.torch.save_file(qwen3_weights(model), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(qwen3_config(model, model.token_embedding.num_embeddings - 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        from transformers import AutoModelForCausalLM

        reference, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"] and not found["mismatched_keys"]
    assert type(reference).__name__ == ("Qwen3MoeForCausalLM" if model.experts else "Qwen3ForCausalLM")
    return reference.eval()
