"""Calls the callbacks of a run at each event, and handles those that fail."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from stoker import files
from stoker.config import UserError
from stoker.training.core.callback import Callback, in_order, listeners
from stoker.training.core.snapshots import unsavable

if TYPE_CHECKING:
    from stoker.training.trainer import Trainer

log = logging.getLogger(__name__)


class Events:
    """The callbacks of a run, in the order in which they are called."""

    def __init__(self, callbacks: list[Callback]):
        self.callbacks = in_order(callbacks)
        self.listeners = listeners(callbacks)
        self.switched_off: list[str] = []  # keys of the monitors that failed
        self._hindered: set[str] = set()  # keys of monitors that could not write: logged once

    def emit(self, event: str, trainer: "Trainer", *args: Any, guarded: bool = False) -> None:
        """Call `event` of every callback that has it. `guarded`: log whatever a callback raises, and raise nothing."""
        for callback in list(self.listeners[event]):
            self._guarded(callback, lambda: getattr(callback, event)(trainer, *args), guarded)

    def check_states(self) -> None:
        """Raises UserError where no snapshot can hold the state of a callback that changes the training, or a callback
        cannot load its state. Called before `on_start`; a callback without a state until then is checked at the first
        snapshot."""
        for callback in self.callbacks:
            if not callback.is_monitor:
                kind = type(callback)
                if kind.state_dict is not Callback.state_dict and kind.load_state_dict is Callback.load_state_dict:
                    raise UserError(f"callback {callback.key} has state_dict() but no load_state_dict(), so no run "
                                    "with it could be resumed: add it")
                try:
                    _state(callback)
                except UserError:
                    raise
                except Exception as error:
                    log.debug("%s has no state before on_start: %r", callback.key, error)

    def state_dict(self) -> dict[str, Any]:
        """The states of the callbacks that have one, and whether each of these changes the training."""
        return {c.key: {"acts": not c.is_monitor, "state": state}
                for c in self.callbacks if (state := self._guarded(c, partial(_state, c)))}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Raises UserError where a callback that changes the training has a state but is missing now."""
        left = dict(states)
        for callback in self.callbacks:
            state = left.pop(callback.key, {"state": {}})["state"]
            self._guarded(callback, lambda: callback.load_state_dict(state))
        for key, saved in left.items():
            if saved["acts"]:
                raise UserError(f"the snapshot holds the state of {key}, which had a hand in this training and is "
                                "missing now: give the options that the run was started with")
            log.warning("the state of %s is dropped: this run does not have it", key)

    def _guarded(self, callback: Callback, call: Callable[[], Any], guarded: bool = False) -> Any:
        """Call a callback. A monitor that raises is logged and switched off, unless a full disk has kept it from
        writing; an exception of any other callback ends the run."""
        if callback.key in self.switched_off and not guarded:
            return None
        try:
            return call()
        except Exception as error:
            if not (guarded or callback.is_monitor):
                raise
            if callback.is_monitor and files.may_pass(error):
                if callback.key not in self._hindered:
                    log.error("%s could not write: %s; training goes on", callback.key, error)
                self._hindered.add(callback.key)
                return None
            log.exception("%s failed%s", callback.key, "" if guarded else "; it is switched off")
            self._switch_off(callback)
            return None

    def _switch_off(self, callback: Callback) -> None:
        self.switched_off.append(callback.key)
        for event, called in self.listeners.items():
            if callback in called and event != "close":
                called.remove(callback)


def _state(callback: Callback) -> dict[str, Any]:
    """Its state. Raises UserError where no snapshot can hold it."""
    state = callback.state_dict()
    if found := unsavable(state, "state_dict()"):
        raise UserError(f"callback {callback.key}: {found}, which no snapshot can hold: return plain values and "
                        "tensors")
    return state
