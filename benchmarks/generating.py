"""How fast a thinker generates text, compared with transformers and the same weights, on the CPU.

    python benchmarks/generating.py [PRESET ...]

Presets of the thinker (default: tiny small) with random weights: 64 tokens of one text after a prompt of 16 random
tokens, with top-k 50; with weights in fp32, in fp16, and by `generate` of transformers, in turn, medians of five.
Every token reads all weights from memory, so on a machine that other programs use the figures mean little.
"""

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rig
import torch

from stoker import files, wheels
from stoker.model import half_weights
from stoker.model.decoding import Sampling, generate
from stoker.model.qwen3 import qwen3_config, qwen3_weights
from stoker.training.train_text import Thinker

PROMPT, MADE, TOP_K = 16, 64, 50


def ours(model: Any, prompt: torch.Tensor) -> None:
    made = generate(model, prompt, Sampling(1.0, TOP_K), max_new_tokens=MADE,
                    generator=torch.Generator().manual_seed(0))
    assert len(list(made)) == MADE


def theirs(model: Any, prompt: torch.Tensor) -> None:
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=TOP_K,
                          min_new_tokens=MADE, max_new_tokens=MADE, use_cache=True)
    assert made.shape[1] == PROMPT + MADE


def of_transformers(model: Any, folder: Path) -> Any:
    """The model, exported to `folder` and loaded by transformers."""
    import safetensors.torch

    wheels.torchvision(), wheels.torchaudio()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    files.write(folder / "model.safetensors", safetensors.torch.save(qwen3_weights(model), {"format": "pt"}))
    files.write_json(folder / "config.json", qwen3_config(model, 0))
    library: Any = AutoModelForCausalLM.from_pretrained(folder)
    return library.eval()


def row(preset: str) -> str:
    """A line of the table: tokens a second in each way, and how many times those of transformers that is."""
    options: Any = {**vars(Thinker.Config()), **Thinker.presets[preset]}
    stage = rig.RandomThinker(Thinker.Config(**options), Path())
    stage.prepare()
    model, prompt = stage.model().eval(), torch.randint(stage.vocabulary, (1, PROMPT))
    with TemporaryDirectory() as folder:
        library = of_transformers(model, Path(folder))
    made = {"as they are": partial(ours, model, prompt), "transformers": partial(theirs, library, prompt)}
    if half_weights.supported(torch.device("cpu")):
        in_half: Any = stage.model().eval()
        in_half.load_state_dict(model.state_dict())
        half_weights.hold_in_half(in_half)
        made["fp16"] = partial(ours, in_half, prompt)
    seconds = rig.median_seconds(made, rounds=5)
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    return f"{preset:7s} {count:6.1f} M   " + "   ".join(
        f"{name} {MADE / taken:5.0f} tokens/s ({seconds['transformers'] / taken:.2f} x)"
        for name, taken in seconds.items())


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("presets", nargs="*", default=["tiny", "small"], metavar="PRESET")
    print(f"{torch.get_num_threads()} threads; ratios to transformers")
    for preset in asked.parse_args().presets:
        print(row(preset), flush=True)


if __name__ == "__main__":
    main()
