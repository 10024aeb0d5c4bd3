"""Manifests, folders and splits: what was said, in which file, by whom; nothing judged by is trained on."""

from pathlib import Path

import pytest

from stoker.config import UserError
from stoker.data.speech import recordings
from stoker.data.speech.recordings import Utterance


def csv_of(folder: Path, text: str, name: str = "a.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def found(name: str) -> list[tuple[str, str, str]]:
    return [(split, Path(each.path).name, each.text) for split, each in recordings.listed(name)]


HEADERS = ["audio_path,transcription\n", "wav,text\n", "", "# made by hand\nwav,text\n", "Audio_Path , Transcription\n",
           "\ufeffaudio,sentence\n"]


@pytest.mark.parametrize("header", HEADERS)
def test_a_csv_with_a_header_or_none(tmp_path: Path, header: str) -> None:
    name = csv_of(tmp_path, header + 'a.wav,hello\n# not this\n\nb/c.flac,"one, ""two"""\n')
    assert found(name) == [("train", "a.wav", "hello"), ("train", "c.flac", 'one, "two"')]


def test_columns_go_by_their_names(tmp_path: Path) -> None:
    name = csv_of(tmp_path, "speaker,text,split,seconds,wav\nanna,hi,test,1.25,a.wav\nbo,ho,dev,,b.wav\n")
    assert list(recordings.listed(name)) == [
        ("test", Utterance(str(tmp_path / "a.wav"), "hi", 1.25, "anna")),
        ("validation", Utterance(str(tmp_path / "b.wav"), "ho", 0.0, "bo"))]
    tabs = csv_of(tmp_path, "client_id\tpath\tsentence\nx\ta.mp3\tI say, so\n", "a.tsv")
    assert list(recordings.listed(tabs)) == [("train", Utterance(str(tmp_path / "a.mp3"), "I say, so", 0.0, "x"))]


def test_files_lie_beside_the_csv_then_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("data/both.wav", "here/both.wav", "here/only.wav", "far/away.wav"):
        (tmp_path / where).parent.mkdir(exist_ok=True)
        (tmp_path / where).touch()
    name = csv_of(tmp_path / "data", f"both.wav,a\nonly.wav,b\n{tmp_path}/far/away.wav,c\nnone.wav,d\n")
    monkeypatch.chdir(tmp_path / "here")
    assert [each.path for _, each in recordings.listed(name)] == [
        str(tmp_path / where) for where in ("data/both.wav", "here/only.wav", "far/away.wav", "data/none.wav")]


def test_a_folder_of_files_with_their_texts(tmp_path: Path) -> None:
    for name in ("a.wav", "sub/b.FLAC", "c.ogg", "notes.md", ".hidden/d.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("Hello there.\n")
    (tmp_path / "sub/b.txt").write_text("and here")
    assert found(str(tmp_path)) == [("train", "a.wav", "Hello there."), ("train", "c.ogg", ""),
                                    ("train", "b.FLAC", "and here")]


def test_librispeech_as_it_is_unpacked(tmp_path: Path) -> None:
    for part, chapter in (("train-clean-100", "19/198"), ("dev-clean", "84/121"), ("test-clean", "61/70")):
        folder = tmp_path / part / chapter
        folder.mkdir(parents=True)
        stem = chapter.replace("/", "-")
        for number in (0, 1):
            (folder / f"{stem}-000{number}.flac").touch()
        (folder / f"{stem}.trans.txt").write_text(f"{stem}-0000 FIRST OF {part.upper()}\n{stem}-0001 IT'S IT\n")
    splits = recordings.read(str(tmp_path), shared_texts=True)
    assert {split: [(each.text, each.speaker) for each in rows] for split, rows in splits.items()} == {
        "train": [("first of train clean 100", "19"), ("it's it", "19")],
        "validation": [("first of dev clean", "84"), ("it's it", "84")],
        "test": [("first of test clean", "61"), ("it's it", "61")]}


def test_a_folder_with_a_manifest_is_that(tmp_path: Path) -> None:
    (tmp_path / "x.wav").touch()
    csv_of(tmp_path, "x.wav,said\n", "manifest.csv")
    assert found(str(tmp_path)) == [("train", "x.wav", "said")]


@pytest.mark.parametrize("said, label", [
    ("Hello,  World!", "hello world"), ("don\u2019t stop -- now", "don't stop now"), ("...", ""),
    ("TEN 10\tgreen\nbottles.", "ten 10 green bottles"), ("snake_case?", "snake case"),
    ("na\u00efve caf\u00e9 \u2014 \ufb01n", "na\u00efve caf\u00e9 fin"),
])
def test_labels(said: str, label: str) -> None:
    assert recordings.normalised(said) == label


# -- the split


def manifest(folder: Path, speakers: int, each: int) -> str:
    rows = [f"{s}_{i}.wav,words {s} of {i},speaker {s}" for s in range(speakers) for i in range(each)]
    return csv_of(folder, "wav,text,speaker\n" + "\n".join(rows))


@pytest.mark.parametrize("speakers, each", [(40, 10), (4, 50), (2, 3)])
def test_whole_speakers_are_held_out(tmp_path: Path, speakers: int, each: int) -> None:
    splits = recordings.read(manifest(tmp_path, speakers, each))
    people = {split: {row.speaker for row in rows} for split, rows in splits.items()}
    assert not people["train"] & people["validation"] and len(people["train"] | people["validation"]) == speakers
    assert sum(map(len, splits.values())) == speakers * each
    share = len(splits["validation"]) / (speakers * each)
    assert 0.05 <= share <= 0.1 or len(people["validation"]) == 1


def test_where_speakers_are_not_known_whole_texts_are(tmp_path: Path) -> None:
    name = csv_of(tmp_path, "\n".join(f"{i}.wav,text number {i % 100}" for i in range(400)))
    splits = recordings.read(name)
    texts = {split: {row.text for row in rows} for split, rows in splits.items()}
    assert not texts["train"] & texts["validation"] and len(splits["train"]) + len(splits["validation"]) == 400
    assert 0.05 <= len(splits["validation"]) / 400 <= 0.1
    assert recordings.read(name) == splits, "no random numbers"


def test_where_some_speakers_are_not_known_whole_texts_are(tmp_path: Path) -> None:
    """What would be left are speakers who say what others say as well."""
    rows = [f"{i}.wav,text number {i % 100},{f'speaker {i // 10}' if i < 200 else ''}" for i in range(400)]
    splits = recordings.read(csv_of(tmp_path, "wav,text,speaker\n" + "\n".join(rows)))
    assert len(splits["train"]) + len(splits["validation"]) == 400 and 20 <= len(splits["validation"]) <= 40


def test_the_held_out_speakers_never_change(tmp_path: Path) -> None:
    """A run is judged by the same rows in any process, and by those that older runs were judged by."""
    splits = recordings.read(manifest(tmp_path, 40, 10))
    assert {row.speaker for row in splits["validation"]} == {"speaker 2", "speaker 15"}


def test_a_speaker_can_be_held_out(tmp_path: Path) -> None:
    name = manifest(tmp_path, 5, 4)
    splits = recordings.read(name, held_out=["speaker 1", "speaker 3"])
    assert {row.speaker for row in splits["validation"]} == {"speaker 1", "speaker 3"}
    assert {row.speaker for row in splits["train"]} == {"speaker 0", "speaker 2", "speaker 4"}
    with pytest.raises(UserError, match=r"--held_out speker 1: .* \(did you mean speaker 1\?\)"):
        recordings.read(name, held_out=["speker 1"])
    with pytest.raises(UserError, match="names all the speakers"):
        recordings.read(name, held_out=[f"speaker {i}" for i in range(5)])


def test_who_is_not_held_out_is_trained_on(tmp_path: Path) -> None:
    """Though the data name other rows to validate on."""
    rows = [f"{s}{i}.wav,{s} {i},{s},{split}" for s, split in (("a", "train"), ("b", "train"), ("c", "validation"))
            for i in range(4)]
    splits = recordings.read(csv_of(tmp_path, "wav,text,speaker,split\n" + "\n".join(rows)), held_out=["a"])
    assert [row.text for row in splits["validation"]] == [f"a {i}" for i in range(4)]
    assert [row.text for row in splits["train"]] == [f"{s} {i}" for s in "bc" for i in range(4)]


def test_texts_of_the_test_part_are_left_out_of_training_too(tmp_path: Path) -> None:
    rows = [f"{i}.wav,text {i},{split}" for i, split in enumerate(["train"] * 6 + ["dev"] * 2)]
    name = csv_of(tmp_path, "wav,text,split\n" + "\n".join([*rows, "x.wav,Text 1,test", "y.wav,text 9,test"]))
    assert [row.text for row in recordings.read(name)["train"]] == ["text 0", "text 2", "text 3", "text 4", "text 5"]


def test_texts_of_validation_are_left_out_of_training(tmp_path: Path) -> None:
    rows = [f"{s}{i}.wav,{text},{s}" for s in "abcd" for i, text in enumerate(["Yes.", f"{s} 1", f"{s} 2", f"{s} 3"])]
    name = csv_of(tmp_path, "wav,text,speaker\n" + "\n".join(rows))
    splits = recordings.read(name, held_out=["b"])
    assert len(splits["validation"]) == 4 and len(splits["train"]) == 9
    assert "yes" not in {row.text for row in splits["train"]}
    assert len(recordings.read(name, held_out=["b"], shared_texts=True)["train"]) == 12


def test_where_that_would_leave_little_it_is_refused(tmp_path: Path) -> None:
    rows = [f"{s}{i}.wav,{i % 3},{s}" for s in "abcd" for i in range(9)]
    name = csv_of(tmp_path, "wav,text,speaker\n" + "\n".join(rows))
    with pytest.raises(UserError, match="27 of 27 training texts also occur in validation; --shared_texts allows"):
        recordings.read(name)
    splits = recordings.read(name, shared_texts=True)
    assert (len(splits["train"]), len(splits["validation"])) == (27, 9)


def test_official_parts_stay_what_they_are(tmp_path: Path) -> None:
    rows = [f"{i}.wav,text {i},{split}" for i in range(30) for split in [("train", "dev", "test")[i % 3]]]
    splits = recordings.read(csv_of(tmp_path, "wav,text,split\n" + "\n".join(rows)))
    assert {split: [int(Path(row.path).stem) % 3 for row in rows] for split, rows in splits.items()} == {
        "train": [0] * 10, "validation": [1] * 10, "test": [2] * 10}
    only = [f"{i}.wav,text {i},{split}" for i in range(60) for split in [("train", "test")[i % 2]]]
    splits = recordings.read(csv_of(tmp_path, "wav,text,split\n" + "\n".join(only)))
    assert all(int(Path(row.path).stem) % 2 for row in splits["test"]) and len(splits["test"]) == 30
    assert len(splits["train"]) + len(splits["validation"]) == 30 and splits["validation"]


# -- mistakes


def test_mistakes_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name, why in {
        str(tmp_path / "speach"): r"there is no such file or folder \(did you mean .*/speech\?\); give a CSV",
        str(tmp_path / "speech"): "has no sound files",
        "spokn": r"did you mean spoken\?",
        "": "is empty",
        str(tmp_path / "binary.csv"): "is not UTF-8 text",
        csv_of(tmp_path, "# nothing\n"): "has no rows",
        csv_of(tmp_path, "one column\n", "b.csv"): "a row is `file,text`",
        csv_of(tmp_path, "wav,text,split\na.wav,b,tset\n", "c.csv"): "one of train, validation, test, is 'tset'",
        "librispeech-100": "is not on this machine: ./run/data.sh download --dataset librispeech-100 fetches it",
    }.items():
        [line] = recordings.check(name)
        with pytest.raises(UserError, match=why):
            recordings.read(name)
        assert line.startswith("--dataset") and "\n" not in line
    assert recordings.check("spoken") == []


def test_a_csv_without_rows_but_a_header(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no sound files"):
        recordings.read(csv_of(tmp_path, "wav,text\n"))
