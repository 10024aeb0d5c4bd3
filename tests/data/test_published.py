"""Speech from the hub, from a copy in the hub's form: official parts, and a download that goes on where it was."""

import itertools
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from damage import flip
from sounds import make_sound
from stoker.config import UserError
from stoker.data.sources import parts, published
from stoker.data.sources.names import LIBRISPEECH
from stoker.data.sources.parts import Part, Sounds, Source
from stoker.data.sources.published import PARTS
from stoker.data.speech import recordings

SOURCE = Source("", "", {}, 0)
SIZES = {"train.clean.100": 25, "validation.clean": 4, "test.clean": 5, "test.other": 3}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `openslr/librispeech_asr` has it: parquet files that hold the sound files' bytes; one part in two shards."""
    folder, seeds = tmp_path_factory.mktemp("hub"), itertools.count()
    (folder / "all").mkdir()
    for part, count in SIZES.items():
        rows = []
        for number in range(count):
            path = make_sound(folder / "sounds" / f"{number}-{part}.flac", 0.3, seed=next(seeds))
            rows.append({"file": path.name, "audio": {"bytes": path.read_bytes(), "path": path.name},
                         "text": f'{part.upper()} NUMBER {number}, "SO"', "speaker_id": 10 * len(part) + number % 3,
                         "chapter_id": 1, "id": path.stem})
        shards = [rows[:15], rows[15:]] if count > 15 else [rows]
        for i, shard in enumerate(shards):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(shard),
                                        folder / "all" / f"{part}-{i:05d}-of-{len(shards):05d}.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: all\n  data_files:\n" + "".join(
        f"  - split: {part}\n    path: all/{part}-*\n" for part in SIZES) + "---\n")
    return folder


@pytest.fixture(autouse=True)
def _here(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(published.SOURCES, "librispeech-100",
                        Source(str(copy), "all", dict(itertools.islice(PARTS.items(), 3)), 7))
    monkeypatch.setattr(parts, "AT_ONCE", 4)
    monkeypatch.setattr("stoker.data.sources.hub.away", lambda repository: "")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def test_it_comes_with_its_official_parts(copy: Path) -> None:
    path = published.download("librispeech-100")
    splits = recordings.read("librispeech-100")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 25, "validation": 4, "test": 5}
    assert [row.text for row in splits["test"]] == [f"test clean number {i} so" for i in range(5)]
    assert {row.speaker for row in splits["validation"]} == {"160", "161", "162"}
    assert [soundfile.info(row.path).frames for rows in splits.values() for row in rows] == [4800] * 34
    for number, row in enumerate(splits["train"]):
        assert Path(row.path).read_bytes() == (copy / "sounds" / f"{number}-train.clean.100.flac").read_bytes()
    assert published.download("librispeech-100") == path == published.manifest("librispeech-100")


@pytest.mark.parametrize("stop", [0, 3, 14, 22, 27, 33])
def test_interrupted_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: int) -> None:
    """Whatever was written when the process died, between two notes too."""
    whole = published.download("librispeech-100")
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "other"))
    keep, written = Sounds.keep, itertools.count()

    def killed(*args: object) -> str:
        if next(written) == stop:
            raise KeyboardInterrupt
        return keep(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Sounds, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            published.download("librispeech-100")
    with pytest.raises(UserError, match="is only in part on this machine: ./run/data.sh download"):
        recordings.read("librispeech-100")
    folder = tmp_path / "other" / "speech" / "librispeech-100"
    open_part = next(part for part in SIZES if not Part(folder, SOURCE, part, "").done)
    with open(folder / f"{open_part}.rows", "a") as file:
        file.write("train.clean.100/half a row that was writ")  # the note behind it is missing
    again = itertools.count()
    monkeypatch.setattr(Sounds, "keep", lambda *args: (next(again), keep(*args))[1])
    path = published.download("librispeech-100")
    assert path.read_text() == whole.read_text()
    for row in whole.read_text().splitlines()[1:]:
        name = row.partition(",")[0]
        assert (path.parent / name).read_bytes() == (whole.parent / name).read_bytes()
    assert next(again) <= 34 - stop + 3, "at most what came after the last note is fetched again"


@pytest.mark.parametrize("name", ["validation.clean.note", "validation.clean.rows"])
def test_a_damaged_note_fetches_its_part_again(name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = published.download("librispeech-100")
    was = path.read_text()
    path.unlink()
    flip(path.parent / name, 70)
    assert published.download("librispeech-100").read_text() == was
    assert f"{path.parent / name} is damaged" in caplog.text


def test_a_damaged_manifest_is_not_trained_on() -> None:
    path = published.download("librispeech-100")
    was = path.read_text()
    flip(path, 100)
    with pytest.raises(UserError, match="manifest.csv was damaged and has been removed: ./run/data.sh download"):
        recordings.read("librispeech-100")
    assert published.download("librispeech-100").read_text() == was and recordings.read("librispeech-100")


def test_without_the_hub_it_says_so(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("STOKER_HOME", str(own_home))
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"hub \(http://127.0.0.1:9\) cannot be reached \(Connection refused\); conn"):
        published.download("librispeech-100")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; connect"):
        published.download("librispeech-100")
    with pytest.raises(UserError, match="is not on this machine: ./run/data.sh download"):
        recordings.read("librispeech-100")


def test_a_download_that_fails_says_what_is_kept(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args: object) -> str:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(Sounds, "keep", cut)
    with pytest.raises(UserError, match=r"stopped \(ConnectionError: the line is dead\); 0 recordings are kept"):
        published.download("librispeech-100")
    monkeypatch.setattr(Sounds, "keep", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="No space left in .*: make room there"):
        published.download("librispeech-100")


def test_any_other_repository(copy: Path, tmp_path: Path) -> None:
    path = published.copy(str(copy), "all", tmp_path / "out")
    splits = recordings.read(str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 25, "validation": 4, "test": 8}
    assert splits["test"][7].text == "test other number 2 so" and splits["test"][7].speaker == "102"
    assert published.copy(str(copy), "all", tmp_path / "out") == path
    with pytest.raises(UserError, match="BuilderConfig 'none' not found"):
        published.copy(str(copy), "none", tmp_path / "other")


def test_larger_ones_hold_the_smaller() -> None:
    parts = [list(published.SOURCES[name].splits) for name in LIBRISPEECH[1:]]
    assert [len(each) for each in parts] == [4, 5] and set(parts[0]) < set(parts[1])
    for source in published.SOURCES.values():
        assert all(ours == theirs.partition(".")[0] for theirs, ours in source.splits.items()), "no test in training"
