"""All requests meet in one place, one process decides, and all processes obey at the same step."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from stoker.daemon.rundir import PROJECT
from stoker.training.core.decisions import Decisions, What
from stoker.training.core.ending import Ending
from stoker.training.core.exchange import Alone
from stoker.training.core.signals import Signals
from together import drawn
from toys import Config

SCENARIOS = ["nothing", "signal", "signal while logging", "signal while evaluating", "time", "clock", "NaN", "memory",
             "memory in evaluation", "memory in one evaluation", "NaN in the weights", "disk", "file"]
RANDOM = [f"random {seed}" for seed in range(12)]
SIZE = 2
PROGRAM = """
from stoker.command import importing

with importing():
    import torch._dynamo
    import together

together.main()
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes did in each scenario. One that waits for ever fails within a minute."""
    folder = tmp_path_factory.mktemp("together")
    path = os.pathsep.join([str(PROJECT / "run/python"), str(PROJECT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "STOKER_HOME": str(folder / "home"), "GLOO_SOCKET_IFNAME": "lo"}
    program = [sys.executable, "-c", PROGRAM, str(folder)]
    processes = [subprocess.Popen([*program, str(rank), str(SIZE), *SCENARIOS, *RANDOM], env=environment, text=True,
                                  stderr=subprocess.PIPE) for rank in range(SIZE)]
    try:
        for process in processes:
            _, error = process.communicate(timeout=180)
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", [*SCENARIOS, *RANDOM])
def test_all_processes_do_the_same(together: list[dict[str, Any]], name: str) -> None:
    """Also those of which nothing was asked: the same events at the same steps, and the same end."""
    first, *others = (process[name] for process in together)
    if name == "memory":  # one has done the step whose trace is lost, the other has not
        for process in (first, *others):
            process["seen"] = process["seen"][[event.endswith("on_stop") for event in process["seen"]].index(True) + 1:]
            process["sittings"][0][0] = 3
    for what in ("seen", "micro", "owed", "sittings"):
        assert [other[what] for other in others] == [first[what]] * (SIZE - 1), what
    if name not in ("disk", "NaN in the weights"):  # there the one that is in trouble has fewer
        assert [other["kept"] for other in others] == [first["kept"]] * (SIZE - 1)
    if name != "NaN in the weights":
        assert [other["weights"] for other in others] == [first["weights"]] * (SIZE - 1)


@pytest.mark.parametrize("name, sittings", [
    ("nothing", [[9, "finished", "all steps done"]]),
    ("signal", [[5, "stopped", "SIGTERM received"]]),
    ("signal while logging", [[4, "stopped", "SIGTERM received"]]),
    ("signal while evaluating", [[4, "stopped", "SIGTERM received"]]),
    ("time", [[1, "stopped", "--max_minutes 1e-09 are over"]]),
    ("clock", [[9, "finished", "all steps done"]]),
    ("NaN", [[4, "back", "NaN or Inf in the loss at step 4"], [9, "finished", "all steps done"]]),
    ("memory", [[3, "back", "out of memory"], [9, "finished", "all steps done"]]),
    ("memory in evaluation",
     [[9, "finished", "all steps done, the last evaluation ran out of memory: ./run/evaluate.sh tries again"]]),
    ("memory in one evaluation",
     [[9, "finished", "all steps done, the last evaluation ran out of memory: ./run/evaluate.sh tries again"]]),
    ("file", [[9, "finished", "all steps done"]]),
])
def test_what_one_process_asks_for_is_done_by_all(together: list[dict[str, Any]], name: str, sittings: Any) -> None:
    found = [process[name]["sittings"] for process in together]
    if name == "memory":  # the other one had done the step, so the state of both is thrown away
        found = [[[3, *sitting[1:]] if sitting[1] == "back" else sitting for sitting in each] for each in found]
    assert found == [sittings] * SIZE


def test_what_only_one_process_meets_reaches_the_others(together: list[dict[str, Any]]) -> None:
    first = together[0]
    assert first["signal while evaluating"]["owed"] == ["eval", "log"]
    assert first["signal while evaluating"]["seen"][-2:] == ["4 on_eval_end without scores", "4 on_stop"]
    assert "4 on_eval_end without scores" in first["memory in evaluation"]["seen"]
    assert "4 on_eval_end with again/error, again/loss" in first["memory in one evaluation"]["seen"]
    assert first["memory"]["micro"] == 2, "though its own memory sufficed"
    assert [name[-2:] for name in first["clock"]["kept"]] == [f"0{step}" for step in range(10)]
    assert {*first["file"]["kept"]} - {*first["nothing"]["kept"]} == {"snapshot_step_00000001"}
    for process in together:
        (step, state, reason), = process["disk"]["sittings"]
        assert (step in (4, 5), state) == (True, "halted")  # when the thread that writes has met it
        assert reason.startswith("no snapshot could be written for 1e-09 minutes; ")
        (step, state, reason), = process["NaN in the weights"]["sittings"]
        assert (step, state, reason) == (4, "halted", "NaN or Inf in weights or optimizer")


# -- a model of it --------------------------------------------------------------------------------------------------


def expected(seed: int) -> list[str]:
    """The events of a run of 9 steps with the requests that together.py draws: by a rule, not by the loop."""
    requests = [(rank, step, what) for rank in range(SIZE) for step, what in drawn(seed, rank)]
    events = list[str]()
    for step in range(1, 10):
        asked = {what for _, at, what in requests if at == step}
        events.append(f"{step} on_step_end")
        ends = asked & {"finished", "stopped", "halted", "back"}
        if "back" in ends and _wins(requests, step):
            return [*events, f"{step} on_stop"]
        evaluates = "eval" in asked or step in (4, 8, 9)
        if evaluates:
            events += [f"{step} on_eval_start", f"{step} on_eval_end"]
        if evaluates or "log" in asked or step == 1 or step % 2 == 0:
            events.append(f"{step} on_log")
        if ends:
            return [*events, f"{step} on_stop"]
    return [*events, "9 on_stop"]


def _wins(requests: list[tuple[int, int, str]], step: int) -> bool:
    """Whether a process asked to go back before it asked for another end: in one process the first request counts."""
    ends = [next((what for by, at, what in requests if (by, at) == (rank, step)
                  and what in ("finished", "stopped", "halted", "back")), "") for rank in range(SIZE)]
    return "back" in ends


@pytest.mark.parametrize("name", RANDOM)
def test_random_requests_of_random_processes(together: list[dict[str, Any]], name: str) -> None:
    assert [process[name]["seen"] for process in together] == [expected(int(name.split()[1]))] * SIZE


# -- one process ----------------------------------------------------------------------------------------------------


def alone() -> Decisions:
    return Decisions(Config(), Signals(), None, Alone())


def test_a_request_is_kept_until_it_is_decided_on() -> None:
    decisions = alone()
    decisions.ask("eval", "first")
    decisions.ask("eval", "second")
    assert decisions.agree() is None and decisions.asked == {"eval": "first"}
    decided = decisions.decide()
    assert (decided.eval, decided.log, decided.save, decided.ending) == ("first", "", "", None)
    assert decisions.asked == {} and decisions.owed == {"eval": "first"}
    assert decisions.decide().eval == ""


def test_the_first_ending_counts_and_a_halt_adds_to_it() -> None:
    decisions = alone()
    decisions.ask("stop", "early stopping")
    decisions.go_back(3, "spike", "a spike")
    assert decisions.agree() == Ending("finished", "early stopping")
    decisions.ask("stop", "later", "stopped")
    decisions.halt("the disk is full")
    assert decisions.agree() == Ending("halted", "early stopping; the disk is full")


def test_the_gravest_ending_of_several_processes_counts() -> None:
    class Two:
        """Another process, which asks for something too."""

        def gather_and_decide(self, wish: Any, decide: Any) -> Any:
            other = alone()
            other.go_back(3, "spike", "a spike")
            other.halt("the disk is full")
            theirs: list[Any] = []
            other.exchange = type("Tap", (), {"gather_and_decide": lambda self, w, d: (theirs.append(w), d([w]))[1]})()
            other.agree()
            return decide([wish, *theirs])

    decisions = Decisions(Config(), Signals(), None, Two())
    decisions.ask("stop", "SIGTERM received", "stopped")
    assert decisions.agree() == Ending("back", "a spike", 3, "spike"), "a state that failed is not saved"


@pytest.mark.parametrize("own, changed, what, broken", [
    (What.DONE, True, What.DONE, False), (What.OUT_OF_MEMORY, False, What.OUT_OF_MEMORY, False),
    (What.OUT_OF_MEMORY, True, What.OUT_OF_MEMORY, True), (What.ABANDONED, False, What.ABANDONED, False)])
def test_the_outcome_of_a_try(own: What, changed: bool, what: What, broken: bool) -> None:
    assert alone().outcome(own, changed=changed) == (what, broken)


def test_the_state_survives() -> None:
    decisions, again = alone(), alone()
    decisions.ask("eval", "interval")
    decisions.ask("log", "interval")
    decisions.decide()
    decisions.ask("save", "later")
    decisions.ask("stop", "early stopping")
    decisions.agree()
    state = decisions.state_dict()
    again.load_state_dict(state, same_length=True)
    assert (again.owed, again.ending) == (decisions.owed, Ending("finished", "early stopping"))
    assert again.asked == {"eval": "interval", "log": "interval", "save": "later"}, "what is owed is done first"
    longer = alone()
    longer.load_state_dict(state, same_length=False)
    assert longer.ending is None
