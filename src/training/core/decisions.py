"""What is done at the end of a step: requests are collected here, one process decides, and all obey.

Callbacks, intervals, signals, files in the run's folder, the clock, the memory and the disk make requests in each
process, at any time. Nothing comes of them until the loop asks at one of its fixed places, which are the same in all
processes:

    outcome    after a try of a step or of an evaluation: whether all of them have done it
    decide     at the end of a step: what is done now
    agree      after an evaluation or a log line, and before the next step: what was asked for meanwhile

Each is one exchange. Afterwards `ending`, `owed` and `asked` are the same in all processes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from stoker.daemon.inbox import Inbox
from stoker.training.core.ending import Ending, Request, State
from stoker.training.core.exchange import Exchange
from stoker.training.core.options import Options, due
from stoker.training.core.signals import Signals

BY_FILE: Mapping[str, Request] = {"snapshot": "save", "trace": "trace"}  # what a file in the run's folder asks for
GRAVEST_FIRST = ("back", "halted", "stopped", "finished")  # where processes want different endings at the same time


class What(Enum):
    """What became of a try, in words for the log; the worst comes last."""

    DONE = "done"
    ABANDONED = "a stop came in the midst of it"
    OUT_OF_MEMORY = "out of memory"


class Outcome(NamedTuple):
    """Of a try in all processes: the worst counts. `broken`: some have done it and others not."""

    what: What
    broken: bool


@dataclass(frozen=True)
class Decision:
    """What all processes do now, in this order. Each is the reason for it, '' where it is not done."""

    trace: str = ""
    eval: str = ""
    log: str = ""
    save: str = ""
    ending: Ending | None = None


@dataclass(frozen=True)
class Requests:
    """What one process asks for. `halts`: reasons why the run cannot continue, whatever else ends it."""

    asked: Mapping[Request, str]
    ending: Ending | None
    halts: Sequence[str]


class Decisions:
    """Collects the requests of this process, and brings those of all processes together.

    asked     requests that all know and that are not obeyed yet
    owed      an evaluation that a stop abandoned, and the log line that goes with it
    ending    how the run ends, once that is decided
    """

    def __init__(self, cfg: Options, signals: Signals, inbox: Inbox | None, exchange: Exchange):
        self.cfg, self.signals, self.inbox, self.exchange = cfg, signals, inbox, exchange
        self.asked: dict[Request, str] = {}
        self.owed: dict[Request, str] = {}
        self.ending: Ending | None = None
        self._asked: dict[Request, str] = {}  # by this process, since the last exchange
        self._ending: Ending | None = None
        self._halts: list[str] = []

    # -- requests of this process -------------------------------------------------------------------------------

    def ask(self, what: Request, why: str, end: State = "finished") -> None:
        """Ask the loop to evaluate, log, save, trace or stop once this step has ended; `end`: what a stop means. Of
        several requests for the same the first counts."""
        if what == "stop":
            self._ending = self._ending or Ending(end, why)
        else:
            self._asked.setdefault(what, why)

    def go_back(self, step: int, why: str, reason: str) -> None:
        """Ask to end this sitting without saving: `step` (from 1) is to be done again, from a snapshot before it."""
        self._ending = self._ending or Ending("back", reason, step, why)

    def halt(self, why: str) -> None:
        """The run cannot continue. Where something else ends it already, that is part of the reason."""
        self._halts.append(why)

    def ask_by_interval(self, step: int, steps: int, steps_per_epoch: int, last_save: float, *,
                        evaluation: bool) -> None:
        """What is due after a step (from 1). `last_save`: when a snapshot was begun, by the monotonic clock;
        `evaluation`: whether the interval of one ends there."""
        for what in due(self.cfg, step, steps, steps_per_epoch, evaluation=evaluation):
            self.ask(what, "interval")
        if self.cfg.snapshot_minutes and time.monotonic() - last_save > 60 * self.cfg.snapshot_minutes:
            self.ask("save", "time")

    # -- exchanges ----------------------------------------------------------------------------------------------

    def outcome(self, own: What, *, changed: bool = False) -> Outcome:
        """What became of a try in all processes. `changed`: this one has changed the state in it, which cannot be
        undone."""
        return self.exchange.gather_and_decide((own, changed), _outcome)

    def decide(self) -> Decision:
        """All that was asked for up to now; an evaluation and a log line are owed from now on."""
        self._ask_by_signals()
        self._exchange(decides=True)
        asked, self.asked = self.asked, {}
        self.owed = {what: why for what, why in asked.items() if what in ("eval", "log")}
        return Decision(**asked, ending=self.ending)  # the requests are its fields

    def agree(self, *, with_signals: bool = False) -> Ending | None:
        """Let all know what was asked for meanwhile; the return is `ending`."""
        if with_signals:
            self._ask_by_signals()
        self._exchange(decides=False)
        return self.ending

    def _ask_by_signals(self) -> None:
        if self.signals.take_save():
            self.ask("save", "SIGUSR1")
        if self.signals.stop:
            self.ask("stop", f"{self.signals.stop} received", "stopped")

    def _exchange(self, *, decides: bool) -> None:
        own = Requests(self._asked, self._ending, self._halts)
        self._asked, self._ending, self._halts = {}, None, []

        def merged(of_all: list[Requests]) -> tuple[dict[Request, str], Ending | None]:
            found = dict(self.asked)
            names = self.inbox.look() if self.inbox and decides else []
            by_file = {BY_FILE[name]: f"requests/{name}" for name in names}
            for asked in (*(requests.asked for requests in of_all), by_file):
                for what, why in asked.items():
                    found.setdefault(what, why)
            return found, _ending(self.ending, of_all)

        self.asked, self.ending = self.exchange.gather_and_decide(own, merged)

    def take(self, what: Request) -> str:
        """The reason of a request that is obeyed out of turn; '' where nobody made it."""
        return self.asked.pop(what, "")

    def obeyed(self) -> None:
        """What was decided is done: the files that asked for it may go."""
        if self.inbox:
            self.inbox.clear()

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def goes_back(self) -> bool:
        return self.ending is not None and self.ending.state == "back"

    def state_dict(self) -> dict[str, Any]:
        finished = self.ending is not None and self.ending.state == "finished"
        return {"owed": dict(self.owed), "asked": dict(self.asked),
                "ended": self.ending.reason if self.ending and finished else ""}

    def load_state_dict(self, state: Mapping[str, Any], *, same_length: bool) -> None:
        """A run that was finished stays so, unless it is longer now."""
        self.asked, self.owed = {**state["asked"], **state["owed"]}, dict(state["owed"])
        if state["ended"] and same_length:
            self.ending = Ending("finished", state["ended"])


def _outcome(of_all: Sequence[tuple[What, bool]]) -> Outcome:
    worst = max((own for own, _ in of_all), key=[*What].index)
    return Outcome(worst, worst is not What.DONE and any(changed for _, changed in of_all))


def _ending(decided: Ending | None, of_all: Sequence[Requests]) -> Ending | None:
    """What was decided once stays, but that a run which cannot continue is halted."""
    wanted = [requests.ending for requests in of_all if requests.ending]
    ending = decided or min(wanted, key=lambda ending: GRAVEST_FIRST.index(ending.state), default=None)
    for why in dict.fromkeys(why for requests in of_all for why in requests.halts):
        if ending is None or ending.state != "back":
            ending = Ending("halted", f"{ending.reason}; {why}" if ending else why)
    return ending
