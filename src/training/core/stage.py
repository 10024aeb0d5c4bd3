"""Stage: declares the model, the data and the loss of a training, in one file.

A stage is a class in `training/train_<name>.py` or `training/sft_<name>.py`, which `discover` finds, or in a script of
the user's. The trainer knows stages only by this interface. Importing a stage's file does not import torch, so that
--help and mistakes in options are printed at once.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from stoker.training.core import contract
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Goal, Loss, Moment, Ratio, Sampled
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

    C = TypeVar("C", bound=Options, default=Any)  # a stage that does not name its Config: mypy checks no options
else:
    from typing import TypeVar

    C = TypeVar("C", bound=Options)


class Stage(Generic[C]):
    """Base of all stages. `cfg` is the stage's `Config`, `folder` its run's directory. In a class that names its
    config, `class Mine(Stage[Config])`, type checkers know the options.

    `pretrained` are the trained weights that the model will get, if any; it is set before `prepare`. `sources` has the
    source of each part, by the part's name; it is filled before `prepare`, too. `judges` has the networks
    of the parts that are for evaluation alone, once the model was built.
    """

    name: ClassVar[str]
    Config: ClassVar[type]  # a dataclass derived from Options, with an option `dataset`
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    best: ClassVar[tuple[str, str]] = ("eval/loss", "min")
    target: ClassVar[float | None] = None  # the goal for the best metric: see `goal`
    tokenizer_option: ClassVar[str] = ""  # the option for the kind of tokenizer, of a stage that has one
    model_types: ClassVar[tuple[str, ...]] = ()  # values of model_type in config.json that `load` reads
    divisible: ClassVar[bool] = True  # the loss is a sum over samples, so smaller micro-batches give the same gradients
    # kind of device ("cpu", "cuda", "mps") -> an operator that has no deterministic form there, such as "grid_sample's
    # backward pass": torch then warns instead of failing, and a resumed run equals the uninterrupted one to rounding
    nondeterministic: ClassVar[Mapping[str, str]] = {}

    def __init__(self, cfg: C, folder: Path):
        self.cfg, self.folder = cfg, folder
        self._datasets: "dict[tuple[object, str], Dataset[Any]]" = {}
        self.pretrained: "Pretrained | None" = None
        self.sources: "dict[str, Pretrained]" = {}
        self.judges: "dict[str, nn.Module]" = {}

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "dataset" in vars(cls):
            setattr(cls, "dataset", _built_once(cls.dataset))

    # -- before anything is started -----------------------------------------------------------------------------

    @classmethod
    def check(cls, cfg: C, *, resumed: bool) -> list[str]:
        """Messages about mistakes that can be found without torch and without reading all the data. `resumed`: the
        options are of a run that is resumed."""
        return []

    @classmethod
    def resolve_defaults(cls, cfg: C, typed: Collection[str]) -> tuple[C, list[str]]:
        """The config with other values for defaults that do not work on this machine, and a log line about each.

        Called before a new run is made. Options in `typed` keep their values.
        """
        return cfg, []

    @classmethod
    def all_rows(cls, cfg: C) -> C:
        """The config for evaluating all rows of a data set: without augmentation, and without leaving out or adding
        rows."""
        return replace(cfg, max_samples=0)

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read and check the data, and log what was found. Raises UserError where they cannot be trained on."""

    def dataset(self, split: str) -> "Dataset[Any]":
        """The rows of "train", "validation" or, where the data have one, "test".

        Each data set is built once: further calls return the same object. The first call comes before `cfg` has the
        length of the run and whether it is compiled, so neither may be used here.
        """
        raise NotImplementedError

    def splits(self) -> tuple[str, ...]:
        """The splits that `dataset` accepts; called after `prepare`."""
        return "train", "validation"

    def collate(self, samples: list[Any]) -> Batch:
        raise NotImplementedError

    def order(self) -> "Order":
        """The order of the rows of "train": which of them each step trains on."""
        from stoker.data.loader import Order

        rows = len(self.dataset("train"))  # type: ignore[arg-type]
        return Order(rows, self.cfg.batch_size, self.cfg.grad_accum_steps, self.cfg.seed)

    def fingerprint(self) -> str:
        """A digest of the data: a resume is refused where it has changed."""
        return "/".join(self.made_from().values())

    def made_from(self) -> dict[str, str]:
        """Data fingerprints by name, for the error message when a resume is refused."""
        return {}

    def begin(self) -> None:
        """Write into `folder` the files that a run needs beside snapshots. Called after all checks, right before the
        first step."""

    def size(self, batch: Batch) -> dict[str, int]:
        """How much a batch holds, by the units in which speed is reported: {"samples": 32, "tok": 8192}. By default the
        length of its first value, as samples."""
        return {"samples": contract.rows(self, batch, "size")}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "nn.Module":
        raise NotImplementedError

    def parts(self) -> Sequence[Part]:
        """The submodules whose weights may come from a source, always the same ones, whether the user names a source
        or not; and judges for the evaluation, which must have a source."""
        return ()

    def initialize(self, model: "nn.Module", batches: Iterable[Batch]) -> None:
        """Compute weights and buffers of a new model from the first training batches, such as a codebook by k-means.

        Called once, before step 0, without gradients, in evaluation mode and in the run's precision. `batches` yields
        the micro-batches of the run's first steps, on the device; training begins with the first of them again, however
        many are read here. Random numbers follow from --seed. Weights of a part that has a source, and buffers that no
        snapshot holds (non-persistent ones), must not be changed.

        Not called where the model has trained weights: when a run is resumed, or started with --init_from. The estimate
        of time and memory before a run does not call it either.
        """

    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in this order. Every trainable parameter must be in at least one of them."""
        return (Phase(),)

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        """The divisor of each term of the loss in a micro-batch, such as its number of samples or tokens: a whole
        number, or a tensor of one. By default one term, "loss", with the length of the batch's first value.

        It must follow from the batch alone, without the model. It may be 0: a term that counts nothing in all
        micro-batches of a step adds nothing to its loss, and a step in which no term counts anything makes no update.
        """
        return {"loss": contract.rows(self, batch, "counts")}

    def weights(self, moment: Moment) -> dict[str, float]:
        """The weight of each term of the loss, in the sum of the terms' means; 1 for a term without an entry. A name
        that is no term of any phase is refused."""
        return {}

    def loss(self, model: "nn.Module", batch: Batch, moment: Moment) -> Loss:
        """The loss of a micro-batch: for each term of `counts`, a sum over what is counted there, as a tensor without
        dimensions. Terms that count nothing may be left out."""
        raise NotImplementedError

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Ratio]:
        """The metrics of the evaluation "eval" on a batch; totals and counts are added over the whole set."""
        phase = self.phases()[-1].name
        loss, counts = self.loss(model, batch, Moment(phase)), self.counts(batch, phase)
        contract.check_loss(self, phase, loss, counts)
        terms = {term: Sampled(total, counts[term], loss.samples[term]) if term in loss.samples
                 else Ratio(total, counts[term]) for term, total in loss.terms.items()}
        return {**terms, **loss.figures}

    def gather(self, model: "nn.Module", batch: Batch) -> "dict[str, Tensor]":
        """The tensors that `judge` needs of each batch of an evaluation, with a row for each sample."""
        return {}

    def judge(self, gathered: "Mapping[str, Tensor]") -> "Mapping[str, float | Ratio]":
        """Metrics of an evaluation that are no ratios of sums, such as recall among all candidates. `gathered` has the
        tensors of `gather`, concatenated over the whole set in the order of its rows, on the CPU. Not called where
        nothing was gathered. A metric that is a mean over rows, such as whether the row's query was answered right, may
        be a `Sampled`, so that it has a confidence interval."""
        return {}

    def groups(self, split: str) -> Sequence[str] | None:
        """The group of each row of a split, such as its speaker, for confidence intervals. None: rows are
        independent."""
        return None

    def evaluations(self) -> Sequence[Evaluation]:
        """The evaluations, in the order in which they are done; `best` is a metric of one of them."""
        return (Evaluation("eval", self.dataset, self.collate, self.score, self.gather, self.judge, self.size,
                           self.groups, divisible=self.divisible),)

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Figures that are computed from the means of others, as perplexity from the loss."""
        return {}

    def goal(self) -> Goal | None:
        """What the model should reach, for the log of a finished run; None: the log says nothing about it."""
        return None if self.target is None else Goal(self.best[0], self.target)

    def blocks(self, model: "nn.Module") -> list["nn.Module"]:
        """The repeated blocks of the model. Each is called once in a forward pass, with a tensor as its first argument,
        and returns one of the same kind. torch.compile and gradient checkpointing apply to each block by itself."""
        return []

    def samples(self, model: "nn.Module") -> dict[str, "Media"]:
        """Examples of the model's output, by name, which are shown at each evaluation. Random numbers drawn here do not
        change the training."""
        return {}

    def callbacks(self) -> list["Callback"]:
        """The stage's own callbacks, beside those of every run."""
        return []

    # -- export and load ----------------------------------------------------------------------------------------

    def export(self, model: "nn.Module", folder: Path) -> None:
        """Write the trained model into a folder, so that it can be used without the run."""
        raise NotImplementedError

    def load(self, model: "nn.Module", folder: Path) -> None:
        """Load the weights of an exported folder into the model. Raises UserError where they do not fit."""
        raise NotImplementedError

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        """The options that follow from trained weights, such as the shape of the model and the tokenizer. Must work
        without torch. Raises UserError where the weights are not for this stage."""
        return {}

    def reopen(self) -> None:
        """Load what inference needs (tokenizer, vocabulary), without the data. Called instead of `prepare`."""


def _built_once(build: "Callable[[Any, str], Dataset[Any]]") -> "Callable[[Any, str], Dataset[Any]]":
    """Wrap a stage's `dataset` so that further calls return the object that the first one built."""
    @functools.wraps(build)
    def dataset(self: Stage, split: str) -> "Dataset[Any]":
        if (build, split) not in self._datasets:  # `build` too: a derived stage's may call super()
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


def reader(weights: "Pretrained", stages: Sequence[str]) -> type[Stage]:
    """The stage that can load these weights: the stage that trained them or, for weights of another program, the one of
    `stages` whose `model_types` has the model type of their config.json; else the first of `stages`. Raises UserError
    where config.json cannot be read."""
    known = discover()
    if weights.stage:
        return known[weights.stage]
    kinds = {kind: name for name in stages for kind in known[name].model_types}
    return known[kinds.get(weights.model_type, stages[0])]
