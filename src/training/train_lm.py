"""Language model of text: GPT-2, next token."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker import files
from stoker.config import opt
from stoker.training.core.figures import Goal
from stoker.training.core.options import Options
from stoker.training.stages.sizes import Transformer, preset, sizes_of
from stoker.training.stages.text import LanguageModelling, Text, tokenizer_option

if TYPE_CHECKING:
    from torch import nn

    from stoker.training.core.pretrained import Pretrained

SHAPE = ("d_model", "num_heads", "num_layers", "d_ff", "max_seq_len")
PERPLEXITIES = {"tiny": 100.0, "small": 60.0, "medium": 40.0}  # that models of these sizes are to reach on WikiText


@dataclass
class Architecture(Transformer, d_model=256, num_heads=4, num_layers=4, d_ff=512, dropout=0.1, head_multiple=1):
    """Model"""

    max_seq_len: int = opt(256, "context length, in tokens", ge=2, usual=(128, 2048),
                           aliases=("block_size", "ctx_len"))


@dataclass
class Config(Options, Architecture, Text):
    """The language model's options."""


class LanguageModel(LanguageModelling[Config]):
    """Trains a GPT-2 style language model on text, in the foreground. (./run/run_train_lm.sh: in the background.)"""

    name = "lm"
    model_types = ("gpt2",)
    Config = Config
    presets = {
        "nano": preset(128, 4, 4, max_seq_len=128, dropout=0.0, tokenizer="bpe", vocab_size=4096, lr=3e-3, epochs=2),
        "tiny": preset(256, 4, 4, max_seq_len=256),
        "small": preset(512, 8, 6, max_seq_len=512),
        "medium": preset(768, 12, 12, max_seq_len=1024),
        # for a machine: no GPU and 4 to 8 GB; a small GPU; one of 10 GB or more
        "low": preset(256, 4, 4, max_seq_len=256, batch_size=4, grad_accum_steps=16, epochs=5),
        "mid": preset(384, 6, 6, max_seq_len=512, batch_size=16, grad_accum_steps=4, epochs=10),
        "high": preset(768, 12, 12, max_seq_len=1024, batch_size=32, grad_accum_steps=2, epochs=20),
    }

    def model(self) -> "nn.Module":
        from stoker.model.gpt import GPT

        cfg = self.cfg
        return GPT(self.tokenizer.vocab_size, **sizes_of(cfg), max_seq_len=cfg.max_seq_len)

    def goal(self) -> Goal | None:
        for name, perplexity in PERPLEXITIES.items():
            if all(getattr(self.cfg, option) == value for option, value in self.presets[name].items()):
                return self.perplexity(perplexity, "WikiText")
        return None

    # -- export and load ----------------------------------------------------------------------------------------

    def export(self, model: Any, folder: Path) -> None:
        """A Hugging Face folder: `GPT2LMHeadModel.from_pretrained` gives the same logits."""
        import safetensors.torch

        from stoker.model.huggingface import gpt2_config, gpt2_weights

        files.write(folder / "model.safetensors", safetensors.torch.save(gpt2_weights(model), {"format": "pt"}))
        files.write_json(folder / "config.json", gpt2_config(model, self.tokenizer.end_of_text))
        self.tokenizer.save(folder)

    def load(self, model: Any, folder: Path) -> None:
        from stoker.model.huggingface import load_gpt2

        load_gpt2(model, folder)

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        """The sizes and the tokenizer that the weights were trained with."""
        from stoker.model.huggingface import gpt2_options

        known = pretrained.options
        sizes = {name: known[name] for name in SHAPE} if pretrained.is_snapshot else gpt2_options(pretrained.folder)
        return {**sizes, "tokenizer": tokenizer_option(pretrained)}


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(LanguageModel)
