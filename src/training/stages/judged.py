"""An audio encoder that transcribes what a stage's model says: a judge, for evaluation alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.config import UserError, opt
from stoker.daemon import registry
from stoker.training.core.figures import Ratio
from stoker.training.core.parts import Part
from stoker.training.stages.labelled import tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stoker.training.core.stage import Stage

NOBODY = "none"  # of --judge
STAGE = "audio_enc"
HOP = 160  # samples in a frame of a spectrogram


@dataclass
class Judged:
    """Evaluation"""

    judge: str = opt("newest", "run, snapshot or model folder of an audio encoder that transcribes what is said "
                     "(newest: the newest finished run, if there is one; none: spectrograms alone are compared)",
                     path=("newest", NOBODY))


def chosen(named: str) -> tuple[str, list[str]]:
    """What --judge means now, since the newest run may be another one when a run is resumed; and a log line where there
    is none."""
    if named != "newest":
        return named, []
    try:
        return str(registry.newest_finished((STAGE,)).path), []
    except UserError:
        return NOBODY, ["There is no trained audio encoder here, so nobody transcribes what is said, and spectrograms "
                        "alone are compared: ./run/run_train_audio_enc.sh --preset nano trains one"]


class Judge:
    """The part `judge` of a stage, and what it hears."""

    def __init__(self, stage: "Stage[Any]"):
        self.stage = stage
        self._listener: Any = None  # the audio encoder's stage

    def part(self) -> Part:
        return Part("judge", self.stage.cfg.judge, stages=(STAGE,), train="frozen", use="evaluation",
                    build=self._build)

    @property
    def is_there(self) -> bool:
        """False also before the model was built."""
        return "judge" in self.stage.judges

    def _build(self) -> "nn.Module":
        from stoker.training.core import pretrained
        from stoker.training.core.stage import discover

        source, kind = pretrained.find(self.stage.sources["judge"].place), discover()[STAGE]
        self._listener = kind(pretrained.config_for(source, kind), Path(tokenizer_of(source)).parent)
        self._listener.reopen()
        return self._listener.model()  # type: ignore[no-any-return]

    def heard(self, sound: "Tensor", frames: "Tensor") -> list[str]:
        """What is said in sounds (B, N), of which so many frames of a spectrogram count (B,)."""
        network: Any = self.stage.judges["judge"]
        return self._listener.ctc_texts(*network(*network.mel(sound, frames * HOP)))  # type: ignore[no-any-return]

    def wer(self, sound: "Tensor", frames: "Tensor", texts: list[str]) -> Ratio:
        """The word error rate of what is heard."""
        from stoker.training.core.error_rates import error_rates

        return error_rates(map(str.split, texts), map(str.split, self.heard(sound, frames)))
