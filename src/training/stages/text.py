"""Base class of language models: stages whose data are text and whose model predicts the next token."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stoker.config import UserError, opt
from stoker.training.core.figures import Batch, Goal, Loss, Moment, Ratio, Sampled
from stoker.training.core.stage import C
from stoker.training.stages.labelled import TOKENIZER, Tokenized, tokenizer_of

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from stoker.data.blocks import Numbers
    from stoker.data.loader import Order
    from stoker.data.text.tokenizers import Tokenizer
    from stoker.data.text.tokens import Lines, Windows
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)

DATASETS = ("wikitext", "wikitext-103", "pydocs")
TOKENIZERS = ("bpe", "bytes", "gpt2", "gpt4", "gpt4o")
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
    pack: bool = opt(True, "train on windows of --max_seq_len tokens, cut from the texts one after another; --no_pack: "
                     "each line of the text is a sample, cut at --max_seq_len")
    shift_windows: bool = opt(False, "in each epoch after the first, cut the training text into windows at other "
                              "places, so that in many epochs the model sees few windows twice; not with --no_pack")


class LanguageModelling(Tokenized[C]):
    """A stage that reads text (the options of `Text`, and --max_seq_len) and predicts the next token.

    Its model is called with the batch's entries by name, as `stoker.model.gpt.GPT`. `special_tokens` are added to any
    tokenizer that lacks them.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ()

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
        if "shift_windows" in typed and cfg.shift_windows and not cfg.pack:
            problems.append("--shift_windows shifts windows, and with --no_pack there are none: leave one of them out")
        if problem := vocabularies.problem(cfg.tokenizer):
            problems.append(problem)
        if problems:
            raise UserError(*problems)
        return cfg, lines

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from stoker.data.text import corpus as text
        from stoker.data.text import tokens
        from stoker.data.text.tokenizers import FIXED

        cfg: Any = self.cfg
        corpus = text.documents(cfg.dataset, by_line=not cfg.pack)
        own = self.folder / TOKENIZER  # a resumed run keeps its tokenizer
        kind = str(own) if own.exists() and cfg.tokenizer not in FIXED else cfg.tokenizer
        self.tokenizer = self.tokenizer_for(kind, corpus.train)
        self.tokenizer.context = cfg.max_seq_len
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

    def tokenizer_for(self, kind: str, texts: list[str]) -> "Tokenizer":
        """The tokenizer that `kind` names, with the special tokens."""
        from stoker.data.text.tokenizers import open_tokenizer

        cfg: Any = self.cfg
        return open_tokenizer(kind, cfg.vocab_size, texts, retrain=cfg.retrain_tokenizer, special=self.special_tokens)

    def dataset(self, split: str) -> "Windows | Lines":
        from stoker.data.text.tokens import Lines, Windows, tokenize

        cfg: Any = self.cfg
        what = "training text" if split == "train" else f"{split} text"
        if split not in self.tokens:  # the test text is tokenized when it is needed, at the end
            self.tokens[split] = tokenize(self.test_text, self.tokenizer, what)
        limit = cfg.max_samples if split == "train" else 0
        if cfg.pack:
            seed = cfg.seed if split == "train" and cfg.shift_windows else None
            return Windows(self.tokens[split], cfg.max_seq_len, max_samples=limit, what=what, seed=seed)
        return Lines(self.tokens[split], cfg.max_seq_len, self.tokenizer.end_of_text, max_samples=limit)

    def order(self) -> "Order":
        from stoker.data.loader import LengthOrder
        from stoker.data.text.tokens import Lines, ShiftedOrder

        cfg: Any = self.cfg
        rows = self.dataset("train")
        known = len(rows), cfg.batch_size, cfg.grad_accum_steps, cfg.seed
        if isinstance(rows, Lines):
            return LengthOrder(*known, by_epoch=False, lengths=tuple(rows.lengths()))
        return ShiftedOrder(*known, windows=rows) if cfg.shift_windows else super().order()

    def groups(self, split: str) -> list[str] | None:
        """The document in which each window begins; lines are independent."""
        from stoker.data.text.tokens import Windows

        rows = self.dataset(split)
        return rows.documents(self.tokenizer.end_of_text) if isinstance(rows, Windows) else None

    def splits(self) -> tuple[str, ...]:
        return "train", "validation", *(["test"] if self.test_text else [])

    def collate(self, samples: list[Any]) -> Batch:
        """tokens and targets, (B, T) each; a target beyond the end of a line is IGNORED."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from stoker.model.cross_entropy import IGNORED

        cfg: Any = self.cfg
        if cfg.pack:
            windows = torch.stack(samples)  # (B, T + 1)
            return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}
        return {"tokens": pad_sequence([line[:-1] for line in samples], True, self.tokenizer.end_of_text),
                "targets": pad_sequence([line[1:] for line in samples], True, IGNORED)}

    def made_from(self) -> dict[str, str]:
        return {"text": self.corpus_fingerprint, **super().made_from()}

    def size(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch["tokens"]), "tok": int(LanguageModelling.counts(self, batch, "")["loss"])}

    # -- model --------------------------------------------------------------------------------------------------

    def blocks(self, model: Any) -> list["nn.Module"]:
        return list(model.blocks)

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        cfg: Any = self.cfg
        return {"loss": batch["targets"].numel() if cfg.pack else (batch["targets"] >= 0).sum()}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": model(**batch)})

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        """The loss as in training, also by row."""
        total, rows = model(**batch, by_row=True)
        tokens = (batch["targets"] >= 0).sum(1).to(rows.dtype)
        return {"loss": Sampled(total, LanguageModelling.counts(self, batch, "")["loss"], (rows, tokens))}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        return {name.replace("loss", "ppl"): _exp(value) for name, value in means.items() if name.endswith("/loss")}

    def perplexity(self, value: float, data: str = "") -> "Goal | None":
        """A goal that was stated for tokens that are parts of words; single bytes are easier to predict."""
        cfg: Any = self.cfg
        return Goal("eval/ppl", value, data) if cfg.tokenizer != "bytes" and self.best[0] == "eval/loss" else None

    def samples(self, model: Any) -> "dict[str, Media]":
        """A continuation of the first tokens (in brackets) of a validation text, and a text without a prompt."""
        from stoker.training.core.media import Text

        cfg: Any = self.cfg
        prompt = self.tokens["validation"][:min(PROMPT_TOKENS, cfg.max_seq_len // 2)].tolist()
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


def tokenizer_option(pretrained: "Pretrained") -> str:
    """The value of --tokenizer for trained weights: a fixed vocabulary's name, or the path of their tokenizer.json."""
    kind = pretrained.options.get("tokenizer", "")
    if kind in TOKENIZERS and kind != "bpe":
        return str(kind)
    return tokenizer_of(pretrained)


def _exp(value: float) -> float:
    """Perplexity of a mean loss, whatever its size."""
    return math.inf if value >= 709 else math.exp(value)  # beyond, a double overflows
