"""Stages whose model knows text by labels: a tokenizer's tokens, or characters."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stoker import files
from stoker.config import UserError
from stoker.training.core.stage import Stage

if TYPE_CHECKING:
    from torch import nn

    from stoker.data.text.tokenizers import Tokenizer
    from stoker.training.core.pretrained import Pretrained

KINDS = ("chars", "bpe")
TOKENIZER = "tokenizer.json"  # in a run's folder, and beside exported weights


class Labelled(Stage):
    """The labels stand in the run's folder, so that a run which resumes has those it began with, and go with exported
    weights. `sizes` are the options that decide the shape of the model: with the labels they describe the weights."""

    sizes: ClassVar[tuple[str, ...]]
    tokenizer: "Tokenizer"
    tokenizer_option: ClassVar[str] = "labels"

    @classmethod
    def label_problems(cls, cfg: Any, resumed: bool) -> list[str]:
        """What is wrong with --labels; a run that resumes has its own."""
        kind = getattr(cfg, cls.tokenizer_option)
        if resumed or kind in KINDS or Path(kind).is_file():
            return []
        return [f"--{cls.tokenizer_option}: {kind!r} is none of {', '.join(KINDS)}, and no tokenizer.json"]

    def open_labels(self, texts: Sequence[str]) -> None:
        """Those in the run's folder, else those that --labels names, of the training texts. Raises UserError."""
        from stoker.data.text.labels import open_labels

        own = self.folder / TOKENIZER
        kind = str(own) if own.exists() else getattr(self.cfg, self.tokenizer_option)
        self.tokenizer = open_labels(kind, self.cfg.vocab_size, texts)

    def begin(self) -> None:
        self.tokenizer.save(self.folder)

    def reopen(self) -> None:
        self.open_labels([])

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


def tokenizer_of(pretrained: "Pretrained") -> str:
    """The path of the tokenizer.json that goes with weights. Raises UserError where there is none."""
    for folder in (pretrained.folder, *([pretrained.run.path] if pretrained.run else [])):
        if (folder / TOKENIZER).is_file():
            return str(folder / TOKENIZER)
    raise UserError(f"{pretrained.folder} has no {TOKENIZER}, so its labels are not known: put it there")
