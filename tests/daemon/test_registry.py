"""Which run is meant by a name, a beginning, a PID, a path, a link; and by `--resume` alone."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stoker import files
from stoker.config import UserError
from stoker.daemon import process, registry, rundir
from stoker.daemon.rundir import PROJECT, RunDir, Status

Make = Callable[..., RunDir]
Hold = Callable[..., subprocess.Popen[str]]


def refused(which: str) -> str:
    with pytest.raises(UserError) as caught:
        registry.find(which)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_without_the_variable_runs_stand_in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOKER_RESULTS")
    assert files.results() == PROJECT / "result"


def test_runs_of_every_result_folder_oldest_first(make: Make) -> None:
    made = [make("b", "first"), make("a", "second"), make("c", "project/result")]
    assert registry.runs() == made


def test_two_runs_of_one_name_in_two_folders_are_two(make: Make) -> None:
    made = [make("same", "first"), make("same", "second")]
    assert registry.runs() == made
    assert registry.find("same") == made[1], "the newer one"
    make("other", "first")
    assert registry.find("same") == made[1], "wherever the newest run is"
    assert registry.find(str(made[0].path)) == made[0]


def test_by_name_and_by_the_beginning_of_one(make: Make) -> None:
    corpus, corpora, notes = make("lm_corpus"), make("lm_corpora"), make("lm_notes")
    assert registry.find("lm_corpus") == corpus
    assert registry.find("lm_n") == notes
    assert registry.find("lm_corpo") == corpora
    assert "'lm_corp' is the beginning of 2 runs: lm_corpus, lm_corpora" in refused("lm_corp")
    assert "no run 'lm_x'" in refused("lm_x") and "the 3 there are" in refused("lm_x")
    assert "which run?" in refused("")


def test_the_link_to_the_newest_run_is_found_in_every_result_folder(make: Make) -> None:
    made = [make(name, folder) for folder in ("first", "second") for name in ("lm_corpus_1", "lm_corpus_2")]
    (made[1].path.parent / "lm_corpus").symlink_to("lm_corpus_1")
    assert registry.find("lm_corpus") == made[0]
    (made[3].path.parent / "lm_corpus").symlink_to("lm_corpus_2")
    assert registry.find("lm_corpus") == made[3], "in the folder of the newest run"


def test_a_whole_name_beats_a_beginning(make: Make) -> None:
    make("run-2")
    run = make("run")
    assert registry.find("run") == run


def test_by_path_from_anywhere(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("run", "result")
    monkeypatch.chdir(tmp_path)
    assert registry.find("result/run") == run
    assert registry.find("./result/run/") == run
    monkeypatch.chdir(run.path)
    assert registry.find(".") == run


def test_within_a_snapshot_a_name_still_means_a_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = make("one", "first"), make("other", "second")
    snapshot = one.snapshots / "snapshot_step_00000001"
    snapshot.mkdir(parents=True)
    (snapshot / "manifest.json").write_text("{}")
    monkeypatch.chdir(snapshot)
    assert registry.find("other") == registry.find("oth") == other and registry.snapshot("other") is None
    assert registry.find("manifest.json") == one


def test_by_the_link_to_the_newest(make: Make) -> None:
    for name in ("lm_corpus_20240101-000000", "lm_corpus_20240102-000000"):
        run = make(name, "project/result")
        run.announce("lm", "corpus.txt")
    assert registry.find("lm_corpus") == run
    assert registry.find(str(run.path.parent / "lm_corpus")) == run


def test_by_pid_who_holds_beats_who_held(make: Make, hold: Hold) -> None:
    older, past = make("older"), make("past")
    holder = hold(older)
    past.write_status(type(past.status())(**{**vars(past.status()), "pid": holder.pid}))
    assert registry.find(str(holder.pid)) == older
    holder.communicate()
    assert registry.find(str(holder.pid)) == past
    assert "process 1 trains no run" in refused("1")
    assert "no run '²'" in refused("²")


def test_a_name_of_digits_is_a_name(make: Make) -> None:
    assert registry.find(make("4711").name).name == "4711"


def test_what_is_no_run_is_passed_over(make: Make, results: Path) -> None:
    run, gone = make("run"), make("gone")
    shutil.rmtree(gone.path)
    assert any(not link.exists() for link in (files.home() / "runs").iterdir()), "a dangling link is to be there"
    for name, text in (("broken", "{"), ("other", '{"step": 1}'), ("list", "[]"), ("newer", '{"colour": "red"}')):
        (results / name).mkdir(parents=True)
        (results / name / "status.json").write_text(text)
    (results / ".gitignore").touch()
    os.symlink("nowhere", results / "lm_corpus")
    assert registry.runs() == [run]
    assert "no run 'lm_corpus'" in refused("lm_corpus") and "no run" in refused(str(results / ".gitignore"))
    known, broken = registry.look()
    unreadable = broken.values()
    assert known == [run] and sorted(line.split(" cannot be read: ")[0] for line in unreadable) == [
        str(results / name / "status.json") for name in ("broken", "list", "newer", "other")]
    assert refused("broken") in unreadable and refused(str(results / "other")) in unreadable


def test_by_the_process_that_has_taken_it_whatever_the_clock_says(make: Make, hold: Hold,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set back, and a PID that is used again, as in each start of a container."""
    run, other = make("run"), make("other")
    for each in (run, other):
        each.write_status(replace(each.status(), created=4e9, started=4e9, pid=os.getpid()))
    assert registry.taken_by(process.me()) is None
    with run.lock():
        assert registry.taken_by(process.me()) == run
        assert registry.taken_by(replace(process.me(), started=1)) is None
        assert registry.taken_by(replace(process.me(), boot="another")) is None
    assert registry.taken_by(process.me()) == run, "also when it has ended"


# -- --resume alone -------------------------------------------------------------------------------------------------


def test_the_newest_unfinished_of_the_stage(make: Make, hold: Hold) -> None:
    make("finished", state="finished")
    died = make("a", state="training")
    failed = make("b", state="failed", dataset="notes")
    small = make("c", preset="small")
    make("d", stage="vision")
    make("e", state="finished")

    def newest(dataset: str | None = None, preset: str | None = None) -> RunDir:
        return registry.newest_unfinished("lm", dataset, preset)

    assert newest() == small
    assert newest("notes") == failed
    assert newest(None, "nano") == failed
    assert newest("corpus", "nano") == died
    with pytest.raises(UserError, match="no unfinished run of lm notes small"):
        newest("notes", "small")
    hold(small)
    assert newest() == failed, "one that is being trained does not wait to go on"
    hold(failed)
    with pytest.raises(UserError, match="is being trained already: b"):
        newest("notes")


# -- the guides' paths ----------------------------------------------------------------------------------------------


def test_the_guides_paths_lead_to_runs_and_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoints/thinker_tiny/step_2000.pt`, where checkpoints/thinker_tiny is the --checkpoint_dir of two runs."""
    folder = tmp_path / "checkpoints" / "thinker_tiny"
    runs = [rundir.create(folder, "text", Status("text", "train_text.py", "corpus", "tiny", created=float(number)))
            for number in (1, 2)]
    for run, step in ((runs[0], 1000), (runs[0], 2000), (runs[1], 1000)):
        made = run.snapshots / f"snapshot_step_{step:08d}"
        made.mkdir(parents=True)
        (made / rundir.MANIFEST).write_text("{}")
    for run in runs:
        run.announce("text", "corpus")
    monkeypatch.chdir(tmp_path)
    here = "checkpoints/thinker_tiny"
    for name in ("step_1000.pt", "thinker_step_1000.pt"):
        assert registry.snapshot(f"{here}/{name}") == runs[1].snapshots / "snapshot_step_00001000"
    assert registry.snapshot(f"{here}/step_2000.pt") == runs[0].snapshots / "snapshot_step_00002000"
    with pytest.raises(UserError, match="no run in checkpoints/thinker_tiny has a snapshot of step 3,000"):
        registry.snapshot(f"{here}/step_3000.pt")
    for name in (f"{here}/thinker_best.pt", f"{here}/audio_enc.pt", here, f"{here}/"):
        assert registry.find(name) == runs[1]
    log = runs[1].new_log()
    log.write_text("line")
    assert (folder / "training.log").read_text() == "line"
    (tmp_path / "else").mkdir()
    for name in ("else/thinker_best.pt", "else"):
        with pytest.raises(UserError):
            registry.find(name)
