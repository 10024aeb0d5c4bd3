"""Base classes of stages whose model reads or writes text: as tokens of a tokenizer, or as characters."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stoker import files
from stoker.config import UserError, opt
from stoker.training.core.figures import Batch
from stoker.training.core.stage import C, Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stoker.data.loader import Order
    from stoker.data.text.tokenizers import Tokenizer
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)

KINDS = ("chars", "bpe")
TOKENIZER = "tokenizer.json"  # in a run's folder, and beside exported weights


class Tokenized(Stage[C]):
    """A stage with a tokenizer. It is saved in the run's folder, so that a resumed run has the same one."""

    tokenizer: "Tokenizer"
    tokenizer_option = "tokenizer"

    def open_tokenizer(self, texts: Sequence[str]) -> None:
        """Open the tokenizer in the run's folder; if there is none, make the kind that the option names, from the
        training texts. Raises UserError."""
        from stoker.data.text.labels import open_labels

        cfg: Any = self.cfg
        own = self.folder / TOKENIZER
        kind = str(own) if own.exists() else getattr(cfg, self.tokenizer_option)
        self.tokenizer = open_labels(kind, cfg.vocab_size, texts)

    def begin(self) -> None:
        self.tokenizer.save(self.folder)

    def reopen(self) -> None:
        self.open_tokenizer([])

    def made_from(self) -> dict[str, str]:
        return {self.tokenizer_option: self.tokenizer.fingerprint}

    def batches(self, rows: Sequence[Any], model: "nn.Module") -> Iterator[Batch]:
        """The rows as batches, in their order, on the device of the model."""
        from stoker.training.core import device as devices

        size = self.cfg.batch_size
        for start in range(0, len(rows), size):
            yield devices.move(self.collate(list(rows[start:start + size])), devices.of(model))


class Labelled(Tokenized[C]):
    """A stage whose model writes labels; its export holds them beside the weights. `sizes` are the options that decide
    the shape of the model. `Augmentation` is the group of options that change the training rows; each is off at 0."""

    tokenizer_option = "labels"
    sizes: ClassVar[tuple[str, ...]]
    former_sizes: ClassVar[Mapping[str, Any]] = {}  # those that older models were saved without, and their values
    Augmentation: ClassVar[type]

    @classmethod
    def check(cls, cfg: Any, *, resumed: bool) -> list[str]:
        """Check --labels; a resumed run has its tokenizer already."""
        kind = getattr(cfg, cls.tokenizer_option)
        if resumed or kind in KINDS or Path(kind).is_file():
            return []
        return [f"--{cls.tokenizer_option}: {kind!r} is none of {', '.join(KINDS)}, and no tokenizer.json"]

    @classmethod
    def resolve_defaults(cls, cfg: Any, typed: Collection[str]) -> tuple[Any, list[str]]:
        """Compile only if the user asks for it, since it needs every row padded to the same size."""
        return replace(cfg, compile=bool(cfg.compile)), []

    @classmethod
    def all_rows(cls, cfg: Any) -> Any:
        whole: Any = super().all_rows(cfg)
        numbers = [field.name for field in fields(cls.Augmentation) if not isinstance(field.default, str)]
        return replace(whole, **dict.fromkeys(numbers, 0), held_out="")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_batch([text])[0].tolist()  # type: ignore[no-any-return]

    def warn_of_unspelled(self, texts: Iterable[str]) -> None:
        """Characters of the texts that the labels lack, such as those of --init_from, are passed over."""
        from stoker.data.text.labels import unspelled

        if unknown := unspelled(self.tokenizer, texts):
            advice = "; write numbers as words, as they are said" if any(map(str.isdigit, unknown)) else ""
            log.warning("%s characters of the texts are not among the labels, so they are not learned, and are errors "
                        "in validation: %s%s", len(unknown), " ".join(unknown), advice)

    def ctc_texts(self, logits: "Tensor", lengths: "Tensor") -> list[str]:
        """The texts that a CTC head reads, with the likeliest label of each frame: logits (B, T, V), of which the first
        `lengths` (B,) frames count."""
        from stoker.model import ctc

        return [self.tokenizer.decode(ids) for ids in ctc.greedy(logits, lengths, blank=self.tokenizer.end_of_text)]

    def order_by_length(self, lengths: Sequence[float], most: float) -> "Order":
        """An order in which the training rows of a batch have similar lengths. `most`: the largest length of a batch,
        all rows and padding together; 0: no limit but the batch size."""
        from stoker.data.loader import LengthOrder

        cfg = self.cfg
        return LengthOrder(len(lengths), cfg.batch_size, cfg.grad_accum_steps, cfg.seed, lengths=tuple(lengths),
                           batch_length=most)

    # -- exported weights ---------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """Entries of an exported config.json beside sizes and vocabulary size."""
        return {}

    def left_out(self) -> tuple[str, ...]:
        """Prefixes of the names of weights that are not exported, since they are stored elsewhere."""
        return ()

    def export(self, model: "nn.Module", folder: Path) -> None:
        """Write model.safetensors, config.json with the sizes, and tokenizer.json with the labels."""
        import safetensors.torch

        weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()
                   if not name.startswith(self.left_out())}
        files.write(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
        files.write_json(folder / "config.json", {
            "model_type": f"stoker_{self.name}", **{name: getattr(self.cfg, name) for name in self.sizes},
            "vocab_size": self.tokenizer.vocab_size, **self.described()})
        self.tokenizer.save(folder)

    def load(self, model: "nn.Module", folder: Path) -> None:
        from stoker.model import weights

        weights.load(model, folder, but=self.left_out())

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        """The sizes and the labels that the weights were trained with. Raises UserError."""
        options = {**cls.former_sizes, **pretrained.options}
        if not options.keys() >= set(cls.sizes):
            raise UserError(f"{pretrained} is of another program or version: this stage reads models "
                            f"of run_train_{cls.name}.sh")
        sizes = {name: options[name] for name in cls.sizes}
        return {**sizes, cls.tokenizer_option: tokenizer_of(pretrained)}


def label_kind(default: str, what: str) -> Any:
    """Declare the option for the kind of labels; --help begins with `what`."""
    return opt(default, f"{what}: chars (those of the training texts), bpe (tokens trained on them), or "
               "PATH/tokenizer.json", path=KINDS, aliases=("units",))


def vocabulary(default: int) -> Any:
    """Declare the option for the size of a vocabulary."""
    return opt(default, "vocabulary size of a BPE tokenizer trained on this data", ge=257, le=100000)


def evenly(rows: Any, most: int) -> list[Any]:
    """At most `most` rows, evenly spread over all."""
    return [rows[row] for row in range(0, len(rows), -(-len(rows) // most))]


def tokenizer_of(pretrained: "Pretrained") -> str:
    """The path of the tokenizer.json beside trained weights or in their run. Raises UserError where there is none."""
    for folder in (pretrained.folder, *([pretrained.run.path] if pretrained.run else [])):
        if (folder / TOKENIZER).is_file():
            return str(folder / TOKENIZER)
    raise UserError(f"{pretrained.folder} has no {TOKENIZER}, so its labels are not known: put it there")
