"""Parts of a model that come from somewhere: a stage declares them, `networks` builds them.

Needs no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

LEFT_OUT = "left_out_of_snapshots"  # an attribute of a model: the names of weights that its sources have


@dataclass(frozen=True)
class Lora:
    """Train low-rank adapters only (LoRA: Hu et al. 2021, arXiv:2106.09685): a linear layer computes
    W x + alpha / rank * B A x, of which A (rank, inputs) and B (outputs, rank) are trained.

    `layers` are patterns of the layers' names within the part, as the shell has them ("blocks.*.qkv").
    """

    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Part:
    """A network whose weights come from somewhere, and how it is trained.

    name     the submodule of the model: "thinker" is `model.thinker`. The stage builds it, on the meta device if it
             likes; `Stage.sources[name]` has the options with which the source was trained, so also its shape. One of
             transformers: `from_transformers.build`
    source   a run, a snapshot, a model folder or a repository of the Hugging Face hub, as the user types it; "": new
             weights
    prefix   take those weights of the source whose names begin with it, without it; all others are ignored
    names    the name and form here of a tensor there, by its name without the prefix; None where it is not used: the
             `to_ours` of a table (`model/names.py`). None: the names are the same
    stage    whose newest run "newest" means, whose options the source is asked for, and which reads its model folders
             (without `prefix`); "": the source's names are those of the submodule
    train    "whole"; "frozen": it gets no gradient and stays in evaluation mode; or `Lora`. What a source has and
             training does not change is in no snapshot: a run that is resumed reads it from the source again, and
             refuses one with other content.
    dtype    "fp32", "bf16", "fp16"; "": as the stage built it. Adapters are always fp32.
    export   "copy": the model folder holds its weights, adapters merged into them. "reference": it holds the source's
             path and SHA-256, and adapters as they are; see `exported` and `referenced`. "beside": the same, and a copy
             of the source's files lies beside the weights, in the run's folder from its beginning and in the model
             folder: so the source may go. Of our own files and the hub's these are hard links, where there are such.
    use      "evaluation": it is outside of the model, frozen and made by `build`, and the stage finds it in
             `self.judges[name]` while it evaluates
    """

    name: str
    source: str = ""
    prefix: str = ""
    stage: str = ""
    train: Literal["whole", "frozen"] | Lora = "whole"
    dtype: str = ""
    export: Literal["copy", "reference", "beside"] = "copy"
    use: Literal["training", "evaluation"] = "training"
    build: "Callable[[], nn.Module] | None" = None
    names: "Callable[[str, Tensor], tuple[str, Tensor] | None] | None" = None

    def __post_init__(self) -> None:
        if (self.use == "evaluation") != (self.build is not None):
            raise ValueError(f"part {self.name}: a part for evaluation alone has `build`, others are in the model")
        if self.export != "copy" and self.train == "whole":
            raise ValueError(f"part {self.name}: what is trained whole differs from its source: export it as a copy")

    @property
    def is_judge(self) -> bool:
        return self.use == "evaluation"

    @contextmanager
    def problems(self) -> Iterator[None]:
        """Within it a UserError says that it is about this part."""
        try:
            yield
        except UserError as error:
            raise UserError(*(f"part {self.name}: {problem}" for problem in error.problems)) from error

    def holds(self, name: str) -> bool:
        """Whether a weight of the model, by its name, is of this part."""
        return name.startswith(f"{self.name}.")


def left_out(model: "nn.Module") -> frozenset[str]:
    """The names of the weights that no snapshot holds, since the sources of parts do."""
    return getattr(model, LEFT_OUT, frozenset())


def kept(model: "nn.Module") -> "dict[str, Tensor]":
    """The weights and buffers that a snapshot holds: all that training may change, and what has no source."""
    absent = left_out(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}


def changing_buffers(model: "nn.Module") -> "list[Tensor]":
    """The buffers that a forward pass may change: not those of frozen parts."""
    absent = left_out(model)
    return [buffer for name, buffer in model.named_buffers() if name not in absent]


def exported(parts: Sequence[Part], model: "nn.Module") -> "dict[str, Tensor]":
    """The weights that a model folder holds: all but those that it names by reference."""
    absent = set(referenced(parts, model))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}


def referenced(parts: Sequence[Part], model: "nn.Module") -> tuple[str, ...]:
    """The names of the weights that a model folder has by reference; a stage's `load` leaves them alone."""
    by_reference = [part for part in parts if part.export != "copy"]
    return tuple(sorted(name for name in left_out(model) if any(part.holds(name) for part in by_reference)))
