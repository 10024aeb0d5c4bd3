"""When silence is a stall: budgets that are learnt, phases that are generous; sleep, pauses and full disks."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stoker import progress
from stoker.daemon import process, pulse, rundir
from stoker.daemon import table as tables
from stoker.daemon.pulse import EVALUATING, SAVING, STARTING, TRAINING, Patience, Pulse
from stoker.daemon.rundir import RunDir

Make = Callable[..., RunDir]
Hold = Callable[..., subprocess.Popen[str]]


class Clock:
    """Time that passes when it is told to, for the one who marks and for those who look."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.shift = time.time() - self.now

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.shift

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (pulse, rundir, tables):
        monkeypatch.setattr(module, "time", clock)
    return clock


def steps(beat: Pulse, clock: Clock, *seconds: float) -> None:
    for each in seconds:
        clock.now += each
        beat.enter(TRAINING, state="training")


def test_the_first_step_has_time_to_compile_and_the_others_as_long_as_is_usual(make: Make, clock: Clock) -> None:
    beat = Pulse(make(), Patience(unknown=1800, least=60, times_usual=20, times_longest=3))
    beat.enter(STARTING)
    clock.now += 900
    assert beat.budget == 1800
    steps(beat, clock, 1)
    assert beat.budget == 1800, "one step tells nothing: it was not the first of its kind"
    steps(beat, clock, 1)
    assert beat.budget == 60
    steps(beat, clock, 10, *[10] * 100)
    assert beat.budget == pytest.approx(200, rel=0.01)
    steps(beat, clock, 150)
    assert beat.budget == pytest.approx(480, rel=0.01), "20 times what is usual by now"
    steps(beat, clock, *[0.1] * 200)
    assert beat.budget == pytest.approx(450), "and three times the longest"


def test_a_slow_evaluation_is_no_stall(make: Make, hold: Hold, clock: Clock) -> None:
    """Its last part, where samples are made, may be a thousand times as long as a batch."""
    run = make()
    hold(run)
    beat = Pulse(run)
    beat.enter(STARTING)
    steps(beat, clock, 1, 1, 1)
    for _ in range(3):
        beat.enter(EVALUATING, state="evaluating")
        for seconds in [0.1] * 50 + [170.0]:
            clock.now += seconds
            assert run.state() == "evaluating"
            beat.mark()
        clock.now += 170
        assert run.state() == "evaluating"
        beat.back(state="training")
        steps(beat, clock, 1)
    clock.now += 61
    assert run.state() == "stalled", "the steps between them keep their own pace"


def test_a_stall_is_reported_with_its_phase(make: Make, hold: Hold, clock: Clock) -> None:
    run = make()
    hold(run)
    beat = Pulse(run)
    steps(beat, clock, 1, 1, 1, 1)
    clock.now += 59
    assert run.state() == "training"
    clock.now += 66
    row = tables.row(run)
    assert (row["state"], row["phase"], row["stalled_seconds"]) == ("stalled", "training", 125.0)
    assert tables.table([row]).endswith("no progress for 2m05s in phase 'training', at most 1m00s are usual")
    assert run.status().state == "training", "it is seen, and never written"
    beat.mark()
    assert run.state() == "training"


def test_back_is_where_it_was(make: Make) -> None:
    beat = Pulse(make())
    beat.enter(STARTING)
    beat.enter(SAVING)
    assert beat.run.status().phase == SAVING and beat.budget == pulse.PATIENCE.unknown
    beat.back()
    assert beat.phase == beat.run.status().phase == STARTING


def test_it_writes_once_a_second(make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    run, written = make(), list[float]()
    monkeypatch.setattr(RunDir, "write_status", lambda self, status, **_: written.append(clock.now))
    beat = Pulse(run)
    for _ in range(641):
        clock.now += 1 / 64  # added without rounding, wherever the clock began
        beat.mark(step=1)
    assert len(written) == 11


def test_the_last_figures_are_written_with_the_next_sign(make: Make, clock: Clock) -> None:
    beat = Pulse(make())
    beat.mark(step=1)
    clock.now += 0.5
    beat.mark(step=2)
    assert beat.run.status().step == 1
    clock.now += 0.6
    beat.mark()
    assert beat.run.status().step == 2


def test_a_full_disk_is_no_stall(make: Make, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    hold(run)
    beat = Pulse(run, Patience(least=0.5, times_usual=0, times_longest=0))
    for _ in range(3):
        beat.enter(TRAINING, state="training")
    beat.write()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunDir, "write_status", full)
    for _ in range(8):
        time.sleep(0.1)
        beat.write()
        assert run.state() == "training"
    time.sleep(0.6)
    assert run.state() == "stalled"


def test_sleep_is_no_stall(make: Make, hold: Hold, clock: Clock) -> None:
    """While the machine sleeps, the clock on the wall goes on and the monotonic one does not."""
    run = make()
    hold(run)
    beat = Pulse(run)
    steps(beat, clock, 1, 1, 1, 1)
    clock.shift += 8 * 3600
    assert run.state() == "training"
    clock.now += 70
    assert run.state() == "stalled"


def test_a_pause_is_no_stall_when_it_is_over(make: Make, hold: Hold) -> None:
    run = make()
    trainer = hold(run, "import os, signal; r = RunDir(Path(sys.argv[1])); "
                        "signal.signal(signal.SIGCONT, lambda *_: r.note_continued())")
    run.write_status(replace(run.status(), state="training", phase=TRAINING, budget=1.0))
    os.kill(trainer.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, trainer.pid, os.WSTOPPED | os.WNOWAIT)
    time.sleep(1.5)
    assert run.state() == "paused"
    os.kill(trainer.pid, signal.SIGCONT)
    until = time.monotonic() + 5
    while process.is_paused(trainer.pid) or run.silent_seconds(run.status()) > 1:
        assert time.monotonic() < until
    assert run.state() == "training"
    time.sleep(1.1)
    assert run.state() == "stalled", "the silence counts from there"


def test_marks_reach_who_listens_and_no_child(tmp_path: Path) -> None:
    heard: list[str] = []

    class Ear:
        def mark(self) -> None:
            heard.append("mark")

        def enter(self, phase: str) -> None:
            heard.append(phase)

        def back(self) -> None:
            heard.append("back")

    progress.mark()
    with progress.heard(Ear()):
        list(progress.tracked([(1, "a"), (1, "b")], "Reading", 2, "bytes"))
        with progress.during("saving"):
            progress.mark()
        if not (child := os.fork()):
            progress.mark()
            os._exit(len(heard))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(heard) == 5
    progress.mark()
    assert heard == ["mark", "mark", "saving", "mark", "back"]
