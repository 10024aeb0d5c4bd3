"""What is made here is whole and as it was made, or made again."""

import logging
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree

import pytest

from damage import flip, full_disk
from made_pictures import make_picture
from sounds import make_sound
from stoker.config import Damaged, UserError
from stoker.data import made
from stoker.data.pictures import check
from stoker.data.pictures.resized import resize
from stoker.data.pictures.table import Picture
from stoker.data.sources import archives
from stoker.data.speech.decoded import decode


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Path], None]:
    """A sound, an archive of a picture, and the manifest; `made_times` counts."""
    source = tmp_path / "source"
    source.mkdir()
    make_sound(source / "1.flac", 0.4, seed=1)
    picture = make_picture(source / "1.png", 1)
    (source / "manifest.csv").write_text("audio_path,text\n1.flac,one\n")

    def copied(folder: Path) -> None:
        for name in ("1.flac", "manifest.csv"):
            (folder / name).write_bytes((source / name).read_bytes())
        with open(folder / "a.tar", "wb") as file:
            archives.write(file, [("1.png", picture.read_bytes())])
        made_times.append(1)

    made_times.clear()
    return copied


made_times: list[int] = []


def folder(home: Path, make: Callable[[Path], None]) -> Path:
    return made.folder(home / "made" / "set", make, what="a set", room="1 MB")


def test_rows_that_are_left_out_are_counted_and_not_listed(own_home: Path, make: Callable[[Path], None], tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    """But a user's own files are, also below a note that claims that they were made here."""
    there, own = folder(own_home, make), tmp_path / "own"
    copytree(there, own)
    rows = [Picture(f"{there}/a.tar!1.png", "one two"), Picture(f"{own}/a.tar!1.png", "one three"),
            *(Picture(str(make_picture(tmp_path / f"{i}.png", i)), "one") for i in (3, 4))]
    limits = check.Limits(max_text_length=3)
    with caplog.at_level("INFO"):
        check.checked({"train": rows[:3], "validation": rows[3:]}, {}, keep=False, limits=limits)
    assert "Data check: refused: 2 long text" in caplog.messages
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"train {own}/a.tar!1.png: long text: 9 characters, --max_text_length is 3"]


def test_it_is_made_once(own_home: Path, make: Callable[[Path], None]) -> None:
    first = folder(own_home, make)
    assert folder(own_home, make) == first and len(made_times) == 1
    assert sorted(path.name for path in first.iterdir()) == ["1.flac", "a.tar", "digests.note", "manifest.csv"]


@pytest.mark.parametrize("name", ["manifest.csv", "digests.note"])
@pytest.mark.parametrize("damage", ["a bit", "gone"])
def test_a_damaged_manifest_makes_all_again(name: str, damage: str, own_home: Path, make: Callable[[Path], None],
                                            caplog: pytest.LogCaptureFixture) -> None:
    path = folder(own_home, make) / name
    was = path.read_bytes()
    flip(path, 70 if name == "digests.note" else 7) if damage == "a bit" else path.unlink()
    with caplog.at_level(logging.WARNING):
        folder(own_home, make)
    assert path.read_bytes() == was and len(made_times) == 2
    assert f"{path.parent} is damaged: it is made again" in caplog.text


@pytest.mark.parametrize("name, keep", [("1.flac", True), ("1.flac", False), ("a.tar!1.png", False)])
def test_a_damaged_file_is_not_decoded_and_all_is_made_again(name: str, keep: bool, own_home: Path,
                                                             make: Callable[[Path], None]) -> None:
    """Also a bit that changes nothing that a decoder would notice."""
    path = folder(own_home, make) / name.partition("!")[0]

    def facts() -> dict[str, object]:
        path = str(folder(own_home, make) / name)
        found = resize([path]) if "!" in name else decode([path], keep=keep)
        return dict(found.facts)

    expected = facts()
    rmtree(own_home / ("pictures" if "!" in name else "audio"))
    flip(path, path.stat().st_size - 1)
    made._sha256.cache_clear()  # as in another process
    with pytest.raises(Damaged, match=f"{path} is damaged"):
        facts()
    assert not path.parent.exists()
    assert facts() == expected and len(made_times) == 2


def test_files_of_others_are_not_asked_about(tmp_path: Path) -> None:
    (tmp_path / "digests").write_text("of theirs")
    made.verify(str(tmp_path / "none.wav"))


def test_a_full_disk_leaves_nothing(own_home: Path) -> None:
    with pytest.raises(UserError, match=r"No space left on device in .*made: make room there \(about 1 MB\)"):
        folder(own_home, full_disk)
    assert [path.name for path in (own_home / "made").iterdir()] == ["set.lock"]
