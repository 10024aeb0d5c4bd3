"""Pictures from the hub, from a copy in its form: official parts, each picture once, gone on with where it was."""

import itertools
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from made_pictures import make_picture
from stoker.config import UserError
from stoker.data.pictures import images, table
from stoker.data.sources import archives, parts, published
from stoker.data.sources.names import HUB_PICTURES
from stoker.data.sources.parts import Images, Part, Source

TEXTS = 3  # of each picture
SIZES = {"train": 11, "validation": 3, "test": 2}  # pictures


def captions(part: str, number: int) -> list[str]:
    return [f'{part} "{number}", said {way}' for way in range(TEXTS)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `jxie/coco_captions` has it: a row for each caption, the picture in each of them; one part in two shards."""
    folder, seeds = tmp_path_factory.mktemp("hub"), itertools.count()
    for part, count in SIZES.items():
        rows: list[dict[str, Any]] = []
        for number in range(count):
            path = make_picture(folder / "pictures" / f"{part}-{number}.{'jpg' if number % 2 else 'png'}", next(seeds))
            rows += [{"image": {"bytes": path.read_bytes(), "path": path.name}, "filename": path.name, "cocoid": number,
                      "caption": caption} for caption in captions(part, number)]
        shards = [rows[:16], rows[16:]] if count > 10 else [rows]  # a picture in both
        (folder / "data").mkdir(exist_ok=True)
        for i, shard in enumerate(shards):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(shard),
                                        folder / "data" / f"{part}-{i:05d}-of-{len(shards):05d}.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {part}\n    path: data/{part}-*\n" for part in SIZES) + "---\n")
    return folder


@pytest.fixture(autouse=True)
def _here(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(published.SOURCES, "coco-captions", Source(str(copy), None))
    monkeypatch.setattr(parts, "AT_ONCE", 4)
    monkeypatch.setattr("stoker.data.sources.hub.away", lambda repository: "")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def test_it_comes_with_its_official_parts(copy: Path) -> None:
    path = published.download("coco-captions")
    splits = table.read("coco-captions")
    assert {split: len(rows) for split, rows in splits.items()} == {part: TEXTS * n for part, n in SIZES.items()}
    for part, rows in splits.items():
        assert [row.text for row in rows] == [text for n in range(SIZES[part]) for text in captions(part, n)]
        for number, row in enumerate(rows):
            assert images.read(row.path) == next(copy.glob(f"pictures/{part}-{number // TEXTS}.*")).read_bytes()
        with tarfile.open(path.with_name(f"{part}.tar")) as tar:
            assert len(tar.getnames()) == SIZES[part], "each picture once"
    assert published.download("coco-captions") == path == published.manifest("coco-captions")


@pytest.mark.parametrize("stop", [0, 3, 13, 17, 30, 33, 36, 42, 47])
def test_interrupted_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: int) -> None:
    """Whatever was written when the process died, between two notes too."""
    whole = published.download("coco-captions")
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "other"))
    keep, written = Images.keep, itertools.count()

    def killed(*args: object) -> str:
        if next(written) == stop:
            raise KeyboardInterrupt
        return keep(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Images, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            published.download("coco-captions")
    with pytest.raises(UserError, match="is only in part on this machine: ./run/data.sh download"):
        table.read("coco-captions")
    folder = tmp_path / "other" / "published" / "coco-captions"
    begun = next(part for part in SIZES if not Part(folder, Source("", None), part, "").done)
    for suffix in (".rows", ".tar"):
        with open((folder / begun).with_suffix(suffix), "ab") as file:
            file.write(b"half of what was being writ")  # the note behind it is missing
    again = itertools.count()
    monkeypatch.setattr(Images, "keep", lambda *args: (next(again), keep(*args))[1])
    path = published.download("coco-captions")
    assert path.read_text() == whole.read_text()
    for part in SIZES:
        assert path.with_name(f"{part}.tar").read_bytes() == whole.with_name(f"{part}.tar").read_bytes()
    assert next(again) <= 48 - stop + 3, "at most what came after the last note is fetched again"


def test_a_part_of_it_and_later_more(monkeypatch: pytest.MonkeyPatch) -> None:
    first = published.download("coco-captions", 5).read_text().splitlines()
    splits = table.read("coco-captions")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5, "validation": 5, "test": 5}
    with monkeypatch.context() as patch:
        patch.setattr(Images, "keep", lambda *args: pytest.fail("was fetched again"))
        published.download("coco-captions", 4)
    assert {split: len(rows) for split, rows in table.read("coco-captions").items()} == dict.fromkeys(SIZES, 5)
    second = published.download("coco-captions", 8).read_text().splitlines()
    third = published.download("coco-captions").read_text().splitlines()
    assert set(first) < set(second) < set(third) and len(third) == 1 + 48 and len(second) == 1 + 8 + 8 + 6
    assert all(images.decode(row.path) for rows in table.read("coco-captions").values() for row in rows)


def test_what_is_written_on_them_may_be_called_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `priyank-m/MJSynth_text_recognition`."""
    rows = [{"image": {"bytes": make_picture(tmp_path / "x.png", i).read_bytes(), "path": None}, "label": f"Word {i}"}
            for i in range(6)]
    folder = tmp_path / "mjsynth"
    folder.mkdir()
    for part in ("train", "val"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{part}.parquet")
    assert published.SOURCES["mjsynth"].columns == {"text": "label", "label": ""}
    monkeypatch.setitem(published.SOURCES, "mjsynth", Source(str(folder), None, columns={"text": "label", "label": ""}))
    published.download("mjsynth")
    splits = table.read("mjsynth")
    assert [(row.text, row.label) for row in splits["validation"]] == [(f"Word {i}", "") for i in range(6)]


def test_classes_go_by_their_names_and_lists_by_their_parts(tmp_path: Path) -> None:
    import datasets

    rows = [{"img": {"bytes": make_picture(tmp_path / "x.png", i).read_bytes(), "path": None}, "label": i % 2,
             "caption": [f"{i}, one", f"{i}, two"]} for i in range(4)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]),
                                  "caption": datasets.List(datasets.Value("string"))})
    folder = tmp_path / "repository"
    folder.mkdir()
    for part in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{part}.parquet")
    path = published.copy(str(folder), None, tmp_path / "out")
    found = [(each.text, each.label) for split, each in table.listed(str(tmp_path / "out")) if split == "test"]
    assert found == [(f"{i}, {way}", ["cat", "dog"][i % 2]) for i in range(4) for way in ("one", "two")]
    assert len(archives.members(path.with_name("test.tar"))) == 4


def test_a_data_set_of_neither_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "number": [1]}), folder / "train.parquet")
    with pytest.raises(UserError, match="has no column of sounds or pictures, but text, number"):
        published.copy(str(folder), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_test_in_training() -> None:
    names = {name: published.splits.named(name) for name in ("train", "val", "validation", "test", "train.other.500")}
    assert names == {"train": "train", "val": "validation", "validation": "validation", "test": "test",
                     "train.other.500": "train"}
    assert set(published.SOURCES) == {*HUB_PICTURES, "librispeech-100", "librispeech-460", "librispeech-960"}
