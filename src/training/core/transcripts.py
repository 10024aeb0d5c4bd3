"""What a stage declares whose model writes down texts, so that an evaluation can show where these are wrong."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class Source(NamedTuple):
    """Where the text of a row stands: the path of its file, and how long or wide that is."""

    path: str
    length: float


class Terms(NamedTuple):
    """The words of a stage for its rows."""

    rows: str  # "recordings"
    group: str  # "speaker": what `Stage.groups` returns
    length: str  # "seconds": the unit of `Source.length`
    reference: str  # "said": how the right text came about
    hypothesis: str  # "heard": how the model's came about


class Transcribing:
    """Beside `Stage`, a base of stages whose model writes down what was said or written: with it, `--confusions` works.

    `text_rates` are metrics of the evaluation of the rows of `dataset`. `score` must return them as `ErrorRates`, which
    hold the texts that were compared: words, or characters. The worst rows are found by the first of them.
    """

    text_rates: ClassVar[tuple[str, ...]]
    terms: ClassVar[Terms]

    def text_sources(self, split: str) -> Sequence[Source]:
        """The source of each row of `dataset(split)`."""
        raise NotImplementedError
