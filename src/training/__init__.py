"""One trainer, the stages on it, and what plugs into it. Plug-ins find here all that they are made of, without torch."""

from stoker.config import UserError, opt
from stoker.training.core.callback import ACT, OBSERVE, REPORT, SHAPE, Callback
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.options import Options
from stoker.training.core.phases import Group, Phase
from stoker.training.core.stage import Stage

__all__ = ["ACT", "OBSERVE", "REPORT", "SHAPE", "Batch", "Callback", "Group", "Loss", "Moment", "Options", "Phase",
           "Ratio", "Stage", "UserError", "opt"]
