"""Stage: what is trained, on what, toward what. A declaration in one file; the file being there registers it.

A stage is a class in `training/train_<name>.py` or `training/sft_<name>.py`, or in a script of the user's. The trainer
knows stages only by what stands here. Importing a stage's file does not import torch: configs and help answer at once.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from stoker.training.core.options import Options
from stoker.training.core.parts import Part
from stoker.training.core.phases import Phase

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset
    from typing_extensions import TypeVar

    from stoker.data.loader import Order
    from stoker.training.core.callback import Callback
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

    C = TypeVar("C", bound=Options, default=Any)  # of a stage that does not name its options mypy does not check them
else:
    from typing import TypeVar

    C = TypeVar("C", bound=Options)


class Stage(Generic[C]):
    """Base of all stages. `cfg` is the stage's `Config`, `folder` its run's directory. A class that names its options,
    `class Mine(Stage[Config])`, has them typed in its methods.

    `sources` has where each part's weights come from, by its name, before anything else is called; `judges` the
    networks of the parts that are for evaluation alone, once there is a model.
    """

    name: ClassVar[str]
    Config: ClassVar[type]  # a dataclass derived from Options, with an option `dataset`
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    best: ClassVar[tuple[str, str]] = ("eval/loss", "min")
    target: ClassVar[float | None] = None  # what that figure is meant to reach; a finished run says whether it did
    divisible: ClassVar[bool] = True  # the loss is a sum over samples: a batch may be computed in smaller parts
    # kind of device ("cpu", "cuda", "mps") -> what has no deterministic form there, as "grid_sample's backward pass":
    # torch then warns instead of refusing it, and a resumed run is the uninterrupted one to rounding only
    nondeterministic: ClassVar[Mapping[str, str]] = {}

    def __init__(self, cfg: C, folder: Path):
        self.cfg, self.folder = cfg, folder
        self._datasets: "dict[tuple[object, str], Dataset[Any]]" = {}
        self.sources: "dict[str, Pretrained]" = {}
        self.judges: "dict[str, nn.Module]" = {}

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "dataset" in vars(cls):
            setattr(cls, "dataset", _built_once(cls.dataset))

    # -- before anything is started -----------------------------------------------------------------------------

    @classmethod
    def check(cls, cfg: C, *, resumed: bool) -> list[str]:
        """Mistakes that can be seen without torch and without reading all the data; `resumed`: a run goes on."""
        return []

    @classmethod
    def resolve_defaults(cls, cfg: C, typed: Collection[str]) -> tuple[C, list[str]]:
        """The config with those defaults replaced that cannot be met on this machine, and a line about each.

        Called before a new run is made; `typed` values are never replaced.
        """
        return cfg, []

    @classmethod
    def all_rows(cls, cfg: C) -> C:
        """The config with which no row of a data set is changed, left out or added, to evaluate all of them."""
        return replace(cfg, max_samples=0)

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read and check the data, log what was found. Raises UserError where it cannot be trained on."""

    def dataset(self, split: str) -> "Dataset[Any]":
        """The rows of "train", "validation" or, where the data have one, "test".

        Each data set is built once: further calls return the same object. That is before the length of the run, and
        whether it is compiled, stand in `cfg`.
        """
        raise NotImplementedError

    def splits(self) -> tuple[str, ...]:
        """What `dataset` may be asked for, once the data are prepared."""
        return "train", "validation"

    def collate(self, samples: list[Any]) -> Batch:
        raise NotImplementedError

    def order(self) -> "Order":
        """Which rows of "train" make up each step."""
        from stoker.data.loader import Order

        rows = len(self.dataset("train"))  # type: ignore[arg-type]
        return Order(rows, self.cfg.batch_size, self.cfg.grad_accum_steps, self.cfg.seed)

    def fingerprint(self) -> str:
        """Changes whenever the data do."""
        return "/".join(self.made_from().values())

    def made_from(self) -> dict[str, str]:
        """The fingerprints of what decides the rows, by the names that a refusal to resume prints."""
        return {}

    def begin(self) -> None:
        """Leave in `folder` what must be there beside snapshots; nothing can be refused any more."""

    def size(self, batch: Batch) -> dict[str, int]:
        """How much a batch holds, by the unit its speed is told in: {"samples": 32, "tok": 8192}."""
        return {"samples": len(next(iter(batch.values())))}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "nn.Module":
        raise NotImplementedError

    def parts(self) -> Sequence[Part]:
        """The submodules of the model whose weights come from somewhere, the same ones whether a source is named or
        not; and the judges of an evaluation that were named."""
        return ()

    def initialize(self, model: "nn.Module", batches: Iterable[Batch]) -> None:
        """Compute weights and buffers of a new model from the first training batches, such as a codebook by k-means.

        Called once, before step 0, without gradients, in evaluation mode and in the run's precision. `batches` are the
        micro-batches of the run's first steps, on the device; training begins with the first of them, however many are
        read here. Random numbers follow from --seed. The weights of a part that has a source must stay as they are, and
        so must what no snapshot holds (buffers that are not persistent).

        Not called where the model has trained weights: in a run that is resumed, or begins with --init_from. The
        estimate before a run measures the model as it is without this.
        """

    def phases(self) -> tuple[Phase, ...]:
        """What is updated in a step, in this order. Every trainable parameter is in one at least."""
        return (Phase(),)

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        """How much there is in a micro-batch for each term of the loss: the divisor of its sum. It follows from the
        batch alone."""
        return {"loss": len(next(iter(batch.values())))}

    def weights(self, moment: Moment) -> dict[str, float]:
        """The weights of the terms of the loss, 1 where none is given."""
        return {}

    def loss(self, model: "nn.Module", batch: Batch, moment: Moment) -> Loss:
        """The loss of a micro-batch: for each term of `counts` a sum."""
        raise NotImplementedError

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Ratio]:
        """The figures of the evaluation "eval"; they are added over the whole set."""
        phase = self.phases()[-1].name
        loss, counts = self.loss(model, batch, Moment(phase)), self.counts(batch, phase)
        terms = {term: Sampled(total, counts[term], loss.samples[term]) if term in loss.samples
                 else Ratio(total, counts[term]) for term, total in loss.terms.items()}
        return {**terms, **loss.figures}

    def gather(self, model: "nn.Module", batch: Batch) -> "dict[str, Tensor]":
        """What `judge` is to have of each batch of an evaluation, a row for each sample."""
        return {}

    def judge(self, gathered: "Mapping[str, Tensor]") -> "Mapping[str, float | Ratio]":
        """The figures of an evaluation that are no ratios of sums, such as recall among all that there are: from what
        `gather` gave, the rows of the whole validation set in their order, on the host. Not asked for of nothing. One
        that is the mean of a figure of each row, such as whether its query was right, may be returned as `Sampled`."""
        return {}

    def groups(self, split: str) -> Sequence[str] | None:
        """The group of each row of a split, such as its speaker; None where rows are independent of each other."""
        return None

    def evaluations(self) -> Sequence[Evaluation]:
        """What is evaluated, in this order; `best` is a metric of one of them."""
        return (Evaluation("eval", self.dataset, self.collate, self.score, self.gather, self.judge, self.size,
                           self.groups, divisible=self.divisible),)

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Figures that follow from the means, as perplexity does from the loss."""
        return {}

    def blocks(self, model: "nn.Module") -> list["nn.Module"]:
        """The repeated parts of the model, each called once in a forward pass with a tensor that it returns changed:
        what is compiled one by one, and computed again under gradient checkpointing."""
        return []

    def samples(self, model: "nn.Module") -> dict[str, "Media"]:
        """What the model makes, to look at: shown at each evaluation. Its own randomness is preserved around it."""
        return {}

    def callbacks(self) -> list["Callback"]:
        """What this stage plugs in beside what every run has."""
        return []

    # -- out, and in again --------------------------------------------------------------------------------------

    def export(self, model: "nn.Module", folder: Path) -> None:
        """Write the trained model so that it can be used without the run."""
        raise NotImplementedError

    def load(self, model: "nn.Module", folder: Path) -> None:
        """Put the weights of such a folder into the model. Raises UserError where they are not for it."""
        raise NotImplementedError

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        """The options that trained weights settle, such as the shape of the model and the tokenizer; found without
        torch. Raises UserError where the weights are not for this stage."""
        return {}

    def reopen(self) -> None:
        """Instead of `prepare`, to use a trained model: what `model` needs beside the config, without the data."""


def _built_once(build: "Callable[[Any, str], Dataset[Any]]") -> "Callable[[Any, str], Dataset[Any]]":
    """A stage's `dataset`, which returns what it built before."""
    @functools.wraps(build)
    def dataset(self: Stage, split: str) -> "Dataset[Any]":
        if (build, split) not in self._datasets:  # by `build`: a stage may ask the one that it is derived from
            self._datasets[build, split] = build(self, split)
        return self._datasets[build, split]

    return dataset


def discover() -> dict[str, type[Stage]]:
    """name -> stage, for every file that declares one."""
    here = Path(__file__).parents[1]
    found: dict[str, type[Stage]] = {}
    for path in sorted([*here.glob("train_*.py"), *here.glob("sft_*.py")]):
        module = importlib.import_module(f"stoker.training.{path.stem}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, Stage) and member.__module__ == module.__name__:
                found[member.name] = member
    return found
