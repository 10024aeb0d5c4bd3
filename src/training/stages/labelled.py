"""Stages whose model knows text by labels: a tokenizer's tokens, or characters."""

from collections.abc import Collection, Iterator, Sequence
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

KINDS = ("chars", "bpe")
TOKENIZER = "tokenizer.json"  # in a run's folder, and beside exported weights


class Tokenized(Stage[C]):
    """The tokenizer is saved in the run's folder, so that a run which resumes has the one it began with."""

    tokenizer: "Tokenizer"
    tokenizer_option: ClassVar[str] = "tokenizer"  # says of which kind it is

    def open_tokenizer(self, texts: Sequence[str]) -> None:
        """That in the run's folder, else the one that the option names, of the training texts. Raises UserError."""
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
        """Rows in their order, where the model is."""
        from stoker.training.core import device as devices

        size = self.cfg.batch_size
        for start in range(0, len(rows), size):
            yield devices.move(self.collate(list(rows[start:start + size])), devices.of(model))


class Labelled(Tokenized[C]):
    """The labels go with exported weights. `sizes` are the options that decide the shape of the model: with the labels
    they describe the weights. `Augmentation` is the group of options that change the training rows, 0: not."""

    tokenizer_option = "labels"
    sizes: ClassVar[tuple[str, ...]]
    Augmentation: ClassVar[type]

    @classmethod
    def check(cls, cfg: Any, *, resumed: bool) -> list[str]:
        """What is wrong with --labels; a run that resumes has its own."""
        kind = getattr(cfg, cls.tokenizer_option)
        if resumed or kind in KINDS or Path(kind).is_file():
            return []
        return [f"--{cls.tokenizer_option}: {kind!r} is none of {', '.join(KINDS)}, and no tokenizer.json"]

    @classmethod
    def resolve_defaults(cls, cfg: Any, typed: Collection[str]) -> tuple[Any, list[str]]:
        """Compiled only where that was asked for: it wants every row padded to the same size."""
        return replace(cfg, compile=bool(cfg.compile)), []

    @classmethod
    def all_rows(cls, cfg: Any) -> Any:
        whole: Any = super().all_rows(cfg)
        return replace(whole, **{field.name: 0 for field in fields(cls.Augmentation)}, held_out="")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_batch([text])[0].tolist()  # type: ignore[no-any-return]

    def ctc_texts(self, logits: "Tensor", lengths: "Tensor") -> list[str]:
        """What a CTC head reads in (B, T, V), of which so many frames count (B,): the likeliest label of each."""
        from stoker.model import ctc

        return [self.tokenizer.decode(ids) for ids in ctc.greedy(logits, lengths, blank=self.tokenizer.end_of_text)]

    def order_by_length(self, lengths: Sequence[float], most: float) -> "Order":
        """Batches of training rows of like length; with padding they have `most` of it, 0: as many rows as usual."""
        from stoker.data.loader import LengthOrder

        cfg = self.cfg
        return LengthOrder(len(lengths), cfg.batch_size, cfg.grad_accum_steps, cfg.seed, lengths=tuple(lengths),
                           batch_length=most)

    # -- exported weights ---------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """What stands in an exported config.json beside sizes and vocabulary size."""
        return {}

    def left_out(self) -> tuple[str, ...]:
        """What the names of weights begin with that are not exported, since they come from elsewhere."""
        return ()

    def export(self, model: "nn.Module", folder: Path) -> None:
        """model.safetensors, config.json with the sizes, tokenizer.json with the labels."""
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
        """Sizes and labels. Raises UserError."""
        if not pretrained.options.keys() >= set(cls.sizes):
            raise UserError(f"{pretrained} is of another program or version: this stage reads what "
                            f"run_train_{cls.name}.sh makes")
        sizes = {name: pretrained.options[name] for name in cls.sizes}
        return {**sizes, cls.tokenizer_option: tokenizer_of(pretrained)}


def label_kind(default: str, what: str) -> Any:
    """Declare the option for the kind of labels; `what` they are, for --help."""
    return opt(default, f"{what}: chars (those of the training texts), bpe (tokens trained on them), or "
               "PATH/tokenizer.json", path=KINDS, aliases=("units",))


def vocabulary(default: int) -> Any:
    """Declare the option for the size of a vocabulary."""
    return opt(default, "vocabulary size of the bpe", ge=257, le=100000)


def evenly(rows: Any, most: int) -> list[Any]:
    """Up to so many rows, evenly spread over all."""
    return [rows[row] for row in range(0, len(rows), -(-len(rows) // most))]


def tokenizer_of(pretrained: "Pretrained") -> str:
    """The path of the tokenizer.json that goes with weights. Raises UserError where there is none."""
    for folder in (pretrained.folder, *([pretrained.run.path] if pretrained.run else [])):
        if (folder / TOKENIZER).is_file():
            return str(folder / TOKENIZER)
    raise UserError(f"{pretrained.folder} has no {TOKENIZER}, so its labels are not known: put it there")
