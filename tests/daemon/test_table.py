"""What `ps.sh` makes of a run."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from stoker.daemon import __main__ as commands
from stoker.daemon import table
from stoker.daemon.rundir import RunDir

Make = Callable[..., RunDir]


@pytest.mark.parametrize("seconds, words", [
    (None, "-"), (0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (725, "12m05s"), (3600, "1h00m"), (3725, "1h02m"),
    (86399, "23h59m"), (86400, "1d00h"), (3 * 86400 + 4 * 3600, "3d04h"),
])
def test_durations(seconds: float | None, words: str) -> None:
    assert table.duration(seconds) == words


def test_a_line_a_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(state="stopped", pid=4711)
    run.write_status(replace(run.status(), step=100, of=2500, loss=4.2341, reason="SIGTERM received", speed="fast",
                             eta_seconds=9.0, switched_off=["TensorBoard"]))
    now = run.status().heartbeat
    monkeypatch.setattr("time.time", lambda: now + 8)
    heading, line = table.table([table.row(run), table.row(make("another_and_longer_name"))]).splitlines()[:2]
    assert heading.split() == list(table.COLUMNS)
    assert line.split() == [run.name, "stopped", "-", "100/2500", "4.234", "-", "-", "-", "8s", "ago", "SIGTERM",
                            "received", "(switched", "off:", "TensorBoard)"], "no PID, speed or ETA without a trainer"
    assert heading.index("STATE") == line.index("stopped")


def test_a_finished_run_shows_how_long_it_took_and_was_to_take(make: Make) -> None:
    run = make(state="finished")
    run.write_status(replace(run.status(), reason="all steps done", busy_seconds=392.4, expected_seconds=370.0))
    assert table.table([table.row(run)]).endswith("all steps done; took 6m32s, estimated 6m10s")
    run.write_status(replace(run.status(), state="stopped"))
    assert "took" not in table.table([table.row(run)])


@pytest.mark.parametrize("metric, value, words", [
    ("wer", 1.0, "wer 100.0%"), ("wer", 0.3412, "wer 34.1%"), ("acc", 0.94, "acc 94.0%"), ("ppl", 73.14, "ppl 73.1"),
    ("loss", 4.23412, "loss 4.234"), ("recall_5", 0.0, "recall_5 0.0%"), ("cer", math.inf, "cer inf%"),
    ("cer", 0.00042, "cer 0.042%"), ("loss", 0.000042, "loss 4.2e-05"),
    ("", 0.5, "0.500"), ("wer", None, "-"), ("error", 12.0, "error 12.000")])
def test_the_best_is_shown_with_its_metric(make: Make, metric: str, value: float | None, words: str) -> None:
    run = make()
    run.write_status(replace(run.status(), best=value, best_metric=metric, best_mode="min"))
    heading, line = table.table([table.row(run)]).splitlines()
    assert line[heading.index("BEST"):heading.index("SPEED")].strip() == words
    row = table.row(run)
    assert (row["best"], row["best_metric"], row["best_mode"]) == (value, metric, "min")


@pytest.mark.parametrize("value, places, words", [
    (4.2341, 3, "4.234"), (-4.2341, 3, "-4.234"), (0.0, 3, "0.000"), (0.0123, 3, "0.012"), (0.0042, 3, "0.0042"),
    (4.2e-05, 3, "4.2e-05"), (-4.2e-05, 3, "-4.2e-05"), (999999.0, 3, "999999.000"), (12345678.0, 3, "1.235e+07"),
    (73.14, 1, "73.1"), (0.94, 1, "0.94"), (3e-7, 6, "3e-07"), (3e-4, 6, "0.000300"), (math.nan, 3, "nan"),
    (-math.inf, 3, "-inf")])
def test_a_number_shows_two_digits_however_small(value: float, places: int, words: str) -> None:
    assert table.number(value, places) == words


def test_json_is_json_though_the_loss_is_not_a_number(make: Make, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    run = make(state="failed")
    run.write_status(replace(run.status(), loss=math.nan, best=math.inf))
    monkeypatch.setattr("sys.argv", ["daemon", "ps", "--json"])
    assert commands.main() == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (row["run"], row["state"], row["loss"], row["best"], row["pid"]) == (run.name, "failed", "nan", "inf", None)


def test_a_wrong_option_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["daemon", "ps", "--jsno"])
    monkeypatch.setenv("STOKER_SCRIPT", "ps.sh")
    assert commands.main() == 2
    assert capsys.readouterr().err == "ps.sh: unrecognized arguments: --jsno; see --help\n"
