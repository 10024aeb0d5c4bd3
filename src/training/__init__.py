"""One trainer, the stages on it, and what plugs into it.

A plug-in imports from here what it is made of (see docs/extend.md); our own modules import from where that is defined.
"""

from stoker.config import UserError, opt
from stoker.training.core.callback import ACT, OBSERVE, REPORT, SHAPE, Callback
from stoker.training.core.error_rates import error_rates
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from stoker.training.core.options import Options
from stoker.training.core.phases import Group, Phase
from stoker.training.core.stage import Stage
from stoker.training.core.transcripts import Source, Terms, Transcribing

__all__ = ["ACT", "OBSERVE", "REPORT", "SHAPE", "Batch", "Callback", "Group", "Loss", "Moment", "Options", "Phase",
           "Ratio", "Sampled", "Source", "Stage", "Terms", "Transcribing", "UserError", "error_rates", "opt"]
