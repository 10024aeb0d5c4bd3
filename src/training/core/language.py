"""A trained language model that helps another model to find texts: the options that name it, and how it is opened."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker.config import UserError, opt
from stoker.data.sources import model_hub
from stoker.training.core import pretrained
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import reader

if TYPE_CHECKING:
    import torch

STAGES = ("lm", "text")
WEIGHT, BONUS, BEAM = 0.5, 1.0, 16  # where the user types none


@dataclass
class LanguageModel:
    """Language model"""

    lm: str = opt("", "search for the text with a language model, too: a run of run_train_lm.sh or run_train_text.sh, "
                  "a snapshot or a model folder; newest: the newest finished run", path=("newest",),
                  may_change=True)
    lm_weight: float | None = opt(None, "how much the language model counts: the score of a text is log p of the "
                                  "recognizer + WEIGHT * log p of the language model + BONUS * words (default "
                                  f"{WEIGHT:g}; an evaluation tunes it)", ge=0, le=100, may_change=True)
    lm_bonus: float | None = opt(None, "what each word adds to that score, since every word makes a text less likely "
                                 f"(default {BONUS:g}; an evaluation tunes it)", ge=-100, le=100, may_change=True)
    beam: int | None = opt(None, "search for the likeliest text with so many at a time (1: the likeliest label of a "
                           f"frame; default 1, with --lm {BEAM})", ge=1, le=1000, may_change=True)

    def problems(self) -> list[str]:
        typed = [name for name in ("lm_weight", "lm_bonus") if getattr(self, name) is not None]
        return [f"--{name} {getattr(self, name):g} is for --lm: name a language model, or leave it out"
                for name in typed if not self.lm]

    @property
    def weight_and_bonus(self) -> tuple[float, float]:
        """As the user typed them, else their defaults."""
        return (WEIGHT if self.lm_weight is None else self.lm_weight,
                BONUS if self.lm_bonus is None else self.lm_bonus)

    @property
    def width(self) -> int:
        """How many texts a search with the language model keeps at a time."""
        return self.beam or BEAM


def found(named: str) -> Pretrained:
    """The weights of the language model that --lm names. Raises UserError where they are of another stage."""
    source = pretrained.held(lambda: pretrained.find(named, STAGES))
    if source.stage not in ("", *STAGES):
        raise UserError(f"--lm {named}: {source} is of stage {source.stage}, not a language model; name one of "
                        "run_train_lm.sh or run_train_text.sh")
    return source


def problems(named: str) -> list[str]:
    """Why --lm cannot be used, as far as its name says. Downloads nothing."""
    try:
        if repository := model_hub.parse(named):
            return [f"--lm {named}: {problem}" for problem in [model_hub.problem(repository)] if problem]
        found(named)
        return []
    except UserError as error:
        return list(error.problems)


def opened(source: Pretrained, device: "torch.device | str") -> tuple[Any, Any]:
    """Its tokenizer, and the model in evaluation mode. Raises UserError."""
    stage, model = pretrained.opened(source, reader(source, STAGES), device)
    return stage.tokenizer, model
