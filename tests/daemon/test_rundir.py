"""A run's directory under everything that may happen to it: two at a time, kills, forks, readers in between."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from stoker import files
from stoker.config import UserError
from stoker.daemon import registry, rundir
from stoker.daemon import table as tables
from stoker.daemon.pulse import Pulse
from stoker.daemon.rundir import RunDir, Status
from stoker.training.core import manifest

Make = Callable[..., RunDir]
Hold = Callable[..., subprocess.Popen[str]]
LM = Status("lm", "train_lm.py", "corpus", "nano")


def until(holds: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# -- making one -----------------------------------------------------------------------------------------------------


def test_two_starts_in_one_second_get_two(tmp_path: Path) -> None:
    first, second = (rundir.create(tmp_path, "lm_corpus", LM) for _ in range(2))
    assert (first.name, second.name) == ("lm_corpus", "lm_corpus-2")
    assert first.status().state == "preparing" and first.status().pid == os.getpid()


def test_starts_at_the_same_time_get_one_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: rundir.create(tmp_path, "run", LM), range(24)))
    assert len({run.path for run in made}) == 24
    assert {run.path for run in registry.runs()} >= {run.path for run in made}


def test_a_start_that_is_faster_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether a name is free and the folder, another start makes that folder."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    answers, exists = iter([False]), os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: next(answers, exists(path)))
    assert rundir.create(tmp_path, "run", LM).name == "run-2"


@pytest.mark.parametrize("name, dataset, preset, wanted", [
    ("lm", "pydocs", "nano", "lm_pydocs_nano_"), ("lm", "/data/My corpus.v2.txt", "", "lm_My-corpus.v2_"),
    ("lm", "wikitext-103", "small", "lm_wikitext-103_small_"), ("lm", "texts/", "", "lm_texts_"),
    ("lm", "corpus.txt", "", "lm_corpus_"), ("lm", "..", "", "lm_data_"), ("lm", "ünï/ßø", "", "lm_ßø_"),
    ("lm", "本.txt", "", "lm_本_"),
])
def test_a_run_is_named_by_what_it_is(name: str, dataset: str, preset: str, wanted: str) -> None:
    made = rundir.run_name(name, dataset, preset)
    assert made.startswith(wanted)
    time.strptime(made.removeprefix(wanted), "%Y%m%d-%H%M%S")


def test_a_folder_that_cannot_be_written_is_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (Path("/proc/result"), tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError) as caught:
            rundir.create(folder, "run", LM)
        assert len(caught.value.problems) == 1 and f"--result_dir {folder}" in caught.value.problems[0]
    assert os.listdir(tmp_path) == ["file"] and registry.runs() == []


def test_a_full_disk_leaves_no_half_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        rundir.create(tmp_path / "result", "run", LM)
    assert os.listdir(tmp_path / "result") == []


def test_a_list_of_runs_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"STOKER_HOME {tmp_path}/file: .*Not a directory"):
        rundir.create(tmp_path / "result", "run", LM)
    assert os.listdir(tmp_path / "result") == []


def test_removing_takes_every_link_along(make: Make) -> None:
    kept, gone = make("kept"), make("gone")
    gone.announce("lm", "corpus")
    gone.remove()
    assert sorted(path.name for path in kept.path.parent.iterdir()) == ["kept"]
    assert [link.resolve() for link in (files.home() / "runs").iterdir()] == [kept.path]


def test_the_newest_run_is_linked(make: Make) -> None:
    link = make("old").path.parent / "lm_my-corpus"
    for name in ("older", "newer"):
        run = make(name)
        run.announce("lm", "data/my corpus.txt")
        assert link.is_symlink() and link.resolve() == run.path


def test_an_older_run_that_is_resumed_does_not_take_the_link(make: Make) -> None:
    older, newer = make("older"), make("newer")
    for run in (newer, older):
        run.announce("lm", "corpus")
    assert (older.path.parent / "lm_corpus").resolve() == newer.path


def test_a_run_that_bears_the_link_s_name_stays(make: Make) -> None:
    run, other = make("lm_corpus"), make("other")
    run.announce("lm", "corpus")
    other.announce("lm", "corpus")
    assert not run.path.is_symlink() and run.status().stage == "lm"


def test_every_start_has_its_own_log(make: Make) -> None:
    run = make()
    first = run.new_log()
    assert run.latest_log.resolve() == first
    second = run.new_log()
    assert first != second and first.exists() and run.latest_log.resolve() == second


# -- the lock -------------------------------------------------------------------------------------------------------


def test_one_trainer_a_run(make: Make, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "SECONDS_TO_LOCK", 0.2)
    run = make()
    assert run.holder() is None
    trainer = hold(run)
    with pytest.raises(UserError, match=f"by process {trainer.pid}; stop it first: ./run/stop.sh {run.name}"):
        with run.lock():
            pass
    holder = run.holder()
    assert holder and holder.pid == trainer.pid, "the refused one left the holder's name alone"
    trainer.communicate()
    with run.lock():
        holder = run.holder()
        assert holder and holder.pid == os.getpid()
    assert run.holder() is None


def test_a_killed_trainer_holds_nothing(make: Make, hold: Hold) -> None:
    run = make(state="training")
    trainer = hold(run)
    assert run.state() == "training"
    trainer.kill()
    trainer.wait()
    assert run.holder() is None and run.state() == "died"
    with run.lock():
        assert run.state() == "training"


def test_a_look_at_the_lock_does_not_turn_a_trainer_away(make: Make) -> None:
    run = make()
    run.lock_file.touch()
    with open(run.lock_file) as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        looked = threading.Timer(0.3, fcntl.flock, (looking, fcntl.LOCK_UN))
        looked.start()
        try:
            with run.lock():
                assert run.holder()
        finally:
            looked.join()


CHILD_ENDS = """
    import os
    child = os.fork()
    if child == 0:
        sys.exit()  # leaves the block, as a forked process may that does not exec
    assert os.waitpid(child, 0)[1] == 0, "closing the lock twice would be an error"
"""
CHILD_STAYS = """
    import os, time
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(0), os.close(1)
        os.write(writer, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)  # the child has its first instants, in which it closes the lock, behind it
"""


def test_a_forked_child_does_not_free_the_lock(make: Make, hold: Hold) -> None:
    run = make()
    trainer = hold(run, CHILD_ENDS)
    holder = run.holder()
    assert holder and holder.pid == trainer.pid


def test_a_forked_child_does_not_keep_the_lock(make: Make, hold: Hold) -> None:
    run = make(state="training")
    trainer = hold(run, CHILD_STAYS)
    assert run.holder()
    trainer.kill()
    trainer.wait()
    try:
        assert [pid for pid in _session(trainer.pid)], "the child is to outlive its parent here"
        assert run.holder() is None and run.state() == "died"
        with run.lock():
            pass
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


# -- the state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written, seen", [
    ("preparing", "died"), ("training", "died"), ("evaluating", "died"),
    ("finished", "finished"), ("stopped", "stopped"), ("failed", "failed"),
])
def test_without_a_trainer_an_active_state_means_died(make: Make, written: str, seen: str) -> None:
    assert make(state=written).state() == seen


def test_a_stopped_trainer_is_paused(make: Make, hold: Hold) -> None:
    run = make(state="training")
    trainer = hold(run)
    os.kill(trainer.pid, signal.SIGSTOP)
    until(lambda: run.state() == "paused")
    os.kill(trainer.pid, signal.SIGCONT)
    until(lambda: run.state() == "training")


def test_a_run_that_ends_between_two_looks_has_not_died(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(state="training")

    def ends(self: RunDir) -> None:
        self.write_status(replace(LM, state="finished"))

    monkeypatch.setattr(RunDir, "holder", ends)
    assert run.state() == "finished"


def with_snapshots(run: RunDir, *steps: int) -> RunDir:
    """As the training writes their manifests, of which the daemon reads a part."""
    files.write_json(run.config_file, {"dataset": "corpus.txt", "max_steps": 10, "lr": 1e-3})  # edited: a 4 is lost
    for step in steps:
        snapshot = run.snapshots / f"snapshot_step_{step:08d}"
        snapshot.mkdir()
        manifest.write(snapshot, step, {}, {"stage": "lm", "config": {"max_steps": 40}, "device": "cpu (x)"})
    return run


@pytest.mark.parametrize("left", ["", "\0" * 700, '{"stage": "l', None])
def test_a_status_that_a_power_cut_took_is_read_from_config_and_snapshots(make: Make, hold: Hold,
                                                                          left: str | None) -> None:
    run = with_snapshots(make(state="training"), 20, 5, 10)
    (run.snapshots / "snapshot_step_00000010" / "manifest.json").write_text("")  # it took that one too
    run.status_file.unlink()
    if left is not None:
        run.status_file.write_text(left)
    status = run.status()
    assert (status.stage, status.script, status.dataset, status.step, status.of, status.device) == (
        "lm", "train_lm.py", "corpus.txt", 20, 40, "cpu (x)")
    assert "snapshot_step_00000020" in status.reason and registry.runs() == [run] and run.state() == "died"
    assert tables.table([tables.row(run)]).splitlines()[1].split()[:4] == [run.name, "died", "-", "20/40"]
    run.write_status(replace(status, state="stopped", reason=""))
    assert run.state() == "stopped" and run.status().reason == "", "from then on it is written as ever"


def test_without_a_snapshot_or_a_config_nothing_is_known_of_a_lost_status(make: Make) -> None:
    run = make()
    run.status_file.write_text("")
    with pytest.raises(ValueError, match="not JSON"):
        run.status()
    with_snapshots(run, 5).config_file.unlink()
    with pytest.raises(ValueError, match="not JSON"):
        run.status()


@pytest.mark.parametrize("spoiled", [{"step": "5"}, {"step": True}, {"made_by": None}, {"made_by": {"stage": 7}}, {}])
def test_a_manifest_that_is_none_rebuilds_nothing(make: Make, spoiled: dict[str, object]) -> None:
    run = with_snapshots(make(), 5)
    path = run.snapshots / "snapshot_step_00000005" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **spoiled} if spoiled else []))
    run.status_file.write_text("")
    with pytest.raises(ValueError):
        run.status()


def test_a_status_is_synced_where_the_state_changes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(state="training")
    synced, fsync = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    for state, times in (("training", 0), ("evaluating", 2), ("evaluating", 2), ("training", 4), ("stopped", 6)):
        run.write_status(replace(run.status(), state=state, step=run.status().step + 1))
        assert len(synced) == times, "the file and its folder"
    run.status_file.write_text("")
    run.write_status(replace(LM, state="stopped"))
    assert len(synced) == 8


# -- its place ------------------------------------------------------------------------------------------------------


def test_a_trainer_knows_where_its_run_is(make: Make) -> None:
    run = make()
    assert run.where_now() == run, "who does not hold the lock has nothing to compare"
    moved = RunDir(run.path.with_name("moved"))
    with run.lock():
        assert run.where_now() == run
        run.path.rename(moved.path)
        assert run.where_now() == moved
        run.path.mkdir()
        run.lock_file.touch()
        assert run.where_now() == moved, "another folder in its place"
        shutil.rmtree(moved.path)
        assert run.where_now() is None
        shutil.rmtree(run.path)
        assert run.where_now() is None


@pytest.mark.parametrize("call", [lambda beat: beat.mark(), lambda beat: beat.enter("training"),
                                  lambda beat: beat.write()])
def test_the_pulse_ends_in_a_place_that_is_gone(make: Make, call: Callable[[Pulse], None]) -> None:
    run = make()
    with run.lock():
        beat = Pulse(run)
        call(beat)
        shutil.rmtree(run.path)
        failed: list[BaseException] = []
        thread = threading.Thread(target=lambda: _noted(lambda: call(beat), failed))
        thread.start()
        thread.join()
        assert not failed, "only the thread that trains can end the training"
        with pytest.raises(rundir.Gone):
            call(beat)
        call(beat)  # what is tidied up afterwards is not hindered


def _noted(call: Callable[[], None], failed: list[BaseException]) -> None:
    try:
        call()
    except BaseException as error:
        failed.append(error)


def test_made_here_is_what_this_list_has_at_this_place(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    assert run.is_made_here()
    monkeypatch.setattr(os, "geteuid", lambda: run.path.stat().st_uid + 1)
    assert not run.is_made_here(), "another user's"
    monkeypatch.undo()
    monkeypatch.setenv("STOKER_HOME", str(files.home()))
    moved = RunDir(run.path.rename(run.path.with_name("moved")))
    assert not moved.is_made_here()
    moved.path.rename(run.path)
    shutil.rmtree(files.home() / "runs", ignore_errors=True)
    assert not run.is_made_here()


def test_a_reader_never_sees_half_a_status(make: Make) -> None:
    run, stop = make(), threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            run.write_status(replace(LM, step=number, of=number, reason="x" * (number % 7 * 3000)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [run.status()]
        while len(seen) < 2000 or seen[-1].step < 50:  # until both have had their turns
            seen.append(run.status())
    finally:
        stop.set()
        writer.join()
    assert all(status.step == status.of for status in seen if status.step)
    assert json.loads(run.status_file.read_text())["heartbeat"] > 0
