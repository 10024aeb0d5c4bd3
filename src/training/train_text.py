"""Thinker: the language model of the omni model, a decoder in Qwen3's style."""

import logging
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker import files
from stoker.config import opt
from stoker.data.text import chat
from stoker.training.core.figures import Batch, Goal, Loss, Moment
from stoker.training.core.options import Options
from stoker.training.core.phases import Group, Phase
from stoker.training.stages.sizes import Transformer, preset, sizes_of
from stoker.training.stages.text import LanguageModelling, Text, tokenizer_option

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.data.text.tokenizers import Tokenizer
    from stoker.model.thinker import Thinker as Network
    from stoker.training.core.callback import Callback
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)

EXPERTS = ("num_experts", "experts_per_token", "expert_d_ff")
SHAPE = ("d_model", "num_heads", "num_kv_heads", "use_gqa", "head_dim", "num_layers", "d_ff", "max_seq_len",
         "rope_theta", "norm_eps", "tie_embeddings", "vocabulary_rows", "use_moe", *EXPERTS)

FEWEST = 257 + len(chat.SPECIAL_TOKENS)  # tokens of a vocabulary
OF_EXPERTS = ("num_experts", "experts_per_token", "balance_weight")  # used with --use_moe alone

LEARNS_FAST = {"optimizer": "muon", "lr": 5e-3, "embedding_lr_factor": 2.0, "zero_init": True,
               "shift_windows": True}  # see docs/log.md


@dataclass
class Documents(Text):
    """Data"""

    cross_document: bool = opt(True, "let a token attend to the earlier texts of its window, too; "
                               "--no_cross_document: to its own text only")


@dataclass
class Architecture(Transformer, d_model=256, num_heads=4, num_layers=4, d_ff=1024, dropout=0.1):
    """Model"""

    num_kv_heads: int = opt(2, "heads of keys and values, each shared by --num_heads / --num_kv_heads attention "
                            "heads (grouped-query attention)", ge=1, le=32, aliases=("n_kv_heads",))
    use_gqa: bool = opt(True, "grouped-query attention; --no_use_gqa: as many heads of keys and values as attention "
                        "heads")
    head_dim: int = opt(0, "size of a head (0: the hidden size divided by the number of heads)", ge=0)
    use_swiglu: bool = opt(True, "gated feed-forward layers (SwiGLU); must be on, this model has no others")
    max_seq_len: int = opt(512, "context length, in tokens", ge=2, usual=(128, 2048),
                           aliases=("block_size", "ctx_len"))
    rope_theta: float = opt(10000.0, "base of the rotary position embedding (RoPE)", gt=1)
    norm_eps: float = opt(1e-6, "epsilon of RMSNorm, added to the mean square", gt=0)
    tie_embeddings: bool = opt(False, "use the token embedding as the output head, too")
    zero_init: bool = opt(False, "initialize the output matrices of attention and feed-forward layers to 0, not at "
                           "random, so that at first each block adds 0 to its input")
    embedding_lr_factor: float = opt(1.0, "learning rate of the token embedding and the head, as a multiple of --lr",
                                     gt=0, le=100)
    vocabulary_rows: int = opt(0, "rows of the token embedding (0: as many as the tokenizer has tokens); --init_from "
                               "sets it for a model of another program that has more rows than tokens", ge=0)

    def problems(self: Any) -> list[str]:
        found = [] if self.use_swiglu else ["--no_use_swiglu: this model has gated feed-forward layers only; "
                                            "run_train_lm.sh trains one with GELU"]
        if self.use_gqa and self.num_heads % self.num_kv_heads:
            found.append(f"--num_kv_heads {self.num_kv_heads} does not divide --num_heads {self.num_heads}: take a "
                         "divisor")
        return found


@dataclass
class Experts:
    """Mixture of experts"""

    use_moe: bool = opt(False, "replace each feed-forward layer by --num_experts smaller ones (experts), of which a "
                        "router chooses --experts_per_token for each token")
    num_experts: int = opt(8, "experts in each layer", ge=2, le=1024)
    experts_per_token: int = opt(2, "experts that compute each token", ge=1)
    expert_d_ff: int = opt(0, "feed-forward size of an expert (0: --d_ff divided by --experts_per_token, so that a "
                           "token costs as much as without experts)", ge=0)
    balance_weight: float = opt(0.01, "weight of the load-balancing loss, which is lowest when all experts get the "
                                "same number of tokens", ge=0, aliases=("router_aux_loss_coef",))

    def problems(self) -> list[str]:
        if self.experts_per_token > self.num_experts:
            return [f"--experts_per_token {self.experts_per_token} is more than --num_experts {self.num_experts}"]
        return []


@dataclass
class Config(Options, Experts, Architecture, Documents):
    """The thinker's options."""

    def problems(self) -> list[str]:
        if self.tokenizer == "bpe" and self.vocab_size < FEWEST:
            return [f"--vocab_size {self.vocab_size}: 256 bytes, the end of a text and {len(chat.SPECIAL_TOKENS)} "
                    f"special tokens are in every vocabulary: take {FEWEST} or more"]
        return []


class Thinker(LanguageModelling[Config]):
    """Trains a thinker, a language model in Qwen3's style, on text, in the foreground. (./run/run_train_text.sh: in the
    background.)"""

    name = "text"
    Config = Config
    special_tokens = chat.SPECIAL_TOKENS
    model_types = ("qwen3", "qwen3_moe")
    presets = {
        "nano": preset(128, 4, 4, max_seq_len=128, dropout=0.0, tie_embeddings=True, tokenizer="bpe", vocab_size=4096,
                       epochs=2, **LEARNS_FAST),
        "tiny": preset(256, 4, 4, tokenizer="bpe", **LEARNS_FAST),
        "small": preset(512, 8, 8, num_kv_heads=4, max_seq_len=1024, tokenizer="bpe", tie_embeddings=True),
        "medium": preset(768, 12, 12, num_kv_heads=4, max_seq_len=1024, tokenizer="bpe", tie_embeddings=True),
    }

    @classmethod
    def resolve_defaults(cls, cfg: Any, typed: Collection[str]) -> tuple[Any, list[str]]:
        """Also replaces sizes of 0 by what they stand for: sizes that are computed from others; and a line on each
        option that is not used."""
        cfg, lines = super().resolve_defaults(cfg, typed)
        unused = [(name, "--use_moe") for name in OF_EXPERTS if not cfg.use_moe]
        unused += [("num_kv_heads", "grouped-query attention (--no_use_gqa)")] if not cfg.use_gqa else []
        lines += [f"--{name} {getattr(cfg, name)} is not used without {what}" for name, what in unused
                  if name in typed and getattr(cfg, name) != getattr(cls.Config, name)]
        return replace(cfg, head_dim=cfg.head_dim or cfg.d_model // cfg.num_heads,
                       expert_d_ff=cfg.expert_d_ff or max(1, cfg.d_ff // cfg.experts_per_token)), lines

    def tokenizer_for(self, kind: str, texts: list[str]) -> "Tokenizer":
        """With the special tokens, unless a model of another program has no rows left for them."""
        from stoker.data.text.tokenizers import open_tokenizer

        found, rows = super().tokenizer_for(kind, texts), self.cfg.vocabulary_rows
        if not rows or found.vocab_size <= rows:
            return found
        log.warning("The token embedding has %s rows: none is left for the %s special tokens of conversations, "
                    "pictures and sound", f"{rows:,}", len(self.special_tokens))
        return open_tokenizer(kind, self.cfg.vocab_size, texts)

    def collate(self, samples: list[Any]) -> Batch:
        """With --no_cross_document also documents (B, T): the number of the document of each token in its row."""
        batch = super().collate(samples)
        if self.cfg.pack and not self.cfg.cross_document:
            ends = batch["tokens"] == self.tokenizer.end_of_text
            batch["documents"] = ends.cumsum(1) - ends.long()  # an end-of-text token belongs to the document before it
        return batch

    def model(self) -> "Network":
        from stoker.model.experts import Experts as Mixture
        from stoker.model.thinker import Thinker as Network

        cfg: Any = self.cfg
        experts = Mixture(cfg.num_experts, cfg.experts_per_token, cfg.expert_d_ff or cfg.d_ff // cfg.experts_per_token)
        return Network(max(self.tokenizer.vocab_size, cfg.vocabulary_rows), **sizes_of(cfg),
                       num_kv_heads=cfg.num_kv_heads if cfg.use_gqa else cfg.num_heads, head_dim=cfg.head_dim or None,
                       max_seq_len=cfg.max_seq_len, rope_theta=cfg.rope_theta, norm_eps=cfg.norm_eps,
                       tied=cfg.tie_embeddings, experts=experts if cfg.use_moe else None, zero_init=cfg.zero_init)

    def phases(self) -> tuple[Phase, ...]:
        """One phase, in which the embedding and the head may have a learning rate of their own."""
        factor = self.cfg.embedding_lr_factor
        if factor == 1:
            return super().phases()
        return (Phase(groups=(Group("token_embedding.*", factor), Group("head", factor), Group())),)

    # -- mixture of experts -------------------------------------------------------------------------------------

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        counts = super().counts(batch, phase)
        return {"ce": counts["loss"], "balance": batch["tokens"].numel()} if self.cfg.use_moe else counts

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"balance": self.cfg.balance_weight} if self.cfg.use_moe else {}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        """With experts the cross-entropy `ce` and the load-balance loss `balance`; `loss` is their weighed sum."""
        found = super().loss(model, batch, moment)
        return Loss({"ce": found.terms["loss"], "balance": model.balance()}) if self.cfg.use_moe else found

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity is of the cross-entropy alone."""
        alone = {name.replace("/ce", "/loss"): value for name, value in means.items() if name.endswith("/ce")}
        return super().derive({**means, **alone})

    def goal(self) -> Goal | None:
        return self.perplexity(10.0)

    def callbacks(self) -> "list[Callback]":
        from stoker.daemon.rundir import RunDir
        from stoker.monitors.experts import ExpertLoad

        def loads(model: Any) -> "dict[str, Tensor]":
            return {f"layer {number}": load for number, load in enumerate(model.loads())}

        return [ExpertLoad(RunDir(self.folder).alerts, loads)] if self.cfg.use_moe else []

    # -- export and load ----------------------------------------------------------------------------------------

    def export(self, model: Any, folder: Path) -> None:
        """A Hugging Face folder: `Qwen3ForCausalLM.from_pretrained` gives the same logits."""
        import safetensors.torch

        from stoker.model.qwen3 import qwen3_config, qwen3_weights

        files.write(folder / "model.safetensors", safetensors.torch.save(qwen3_weights(model), {"format": "pt"}))
        files.write_json(folder / "config.json", qwen3_config(model, self.tokenizer.end_of_text))
        self.tokenizer.save(folder, chat.TEMPLATE)

    def load(self, model: Any, folder: Path) -> None:
        from stoker.model.qwen3 import load_qwen3

        load_qwen3(model, folder)

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        """The sizes and the tokenizer that the weights were trained with."""
        from stoker.model.qwen3 import qwen3_options

        if pretrained.is_snapshot:
            sizes = {name: pretrained.options[name] for name in SHAPE}
        else:
            found = qwen3_options(pretrained.folder)
            sizes = {"vocabulary_rows": found.pop("vocab_size"), "tie_embeddings": found.pop("tied"), "use_gqa": True,
                     "use_moe": found["num_experts"] > 0, **found}
            sizes = {name: value for name, value in sizes.items() if value or name not in EXPERTS}
            if pretrained.options.get("vocabulary_rows") == 0:  # ours: the tokenizer says how many
                sizes["vocabulary_rows"] = 0
        return {**sizes, "tokenizer": tokenizer_option(pretrained)}


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(Thinker)
