"""What the trainer may be asked for after a step, and how a run comes to its end."""

from dataclasses import dataclass
from typing import Literal

Request = Literal["eval", "log", "save", "trace", "stop"]
State = Literal["finished", "stopped", "halted", "back"]


@dataclass(frozen=True)
class Ending:
    """How a run came to its end: finished; stopped by request; halted because it could not go on healthily; back: to
    go on from a snapshot before `step` (from 1), which failed because of `why`."""

    state: State
    reason: str
    step: int = 0
    why: str = ""
