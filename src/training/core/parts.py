"""Parts of a model whose weights may come from a source: a stage declares them, `networks` builds them.

Needs no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

LEFT_OUT = "left_out_of_snapshots"  # attribute of a model: names of the weights that are read from sources


@dataclass(frozen=True)
class Lora:
    """Train low-rank adapters only (LoRA: Hu et al. 2021, arXiv:2106.09685): a linear layer computes
    W x + alpha / rank * B A x, of which A (rank, inputs) and B (outputs, rank) are trained.

    `layers` are patterns of the layers' names within the part, with the shell's wildcards ("blocks.*.qkv").
    """

    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Part:
    """A submodule of the model, where its weights come from, and how it is trained.

    name     the submodule: "thinker" is `model.thinker`. The stage builds it, maybe on the meta device, in the shape
             that follows from `Stage.sources[name].options`; `from_transformers.build` builds one of transformers
    source   a run, a snapshot, a model folder or a repository of the Hugging Face hub, as the user types it; "": new
             weights
    prefix   load only the weights of the source whose names begin with it; it is cut off
    names    called as (name without the prefix, tensor) for each tensor of the source; returns its name and form in the
             submodule, or None to leave it out, such as `to_ours` of a table (`model/names.py`). None: names are equal
    stages   the stages of which one has trained the source: "newest" is their newest run, `options_from` of that stage
             reads the source's options, and without `prefix` its `load` reads model folders; `stage.reader` chooses the
             stage for a folder of another program. Empty: the names are those of the submodule
    train    "whole"; "frozen": it gets no gradient and stays in evaluation mode; or `Lora`. Weights of a source that
             training does not change are in no snapshot: a resumed run reads them from the source again, and refuses
             one with other content
    dtype    "fp32", "bf16", "fp16"; "": as the stage built it. Adapters are always fp32
    export   "copy": the model folder holds its weights, with adapters merged. "reference": it holds the path and
             SHA-256 of the source, and adapters unmerged; see `exported` and `referenced`. "beside": as "reference",
             and the run's folder (from its start) and the model folder have a copy of the source's files, so that the
             source may be deleted. Files of our runs and of the hub's cache are hard-linked where possible
    use      "evaluation": a judge. It is not in the model but made by `build`, and frozen; the stage finds it in
             `self.judges[name]` while it evaluates
    build    makes the network of a judge
    """

    name: str
    source: str = ""
    prefix: str = ""
    stages: tuple[str, ...] = ()
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
        """Context manager: the messages of a UserError begin with the name of this part."""
        try:
            yield
        except UserError as error:
            raise UserError(*(f"part {self.name}: {problem}" for problem in error.problems)) from error

    def holds(self, name: str) -> bool:
        """Whether the weight of the model with this name belongs to the part."""
        return name.startswith(f"{self.name}.")


def left_out(model: "nn.Module") -> frozenset[str]:
    """The names of the weights that no snapshot holds, since they are read from the sources of parts."""
    return getattr(model, LEFT_OUT, frozenset())


def kept(model: "nn.Module") -> "dict[str, Tensor]":
    """The weights and buffers that a snapshot holds: all but those that are read from the sources of parts."""
    absent = left_out(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}


def changing_buffers(model: "nn.Module") -> "list[Tensor]":
    """The buffers that a forward pass may change: all but those of frozen parts."""
    absent = left_out(model)
    return [buffer for name, buffer in model.named_buffers() if name not in absent]


def exported(parts: Sequence[Part], model: "nn.Module") -> "dict[str, Tensor]":
    """The weights to write into a model folder: all but those of `referenced`."""
    absent = set(referenced(parts, model))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}


def referenced(parts: Sequence[Part], model: "nn.Module") -> tuple[str, ...]:
    """The names of the weights that a model folder refers to and does not hold; a stage's `load` must not expect them.
    """
    by_reference = [part for part in parts if part.export != "copy"]
    return tuple(sorted(name for name in left_out(model) if any(part.holds(name) for part in by_reference)))
