"""Language model of text: GPT-2, next token."""

import logging
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker import files
from stoker.config import UserError, opt
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from stoker.training.core.options import Options
from stoker.training.stages.labelled import TOKENIZER, Tokenized, tokenizer_of
from stoker.training.stages.sizes import Transformer, preset, sizes_of

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from stoker.data.blocks import Numbers
    from stoker.data.text.tokens import Windows
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)


DATASETS = ("wikitext", "wikitext-103", "pydocs")
TOKENIZERS = ("bpe", "bytes", "gpt2", "gpt4", "gpt4o")
SHAPE = ("d_model", "num_heads", "num_layers", "d_ff", "max_seq_len")
PROMPT_TOKENS, SAMPLE_TOKENS = 20, 64


@dataclass
class Text:
    """Data"""

    dataset: str = opt("wikitext-103", "wikitext or wikitext-103 (from the Hugging Face hub), pydocs (the "
                       "documentation in the installed Python packages), a text file, or a folder of text files; "
                       "without --dataset, pydocs is taken where the hub cannot be reached", path=DATASETS,
                       aliases=("data_path",))
    tokenizer: str = opt("gpt2", "gpt2, gpt4, gpt4o (fetched once from the internet), bpe (trained on this "
                         "text), bytes, or PATH/tokenizer.json",
                         path=TOKENIZERS)
    vocab_size: int = opt(32000, "vocabulary size of a BPE tokenizer trained on this text", ge=256, le=100000)
    retrain_tokenizer: bool = opt(False, "train the BPE tokenizer again, even if the cache has one for this text")


@dataclass
class Architecture(Transformer, d_model=256, num_heads=4, num_layers=4, d_ff=512, dropout=0.1, head_multiple=1):
    """Model"""

    max_seq_len: int = opt(256, "context length, in tokens", ge=2, usual=(128, 2048),
                           aliases=("block_size", "ctx_len"))


@dataclass
class Config(Options, Architecture, Text):
    """The language model's options."""


class LanguageModel(Tokenized[Config]):
    """Trains a GPT-2 style language model on text, in the foreground. (./run/run_train_lm.sh: in the background.)"""

    name = "lm"
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

    @classmethod
    def check(cls, cfg: Any, *, resumed: bool) -> list[str]:
        from stoker.data.sources import hub
        from stoker.data.text import corpus as text

        problems = text.check(cfg.dataset)
        if resumed:  # the run has its own tokenizer
            why = hub.missing(cfg.dataset)
            return [*problems, *([f"--dataset {cfg.dataset}: {why}; connect, to go on with it"] if why else [])]
        if cfg.tokenizer not in TOKENIZERS and not Path(cfg.tokenizer).is_file():
            problems.append(f"--tokenizer: {cfg.tokenizer!r} is none of {', '.join(TOKENIZERS)}, and no tokenizer.json")
        return problems

    @classmethod
    def resolve_defaults(cls, cfg: Any, typed: Collection[str]) -> tuple[Any, list[str]]:
        """Where the hub cannot be reached, pydocs instead of WikiText. Raises UserError where the data set that the
        user named, or the tokenizer, is not available."""
        from stoker.data.sources import hub
        from stoker.data.text import vocabularies

        lines, problems = [], []
        own = [f"--{name}" for name in ("vocab_size", "retrain_tokenizer")
               if name in typed and getattr(cfg, name) != getattr(cls.Config, name)]
        if own and "tokenizer" not in typed and cfg.tokenizer != "bpe":
            lines.append(f"{own[0]} asks for a tokenizer of this text's own: --tokenizer bpe")
            cfg = replace(cfg, tokenizer="bpe")
        elif own and cfg.tokenizer != "bpe":
            problems.append(f"{own[0]} is for --tokenizer bpe, {cfg.tokenizer} has its own vocabulary: leave one out")
        if (why := hub.missing(cfg.dataset)) and "dataset" in typed:
            problems.append(f"--dataset {cfg.dataset}: {why}; connect, or take --dataset pydocs, or a text file")
        elif why:
            also = "" if "tokenizer" in typed else ", with --tokenizer bpe"
            lines.append(f"NO WIKITEXT: {why}. No --dataset was given, so this run trains on pydocs{also}")
            cfg = replace(cfg, dataset="pydocs", tokenizer="bpe" if also else cfg.tokenizer)
        if problem := vocabularies.problem(cfg.tokenizer):
            problems.append(problem)
        if problems:
            raise UserError(*problems)
        return cfg, lines

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from stoker.data.text import corpus as text
        from stoker.data.text import tokens
        from stoker.data.text.tokenizers import FIXED, open_tokenizer

        corpus = text.documents(self.cfg.dataset)
        own = self.folder / TOKENIZER  # a resumed run keeps its tokenizer
        kind = str(own) if own.exists() and self.cfg.tokenizer not in FIXED else self.cfg.tokenizer
        retrain = self.cfg.retrain_tokenizer
        self.tokenizer = open_tokenizer(kind, self.cfg.vocab_size, corpus.train, retrain=retrain)
        self.tokenizer.context = self.cfg.max_seq_len
        self.corpus_fingerprint, self.test_text = corpus.fingerprint, corpus.test
        self.tokens: dict[str, Numbers | np.ndarray] = {
            "train": tokens.tokenize(corpus.train, self.tokenizer, "training text"),
            "validation": tokens.tokenize(corpus.valid, self.tokenizer, "validation text"),
        }
        leaked, others = corpus.leaked(), len(corpus.valid) + len(corpus.test)
        assert not leaked, f"{leaked} documents of validation and test occur in the training text"
        rows = [f"{len(part):,} rows ({part.used:,} tokens)" for part in map(self.dataset, ("train", "validation"))]
        log.info("Data check: %s to train on, %s to validate; none of the documents of validation and test (%s) occurs "
                 "in training", *rows, f"{others:,}")
        log.info("Tokenizer: %s, vocabulary size %s", self.tokenizer.name, f"{self.tokenizer.vocab_size:,}")
        if not own.exists():  # a resumed run has logged it before; it takes time
            log.info("Unigram baseline: validation perplexity %.1f", tokens.unigram_perplexity(
                self.tokens["train"], self.tokens["validation"], self.tokenizer.vocab_size))

    def dataset(self, split: str) -> "Windows":
        from stoker.data.text.tokens import Windows, tokenize

        what = "training text" if split == "train" else f"{split} text"
        if split not in self.tokens:  # the test text is tokenized when it is needed, at the end
            self.tokens[split] = tokenize(self.test_text, self.tokenizer, what)
        limit = self.cfg.max_samples if split == "train" else 0
        return Windows(self.tokens[split], self.cfg.max_seq_len, max_samples=limit, what=what)

    def groups(self, split: str) -> list[str]:
        """The document in which each row begins."""
        return self.dataset(split).documents(self.tokenizer.end_of_text)

    def splits(self) -> tuple[str, ...]:
        return "train", "validation", *(["test"] if self.test_text else [])

    def collate(self, samples: list[Any]) -> Batch:
        import torch

        windows = torch.stack(samples)  # (B, T + 1)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}

    def made_from(self) -> dict[str, str]:
        return {"text": self.corpus_fingerprint, **super().made_from()}

    def size(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch["tokens"]), "tok": batch["tokens"].numel()}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "nn.Module":
        from stoker.model.gpt import GPT

        cfg = self.cfg
        return GPT(self.tokenizer.vocab_size, **sizes_of(cfg), max_seq_len=cfg.max_seq_len)

    def blocks(self, model: Any) -> list["nn.Module"]:
        return list(model.blocks)

    def counts(self, batch: Batch, phase: str) -> dict[str, int]:
        return {"loss": batch["targets"].numel()}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": model(batch["tokens"], batch["targets"])})

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        """The loss as in training, also by row."""
        import torch

        total, rows = model(batch["tokens"], batch["targets"], by_row=True)
        tokens = torch.full_like(rows, batch["targets"].shape[1])
        return {"loss": Sampled(total, batch["targets"].numel(), (rows, tokens))}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        return {name.replace("loss", "ppl"): _exp(value) for name, value in means.items() if name.endswith("/loss")}

    def samples(self, model: Any) -> "dict[str, Media]":
        """A continuation of the first tokens (in brackets) of a validation text, and a text without a prompt."""
        from stoker.training.core.media import Text

        prompt = self.tokens["validation"][:min(PROMPT_TOKENS, self.cfg.max_seq_len // 2)].tolist()
        return {"text/0": Text(f"[{self.tokenizer.decode(prompt)}]{self._continued(model, prompt)}"),
                "text/1": Text(self._continued(model, [self.tokenizer.end_of_text]))}

    def _continued(self, model: Any, prompt: list[int]) -> str:
        import torch

        from stoker.model.decoding import Sampling, generate
        from stoker.training.core import device as devices

        read = torch.tensor([prompt], device=devices.of(model))
        made = generate(model, read, Sampling(temperature=0.8, top_k=50), max_new_tokens=SAMPLE_TOKENS,
                        stop=self.tokenizer.end_of_text, generator=torch.Generator().manual_seed(self.cfg.seed))
        return self.tokenizer.decode(int(token) for token in made)

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
        return {**sizes, "tokenizer": _tokenizer_option(pretrained)}


def _tokenizer_option(pretrained: "Pretrained") -> str:
    """The value of --tokenizer for trained weights: a fixed vocabulary's name, or the path of their tokenizer.json."""
    kind = pretrained.options.get("tokenizer", "")
    if kind in TOKENIZERS and kind != "bpe":
        return str(kind)
    return tokenizer_of(pretrained)


def _exp(value: float) -> float:
    """Perplexity of a mean loss, whatever its size."""
    return math.inf if value >= 709 else math.exp(value)  # beyond, a double overflows


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(LanguageModel)
