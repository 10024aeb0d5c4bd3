"""What the benchmarks share still fits the product: a benchmark itself takes minutes."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.daemon.rundir import PROJECT, RunDir


def test_their_trainer_trains_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import rig

    with rig.trainer("nano", batch_size=2, device="cpu", precision="fp32", max_seq_len=16) as trainer:
        rig.open_up(trainer)
        trainer._train_step()
        trainer._save()
        trainer.saver.finish(patient=False)
        assert trainer.step == 1 and not trainer.events.switched_off
        assert [path.name for path in trainer.snapshots.found()] == ["snapshot_step_00000001"]


def test_a_run_with_other_options_is_not_taken_for_the_one_that_was_asked_for(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that was trained on a file with other content; one that fails ends the program with its last line."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    recognizers = importlib.import_module("recognizers")
    data, run = tmp_path / "said.csv", tmp_path / "run"
    data.write_text("a.wav,b\n")
    with pytest.raises(SystemExit, match=r"none of the 1 training recordings can be used.*\(all of it: .*run\.log\)"):
        recognizers.trained(run, ["--dataset", str(data)])
    run.mkdir()
    RunDir(run).status_file.write_text("{}")  # as if it had begun
    with pytest.raises(SystemExit, match="was trained with other options or data"):
        recognizers.trained(run, ["--dataset", str(data), "--lr", "1"])
    data.write_text("a.wav,c\n")
    with pytest.raises(SystemExit, match="was trained with other options or data"):
        recognizers.trained(run, ["--dataset", str(data)])


def test_a_voice_is_evaluated_on_texts_that_are_in_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits are words; of several people none is in two splits."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    own_voice = importlib.import_module("own_voice")
    table = tmp_path / "said.csv"
    said = [f"press {'abcdefghij'[i // 10]} {i % 10}" for i in range(100)] + ["28 more"]
    table.write_text("audio_path,transcription,seconds\n" + "".join(f"{i}.wav,{text},1.5\n"
                                                                   for i, text in enumerate(said * 2)))
    rows = own_voice.read(str(table))
    assert len(rows) == 200 and rows[17].text == "press b seven"
    splits = own_voice.parted(rows)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [160, 10, 30]
    texts = [{row.text for row in split} for split in splits.values()]
    assert len(set.union(*texts)) == sum(map(len, texts)) == 100
    assert own_voice.minutes_of(own_voice.first_minutes(splits["train"], 1)) == 1
    for few in 3, 10, 17:
        assert all(own_voice.parted(rows[:few]).values()), "each split has a recording"
    with pytest.raises(SystemExit, match="2 different texts in recordings that can be used, 3 are needed"):
        own_voice.parted(rows[:2])
    people = [replace(row, speaker=f"person {i % 20}") for i, row in enumerate(rows)]
    splits = own_voice.parted(people)
    assert [len({row.speaker for row in split}) for split in splits.values()] == [16, 1, 3]
    assert sum(map(len, splits.values())) == 200
