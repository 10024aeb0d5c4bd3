"""What the commands do to runs, in this process: nothing is signalled, deleted or waited for that is not theirs."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from stoker import files
from stoker.daemon import __main__ as commands
from stoker.daemon import process, registry
from stoker.daemon.process import Process
from stoker.daemon.rundir import RunDir, name_problem, script_of

Make = Callable[..., RunDir]
Hold = Callable[..., subprocess.Popen[str]]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls a command: its exit code, and what it printed. One that waits without end fails after 20 s."""
    def call(*argv: str) -> tuple[int, str, str]:
        def waits(*_: object) -> None:
            raise AssertionError(f"{argv} waits without end")

        monkeypatch.setattr("sys.argv", ["daemon", *argv])
        monkeypatch.setenv("STOKER_SCRIPT", f"{argv[0]}.sh")
        before = signal.signal(signal.SIGALRM, waits)
        signal.alarm(20)
        try:
            code = commands.main()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return code, *capsys.readouterr()
    return call


# -- stop -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger() -> Iterator[Process]:
    """A process that has nothing to do with any run."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = process.find(child.pid)
        assert found
        yield found
        child.communicate()


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that would have got a signal; none does."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(pid))
    return sent


@contextmanager
def locked(run: RunDir, written: Process) -> Iterator[None]:
    """The lock is held, by whom its text does not say."""
    with open(run.lock_file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps(written.to_json()))
        lock.flush()
        yield


@pytest.mark.parametrize("differs, why", [({"started": 1}, "exist here"), ({"boot": "b"}, "does not exist here"),
                                          ({"pid": 2**22 + 1}, "does not exist here"), ({}, "so it is another")])
def test_what_a_lock_names_is_not_signalled_unless_it_holds_it(make: Make, call: Call, stranger: Process,
                                                               signalled: list[int], differs: dict[str, object],
                                                               why: str) -> None:
    run = make(state="training")
    with locked(run, replace(stranger, **differs)):
        code, out, err = call("stop", run.name, "--seconds", "0")
        assert run.state() == "training"
    assert code == 2 and not signalled and out == ""
    assert err.startswith(f"stop.sh: {run.name} was not stopped: ") and err.count("\n") == 1 and why in err


def test_what_a_planted_status_names_is_not_signalled(make: Make, call: Call, stranger: Process,
                                                      signalled: list[int]) -> None:
    run = make(state="restarting")
    run.write_status(replace(run.status(), supervisor=stranger.to_json()))
    code, _, err = call("stop", run.name, "--seconds", "0")
    assert code == 2 and not signalled and "does not hold" in err and "run.lock" in err


def test_another_user_s_process_is_not_signalled_though_it_has_the_lock_open(
        make: Make, call: Call, hold: Hold, signalled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(state="training")
    hold(run)
    monkeypatch.setattr(process, "owner", lambda pid: run.path.stat().st_uid + 1)
    code, _, err = call("stop", run.name, "--seconds", "0")
    assert code == 2 and not signalled and "not of the user who owns" in err


def test_beside_a_planted_supervisor_the_trainer_is_stopped(make: Make, call: Call, hold: Hold, stranger: Process,
                                                            signalled: list[int]) -> None:
    run = make(state="training")
    trainer = hold(run)
    run.write_status(replace(run.status(), supervisor=stranger.to_json()))
    code, _, err = call("stop", run.name, "--seconds", "0")
    assert signalled == [trainer.pid] and code == 2 and f"process {trainer.pid} of {run.name} has not stopped" in err


def test_a_trainer_that_ends_this_moment_is_no_mistake(make: Make, call: Call, stranger: Process,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(state="stopped")
    looks = iter([replace(stranger, started=1)])
    monkeypatch.setattr(RunDir, "holder", lambda self: next(looks, None) if self == run else None)
    monkeypatch.setattr(registry, "find", lambda which: run)
    assert call("stop", run.name) == (0, f"{run.name} is not running: stopped\n", "")


# -- ps -------------------------------------------------------------------------------------------------------------


GOOD = {"stage": "lm", "script": "train_lm.py", "dataset": "corpus", "preset": ""}
SPOILED: dict[str, tuple[Callable[[RunDir], object], str]] = {
    "a link to itself": (lambda run: (run.path.rename(run.path.with_name(".away")), run.path.symlink_to(run.name)),
                         "symbolic links"),
    "a type that cannot be": (lambda run: run.status_file.write_text(json.dumps({**GOOD, "created": "x"})),
                              "'x' as its created"),
    "a truth for a number": (lambda run: run.status_file.write_text(json.dumps({**GOOD, "step": True})), "its step"),
    "a list of numbers": (lambda run: run.status_file.write_text(json.dumps({**GOOD, "switched_off": [1]})), "[1]"),
    "a number too big": (lambda run: run.status_file.write_text(json.dumps({**GOOD, "loss": 10**400})), "its loss"),
    "half a supervisor": (lambda run: run.status_file.write_text(json.dumps({**GOOD, "supervisor": {"pid": 1}})),
                          "no key 'boot'"),
    "a key too many": (lambda run: run.status_file.write_text(json.dumps({**GOOD, "colour": "red"})), "'colour'"),
    "a key too few": (lambda run: run.status_file.write_text(json.dumps({"stage": "lm"})), "no key 'dataset'"),
    "a list": (lambda run: run.status_file.write_text("[]"), "list, not an object"),
    "no JSON": (lambda run: run.status_file.write_text("{"), "not JSON"),
    "deep JSON": (lambda run: run.status_file.write_text('{"stage":' + "[" * 99999), "nested too deeply"),
    "no text": (lambda run: run.status_file.write_bytes(b"\xff"), "decode"),
    "a pipe": (lambda run: (run.status_file.unlink(), os.mkfifo(run.status_file)), "instead of a regular file"),
    "a device": (lambda run: (run.status_file.unlink(), run.status_file.symlink_to("/dev/zero")), "of a regular file"),
    "a folder": (lambda run: (run.status_file.unlink(), run.status_file.mkdir()), "Is a directory"),
    "1 GB": (lambda run: os.truncate(run.status_file, 2**30), "more than 1,048,576"),
    "a pipe for a lock": (lambda run: (run.lock_file.unlink(), os.mkfifo(run.lock_file)), "run.lock cannot be read"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_shown(make: Make, call: Call, what: str) -> None:
    spoil, why = SPOILED[what]
    good, bad = make("good"), make("bad", "project/result")
    spoil(bad)
    code, out, err = call("ps")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["RUN", "good"]
    assert err.startswith(f"ps.sh: {bad.path}") and why in err and err.count("\n") == 1, err
    assert call("print", "good", "folder") == (0, f"{good.path}\n", "")
    assert call("ps", "bad") == (2, "", err), "and where it is asked for"


def test_deaths_that_cannot_be_read_are_named_too(make: Make, call: Call, hold: Hold) -> None:
    run = make(state="training")
    hold(run)
    os.mkfifo(run.deaths)
    code, out, err = call("ps")
    assert code == 0 and len(out.splitlines()) == 1 and err.startswith(f"ps.sh: {run.deaths} cannot be read: ")


@pytest.mark.parametrize("file", ["run.lock", "status.json"])
def test_a_file_that_is_another_user_s_to_read_is_named(make: Make, call: Call, monkeypatch: pytest.MonkeyPatch,
                                                        file: str) -> None:
    make("good")
    bad, opened = make("bad"), os.open

    def refuse(path: str | Path, *given: int, **more: int) -> int:
        if Path(path) == bad.path / file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *given, **more)

    monkeypatch.setattr(os, "open", refuse)
    code, out, err = call("ps")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["RUN", "good"]
    assert err == f"ps.sh: {bad.path / file} cannot be read: Permission denied; its owner can allow it\n"


@pytest.mark.parametrize("heartbeat, eta", [("NaN", "Infinity"), ("-Infinity", "NaN"), ("1e999", "-1e999")])
def test_times_that_are_no_times_are_no_reason_to_fail(make: Make, call: Call, heartbeat: str, eta: str) -> None:
    run = make()
    run.status_file.write_text(f'{json.dumps(GOOD)[:-1]}, "heartbeat": {heartbeat}, "eta_seconds": {eta}}}')
    code, out, err = call("ps")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    assert call("ps", "--json")[0] == 0


def test_a_name_that_no_file_can_have_is_no_run(call: Call) -> None:
    code, _, err = call("stop", "x" * 300)
    assert code == 2 and "there is no run" in err and err.count("\n") == 1


# -- names ----------------------------------------------------------------------------------------------------------


EVIL = "evil\x1b[2J\nrun\x9b\u202e"


def test_no_name_reaches_the_terminal_as_a_command_to_it(make: Make, call: Call) -> None:
    run = make(EVIL)
    run.write_status(replace(run.status(), reason="\x1b]0;title\x07"))
    for argv in (["ps"], ["stop", str(run.path)], ["delete", str(run.path), "--yes"]):
        out, err = call(*argv)[1:]
        assert "\\x1b" in out + err and (out + err).replace("\n", "").isprintable(), argv
    assert not run.path.exists()


def test_a_name_that_no_command_takes_is_shown_as_the_folder(make: Make, call: Call) -> None:
    for name in ("-x", "two words", "4711"):
        run = make(name)
        assert re.search(rf"^{re.escape(str(run.path))} +stopped", call("ps")[1], re.MULTILINE)
        assert call("print", str(run.path), "name") == (0, f"{name}\n", "")


@pytest.mark.parametrize("name", ["a", "lm_corpus_nano_20240101-000000", "ünï", "本", "run-2", "a.b+c=d@e,f", "4711a",
                                  "_"])
def test_names_that_every_command_finds(make: Make, call: Call, name: str) -> None:
    assert not name_problem(name)
    make(name)
    assert call("print", name, "name") == (0, f"{name}\n", "")


@pytest.mark.parametrize("name", ["-x", "--help", "a b", " a", "a ", "a\n", "\x1b[31m", "4711", "²", "newest", ".a",
                                  "a/b", "a'b", "a$b", "a*", "~", "", "a\u202eb"])
def test_names_that_a_command_would_take_for_something_else(name: str) -> None:
    assert name_problem(name)


# -- delete ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["run.lock", "run_config.json"])
def test_what_merely_has_a_status_is_not_deleted(make: Make, call: Call, lacking: str) -> None:
    run = make()
    (run.path / lacking).unlink()
    code, _, err = call("delete", str(run.path), "--yes")
    assert code == 2 and f"nothing was deleted: {run.path} has no {lacking}" in err and err.count("\n") == 1
    assert run.status_file.exists() and not (run.path / lacking).exists(), "nor is it made to look like a run"


def test_a_link_to_elsewhere_is_not_followed(make: Make, call: Call, results: Path) -> None:
    run = make("moved", "elsewhere")
    results.mkdir(parents=True)
    (results / "here").symlink_to(run.path)
    code, _, err = call("delete", "here", "--yes")
    assert code == 2 and f"{results / 'here'} is a link to {run.path}" in err and run.path.exists()
    assert call("delete", "moved", "--yes")[0] == 0, "by its own name, and with a link to itself beside it"
    assert not run.path.exists()


def test_by_the_name_of_a_part_no_run_is_deleted(make: Make, call: Call) -> None:
    run = make("kept")
    snapshot = run.snapshots / "snapshot_step_00000001"
    snapshot.mkdir()
    (snapshot / "manifest.json").write_text("{}")
    for part in (snapshot, run.path.parent / "step_1.pt", run.path.parent / "thinker_best.pt", run.path.parent):
        code, _, said = call("delete", str(part), "--yes")
        assert code == 2 and f"nothing was deleted: {part} is not the folder of a run: delete.sh deletes whole" in said
    assert run.status_file.exists()


def test_by_our_own_link_the_newest_is_deleted(make: Make, call: Call) -> None:
    run = make("lm_corpus_20240101-000000", "project/result")
    run.announce("lm", "corpus")
    (run.path.parent / "loop").symlink_to("loop")
    assert call("delete", "lm_corpus", "--yes")[0] == 0
    assert [path.name for path in run.path.parent.iterdir()] == ["loop"]


def test_when_the_newest_is_deleted_the_link_points_at_the_one_before(make: Make, call: Call) -> None:
    oldest, before, newest, other = make("a"), make("b"), make("c"), make("d", dataset="other")
    newest.announce("lm", "corpus")
    assert call("delete", "c", "--yes")[0] == 0
    assert (oldest.path.parent / "lm_corpus").resolve() == before.path != other.path


def test_what_a_supervisor_starts_again_is_not_deleted(make: Make, call: Call, stranger: Process) -> None:
    run = make(state="restarting")
    run.write_status(replace(run.status(), supervisor=stranger.to_json()))
    code, _, err = call("delete", run.name, "--yes")
    assert code == 2 and f"watched by process {stranger.pid}" in err and run.path.exists()


# -- print ----------------------------------------------------------------------------------------------------------


def planted(run: RunDir, script: str) -> None:
    run.write_status(replace(run.status(), script=script))


@pytest.mark.parametrize("script", ["../../evil.py", "train_evil.py", "", "launch.py", "../training/train_lm.py",
                                    "evil.py", "-m"])
def test_only_a_script_of_ours_is_started_for_a_run(make: Make, call: Call, script: str) -> None:
    run = make()
    assert call("print", run.name, "script") == (0, f"{files.PACKAGE / 'training/train_lm.py'}\n", "")
    planted(run, script)
    code, out, err = call("print", run.name, "script")
    assert code == 2 and out == "" and "neither a script of" in err and err.count("\n") == 1


@pytest.mark.parametrize("by", ["somebody else", "a copy", "another user"])
def test_a_script_from_outside_is_started_for_a_run_made_here_only(make: Make, call: Call, tmp_path: Path, by: str,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    run, script = make(), tmp_path / "my_stage.py"
    script.touch()
    planted(run, str(script))
    assert call("print", run.name, "script") == (0, f"{script}\n", ""), "of a run that this user made here"
    if by == "another user":
        monkeypatch.setattr(os, "geteuid", lambda: run.path.stat().st_uid + 1)
    elif by == "a copy":
        run = RunDir(run.path.rename(tmp_path / "moved"))
    else:
        next((files.home() / "runs").iterdir()).unlink()
    code, out, err = call("print", str(run.path), "script")
    assert code == 2 and out == "" and "was made elsewhere, or by another user" in err and err.count("\n") == 1


def test_a_script_that_was_moved_is_not_found(make: Make, call: Call, tmp_path: Path) -> None:
    run = make()
    planted(run, str(tmp_path / "gone.py"))
    code, out, err = call("print", run.name, "script")
    assert code == 2 and out == "" and f"./run/start.sh SCRIPT --resume {run.name}" in err


def test_a_status_names_our_scripts_by_name_and_others_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours also where they are started through the link to the package."""
    assert script_of(str(files.CHECKOUT / "run/python/stoker/training/train_lm.py")) == "train_lm.py"  # type: ignore
    monkeypatch.chdir(tmp_path)
    assert script_of("train_lm.py") == str(tmp_path / "train_lm.py")


def test_a_process_of_another_container_is_none_to_wait_for(make: Make, call: Call, stranger: Process) -> None:
    run = make(state="training")
    with locked(run, replace(stranger, started=1)):
        assert call("print", run.name, "pid") == (0, "\n", "")
    with locked(run, stranger):
        assert call("print", run.name, "pid") == (0, f"{stranger.pid}\n", "")


def test_the_list_of_runs_may_be_no_folder(make: Make, call: Call) -> None:
    make("good", "project/result")
    (files.home() / "runs").rename(files.home() / "away")
    (files.home() / "runs").touch()
    assert "good" in call("ps")[1]


def test_what_belongs_to_another_user_is_refused_in_a_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(commands, "_stop", refuse)
    assert call("stop", "1") == (2, "", "stop.sh: Operation not permitted: that belongs to another user\n")
