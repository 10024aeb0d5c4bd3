"""Evaluation of a recognizer with a language model, whose weight is tuned on the recognizer's validation set."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stoker import progress
from stoker.config import UserError, listed
from stoker.data.speech import recordings
from stoker.training.core import language
from stoker.training.core.error_rates import error_rates
from stoker.training.core.figures import Batch, Ratio
from stoker.training.core.options import working_in
from stoker.training.stages.labelled import evenly

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from stoker.data.speech.recordings import Utterance
    from stoker.model.fusion import Fusion, Hypothesis, Weights
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)

TUNED_ON = 100  # recordings
SEARCHES = 4  # of each of them, at most
GRID = [round(0.1 * step, 1) for step in range(16)], [round(0.25 * step, 2) for step in range(-4, 17)]


def problems(cfg: Any) -> list[str]:
    """Why the options of a language model cannot be used in a stage that trains a recognizer."""
    if cfg.lm and not cfg.eval_only:
        return [f"--lm {cfg.lm} is for evaluate.sh and transcribe.sh (--eval_only): leave it out, a recognizer is "
                "trained without a language model"]
    if cfg.beam is not None and not cfg.lm:
        return [f"--beam {cfg.beam} is for an evaluation with --lm: name a language model, or leave it out"]
    return language.problems(cfg.lm) if cfg.lm else []


def validation_rows(trained: "Pretrained") -> "list[Utterance]":
    """Some recordings of the validation set with which a model was trained, evenly spread, to tune the weight on.
    Raises UserError where they cannot be read."""
    known = trained.options
    try:
        with working_in(known.get("working_folder", "")):
            found = recordings.read(known["dataset"], held_out=listed(known.get("held_out", "")),
                                    shared_texts=known.get("shared_texts", False))
    except UserError as error:
        raise UserError(*(f"--lm is tuned on the validation set of the training, which cannot be read: {problem}; or "
                          "type --lm_weight and --lm_bonus" for problem in error.problems)) from error
    return evenly(found["validation"], TUNED_ON)


@dataclass
class WithLanguageModel:
    """Searches with the language model that an evaluation names, and scores what is found.

    `hear` returns the logits of a batch and their lengths; `rows` are batches to tune the weights on, those that the
    user did not type.
    """

    cfg: Any  # a `language.LanguageModel`
    labels: Any  # the tokenizer
    hear: "Callable[[Any, Batch], tuple[Tensor, Tensor]]"
    rows: Callable[[Any], Iterator[Batch]]
    _ready: "tuple[Fusion, Weights] | None" = field(default=None, init=False)

    def score(self, model: Any, logits: "Tensor", lengths: "Tensor", said: Sequence[str]) -> dict[str, Ratio]:
        """Error rates of the texts, and the weights with which they were found."""
        fusion, weights = self._prepared(model)
        found = [self._text(fusion.search(each, weights, self.cfg.width)[0].labels)
                 for each in _log_probs(logits, lengths)]
        return {"lm_wer": error_rates(map(str.split, said), map(str.split, found)), "lm_cer": error_rates(said, found),
                "lm_weight": Ratio(weights.weight * len(said), len(said)),
                "lm_bonus": Ratio(weights.bonus * len(said), len(said))}

    def _text(self, labels: Sequence[int]) -> str:
        return " ".join(self.labels.decode(labels).split())

    def _prepared(self, model: Any) -> "tuple[Fusion, Weights]":
        if self._ready is None:
            from stoker.data.text.spelling import spelled
            from stoker.model.fusion import Fusion
            from stoker.training.core import device as devices

            source = language.found(self.cfg.lm)
            tokenizer, network = language.opened(source, devices.of(model))
            fusion = Fusion(spelled(self.labels), self.labels.end_of_text, network, spelled(tokenizer),
                            tokenizer.end_of_text)
            log.info("Language model: %s", source)
            self._ready = fusion, self._weights(fusion, model)
        return self._ready

    def _weights(self, fusion: "Fusion", model: Any) -> "Weights":
        """Those that the user typed; what was not typed is tuned."""
        from stoker.model.fusion import Weights

        typed = self.cfg.lm_weight, self.cfg.lm_bonus
        if None not in typed:
            return Weights(*typed)
        heard, said = list[Any](), list[str]()
        for batch in self.rows(model):
            heard += _log_probs(*self.hear(model, batch))
            said += [" ".join(text.split()) for text in batch["texts"]]
        grid = [values if each is None else [each] for each, values in zip(typed, GRID)]
        first = Weights(*self.cfg.weight_and_bonus)
        weights, wer = tuned(lambda each, weights: fusion.search(each, weights, self.cfg.width), heard, said,
                             self._text, first, [Weights(weight, bonus) for weight in grid[0] for bonus in grid[1]])
        without = error_rates(map(str.split, said), [self._text(_greedy(each, self.labels.end_of_text)).split()
                                                     for each in heard])
        alone = float(without.total.sum()) / max(1, sum(map(len, map(str.split, said))))
        chosen = [name for name, value in zip(("--lm_weight", "--lm_bonus"), typed) if value is None]
        log.info("Tuned %s on %s validation recordings: %s, with a WER of %.1f%% there, %.1f%% without a language "
                 "model", " and ".join(chosen), len(heard), weights, 100 * wer, 100 * alone)
        if wer > alone:
            log.warning("The language model makes the transcripts worse, %.1f%% instead of %.1f%%: leave --lm out, or "
                        "train one longer, on text that is more like what is said", 100 * wer, 100 * alone)
        return weights


def _greedy(log_probs: "np.ndarray", blank: int) -> list[int]:
    """Log probabilities (F, L) -> the labels of one recording, the likeliest of each frame."""
    import torch

    from stoker.model import ctc

    return ctc.greedy(torch.from_numpy(log_probs)[None], torch.tensor([len(log_probs)]), blank=blank)[0]


def _log_probs(logits: "Tensor", lengths: "Tensor") -> "list[np.ndarray]":
    """(B, F, L), (B,) -> of each row (its length, L)."""
    found = logits.float().log_softmax(-1).cpu().numpy()
    return [each[:length] for each, length in zip(found, lengths.tolist())]


# -- tuning ---------------------------------------------------------------------------------------------------------


def tuned(search: "Callable[[np.ndarray, Weights], Sequence[Hypothesis]]", heard: "Sequence[np.ndarray]",
          said: Sequence[str], text: Callable[[Sequence[int]], str], first: "Weights",
          grid: "Sequence[Weights]") -> "tuple[Weights, float]":
    """The weights of those tried with the fewest wrong words (then: characters), and their word error rate.

    As in minimum error rate training (Och 2003, doi:10.3115/1075096.1075117): a search gives the best texts of each
    recording, and of the whole grid the point is tried next that would choose best among all texts found so far, of
    several the one nearest to `first`.
    """
    import numpy as np

    grid = sorted(grid, key=lambda each: abs(each.weight - first.weight) + abs(each.bonus - first.bonus))
    known: list[dict[tuple[int, ...], Hypothesis]] = [{} for _ in said]
    tried: dict[Weights, tuple[int, ...]] = {}
    weights = first
    while weights not in tried and len(tried) < SEARCHES:
        rows = progress.tracked([(1, each) for each in heard], f"Tuning: {weights}", len(heard), "recordings")
        found = [search(each, weights) for each in rows]
        errors = [_errors(hypotheses[:1], spoken, text)[0] for hypotheses, spoken in zip(found, said)]
        tried[weights] = tuple(np.sum(errors, 0).tolist())
        for hypotheses, of in zip(found, known):
            of |= {tuple(each.labels): each for each in hypotheses}
        weights = _best(grid, [list(of.values()) for of in known], said, text)
    best = min(tried, key=lambda weights: tried[weights])
    return best, tried[best][0] / max(1, sum(len(spoken.split()) for spoken in said))


def _best(grid: "Sequence[Weights]", known: "Sequence[Sequence[Hypothesis]]", said: Sequence[str],
          text: Callable[[Sequence[int]], str]) -> "Weights":
    """The first of the grid with the fewest errors, if each recording's text is the one that it scores best."""
    import numpy as np

    factors = np.array([[1, each.weight, each.bonus] for each in grid])  # (G, 3)
    total = np.zeros((len(grid), 2), int)
    for hypotheses, spoken in zip(known, said):
        parts = np.array([[each.ctc, each.lm, each.words] for each in hypotheses])  # (N, 3)
        total += _errors(hypotheses, spoken, text)[(parts @ factors.T).argmax(0)]
    return grid[min(range(len(grid)), key=lambda place: tuple(total[place]))]


def _errors(found: "Sequence[Hypothesis]", said: str, text: Callable[[Sequence[int]], str]) -> "np.ndarray":
    """(N, 2): the wrong words and characters of each."""
    import numpy as np

    texts = [text(each.labels) for each in found]
    words = error_rates([said.split()] * len(texts), map(str.split, texts)).total
    return np.stack([words.numpy(), error_rates([said] * len(texts), texts).total.numpy()], 1)
