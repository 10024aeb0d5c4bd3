"""Tables, annotations, folders and archives: which picture, with what text; nothing judged by is trained on."""

import json
import tarfile
from pathlib import Path

import pytest

from stoker.config import UserError
from stoker.data.pictures import table
from stoker.data.pictures.table import Picture


def csv_of(folder: Path, text: str, name: str = "a.csv") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def found(name: str) -> list[tuple[str, str, str, str]]:
    return [(split, Path(each.path).name, each.text, each.label) for split, each in table.listed(name)]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# -- tables and annotations


@pytest.mark.parametrize("header", ["image,text\n", "file_name,caption\n", "# made by hand\nImage , Text\n", ""])
def test_a_csv_of_texts(tmp_path: Path, header: str) -> None:
    name = csv_of(tmp_path, header + 'a.png,Total:  1\u200512 #1\n# not this\n\nb/c.png,"one, ""two"""\n')
    assert found(name) == [("train", "a.png", "Total:  1\u200512 #1", ""), ("train", "c.png", 'one, "two"', "")]


def test_a_csv_of_labels(tmp_path: Path) -> None:
    name = csv_of(tmp_path, "image,label\na.png,t_shirt\nb.png,\n")
    assert found(name) == [("train", "a.png", "", "t_shirt"), ("train", "b.png", "", "")]
    rows = [*(f"{i}.png,t_shirt" for i in range(40)), "x.png,"]
    splits = table.read(csv_of(tmp_path, "image,label\n" + "\n".join(rows)), template="a photo of a {}")
    texts = {each.text for each in splits["train"] + splits["validation"]}
    assert texts == {"a photo of a t shirt", ""}, "what has no label has no text either: the data check tells"


def test_columns_go_by_their_names(tmp_path: Path) -> None:
    name = csv_of(tmp_path, "split,caption,class,document,image_path\ntest,a cat,cat,d1,a.png\nval,,dog,d2,b.png\n")
    assert list(table.listed(name)) == [
        ("test", Picture(str(tmp_path / "a.png"), "a cat", "cat", "d1")),
        ("validation", Picture(str(tmp_path / "b.png"), "", "dog", "d2"))]
    assert found(csv_of(tmp_path, "x.png\tsaid, so\n", "a.tsv")) == [("train", "x.png", "said, so", "")]


def test_annotations_as_the_guide_has_them(tmp_path: Path) -> None:
    content = {"images": [{"id": 1, "file_name": "image1.jpg", "caption": "A cat sitting on a couch"},
                          {"id": 2, "file_name": "in/image2.jpg", "caption": " Two "}, {"id": 3, "file_name": "3.jpg"}]}
    name = csv_of(tmp_path, json.dumps(content), "annotations.json")
    assert found(name) == found(str(tmp_path)) == [
        ("train", "image1.jpg", "A cat sitting on a couch", ""), ("train", "image2.jpg", "Two", ""),
        ("train", "3.jpg", "", "")]
    assert [each.path for _, each in table.listed(name)][1] == str(tmp_path / "in/image2.jpg")


def test_annotations_as_coco_has_them(tmp_path: Path) -> None:
    content = {"images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}], "info": {},
               "annotations": [{"image_id": 8, "id": 1, "caption": "eight"}, {"image_id": 7, "id": 2, "caption": "a"},
                               {"image_id": 7, "id": 3, "caption": "b"}]}
    assert found(csv_of(tmp_path, json.dumps(content), "captions_train2017.json")) == [
        ("train", "7.jpg", "a", ""), ("train", "7.jpg", "b", ""), ("train", "8.jpg", "eight", "")]


def test_annotations_too_deep_to_be_read_are_refused(tmp_path: Path) -> None:
    name = csv_of(tmp_path, "[" * 100_000, "annotations.json")
    [problem] = table.check(name)
    assert "is not of the form" in problem and "RecursionError" in problem


def test_names_and_texts_that_are_not_unicode_are_split_like_others(tmp_path: Path) -> None:
    """Such rows are for the check to refuse."""
    images = [{"file_name": "\ud800" * (row % 2) + f"{row}.png", "caption": "half \ud800"} for row in range(60)]
    found = table.read(csv_of(tmp_path, json.dumps({"images": images}), "annotations.json"))
    assert sum(map(len, found.values())) == 60 and found["validation"]


def test_files_lie_beside_the_table_then_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/both.png", "here/both.png", "here/only.png", "far/away.png")
    name = csv_of(tmp_path / "data", f"both.png,a\nonly.png,b\n{tmp_path}/far/away.png,c\nnone.png,d\nx.tar!y.png,e\n")
    monkeypatch.chdir(tmp_path / "here")
    assert [each.path for _, each in table.listed(name)] == [
        str(tmp_path / where) for where in ("data/both.png", "here/only.png", "far/away.png", "data/none.png",
                                            "data/x.tar!y.png")]


# -- folders and archives


FOLDERS = {
    "classes": (["cat/1.jpg", "cat/2.PNG", "dog/in/3.webp"], [("train", "cat"), ("train", "cat"), ("train", "dog")]),
    "splits": (["test/cat/1.jpg", "train/cat/1.jpg", "val/dog/2.jpg"],
               [("test", "cat"), ("train", "cat"), ("validation", "dog")]),
    "around": (["photos/x/train/cat/1.jpg", "photos/x/val/cat/2.jpg"], [("train", "cat"), ("validation", "cat")]),
    "one split": (["train/cat/1.jpg", "train/dog/2.jpg"], [("train", "cat"), ("train", "dog")]),
    "one class": (["cat/1.jpg", "cat/2.jpg"], [("train", "cat"), ("train", "cat")]),
    "a class called train": (["bus/1.jpg", "train/2.jpg"], [("train", "bus"), ("train", "train")]),
    "none": (["1.jpg", "2.jpg"], [("train", ""), ("train", "")]),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_by_class(tmp_path: Path, kind: str) -> None:
    names, expected = FOLDERS[kind]
    hidden = [".hidden/cat/9.jpg", f"{Path(names[0]).parent}/.thumb.jpg"]
    touch(tmp_path / "data", *names, *hidden, "notes.md")
    assert [(split, label) for split, _, _, label in found(str(tmp_path / "data"))] == expected


@pytest.mark.parametrize("kind", FOLDERS)
def test_archives_by_class(tmp_path: Path, kind: str) -> None:
    names, expected = FOLDERS[kind]
    others = ["notes.md", f"{Path(names[0]).parent}/._{Path(names[0]).name}"]  # the latter by macOS
    touch(tmp_path / "data", *names, *others)
    for path, around in ((tmp_path / "a.tar", "."), (tmp_path / "b.tgz", "all of it")):
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
            for name in [*names, *others]:
                tar.add(tmp_path / "data" / name, arcname=f"{around}/{name}")
        rows = list(table.listed(str(path)))
        if kind != "none" or around == ".":
            assert [(split, each.label) for split, each in rows] == expected
        assert [each.path for _, each in rows] == [f"{path}!{Path(around, name)}" for name in names]


def test_texts_lie_beside_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/b.jpg")
    (tmp_path / "in/a.txt").write_text(" A line.\n")
    assert found(str(tmp_path)) == [("train", "a.jpg", "A line.", ""), ("train", "b.jpg", "", "in")]


def test_texts_lie_beside_pictures_of_archives_too(tmp_path: Path) -> None:
    """As they stand, but for blanks around them; what is empty has no class instead, so that the data check tells."""
    texts = {"in/a.txt": "A  \u00a3 line.\r\n", "in/b.c.txt": "", "in/e.txt": "of nothing", "f.txt": "\ufeffTwo\nlines"}
    for name, text in texts.items():
        (touch(tmp_path / "data", name) / name).write_bytes(text.encode())
    names = ["f.png", "in/a.jpg", "in/b.c.jpg", "in/d.jpg"]
    touch(tmp_path / "data", *names)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name in sorted([*names, *texts]):
            tar.add(tmp_path / "data" / name, arcname=name)
    expected = [("f.png", "Two\nlines", ""), ("a.jpg", "A  \u00a3 line.", ""), ("b.c.jpg", "", ""), ("d.jpg", "", "in")]
    for where in ("data", "a.tar.gz"):
        rows = [(each.path.rpartition("!")[2].rpartition("/")[2], each.text, each.label)
                for _, each in table.listed(str(tmp_path / where))]
        assert rows == expected, where
    assert [each.path for _, each in table.listed(str(tmp_path / "data"))] == [
        str(tmp_path / "data" / name) for name in names]
    assert [each.path for _, each in table.listed(str(tmp_path / "a.tar.gz"))] == [
        f"{tmp_path}/a.tar.gz!{name}" for name in names]


def test_a_text_file_that_is_no_utf_8_is_reported(tmp_path: Path) -> None:
    (touch(tmp_path, "a.png") / "a.txt").write_bytes("10 \u00a3".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: is not UTF-8 text \(invalid start byte\)"):
        found(str(tmp_path))


def test_a_folder_with_a_table_for_each_split(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        csv_of(tmp_path, f"image,label\n{split}/1.jpg,dress\n", f"{split}.csv")
    csv_of(tmp_path, "sizes,in,stock\n", "other.csv")
    assert found(str(tmp_path)) == [(split, "1.jpg", "", "dress") for split in ("test", "train", "validation")]


def test_a_folder_with_a_manifest_is_that(tmp_path: Path) -> None:
    for name in ("manifest.csv", "labels.csv", "metadata.csv"):
        folder = touch(tmp_path / name, "img/x.png")
        csv_of(folder, "img/x.png,written\n", name)
        assert found(str(folder)) == [("train", "x.png", "written", "")]


# -- the split


def test_whole_groups_are_held_out(tmp_path: Path) -> None:
    """Lines of a receipt are found by the file's name."""
    rows = [f"img/{receipt:03d}_{line:02d}.png,line {line}" for receipt in range(60) for line in range(7)]
    name = csv_of(tmp_path, "image,text\n" + "\n".join(rows))
    splits = table.read(name, group_by=r"([^/]*)_[^/]*$")
    groups = {split: {each.group for each in rows} for split, rows in splits.items()}
    assert groups["train"] | groups["validation"] == {f"{i:03d}" for i in range(60)}
    assert not groups["train"] & groups["validation"]
    assert 0.05 <= len(splits["validation"]) / len(rows) <= 0.1
    held = table.read(name, group_by=r"\d+(?=_)", held_out=["007", "011"])
    assert {each.group for each in held["validation"]} == {"007", "011"} and len(held["validation"]) == 14
    with pytest.raises(UserError, match=r"--held_out 0077: .* has no such group \(did you mean 007\?\)"):
        table.read(name, group_by=r"\d+(?=_)", held_out=["0077"])
    with pytest.raises(UserError, match=r"--group_by receipt: matches nothing in .*/img/000_00.png"):
        table.read(name, group_by="receipt")


def test_where_some_groups_are_not_known_whole_files_are(tmp_path: Path) -> None:
    rows = [f"{i}.png,text {i},{f'group {i // 10}' if i < 50 else ''}" for i in range(100)]
    assert len(table.read(csv_of(tmp_path, "image,text,group\n" + "\n".join(rows)))["validation"]) == 5


def test_who_is_not_held_out_is_trained_on(tmp_path: Path) -> None:
    """Though the data name other rows to validate on."""
    rows = [f"{g}{i}.png,{g} {i},{g},{split}" for g, split in (("a", "train"), ("b", "train"), ("c", "validation"))
            for i in range(4)]
    splits = table.read(csv_of(tmp_path, "image,text,group,split\n" + "\n".join(rows)), held_out=["a"])
    assert [each.text for each in splits["validation"]] == [f"a {i}" for i in range(4)]
    assert [each.text for each in splits["train"]] == [f"{g} {i}" for g in "bc" for i in range(4)]


def test_a_picture_is_not_parted_from_itself(tmp_path: Path) -> None:
    """Five captions of each."""
    name = csv_of(tmp_path, "image,text\n" + "\n".join(f"{i // 5}.png,caption {i}" for i in range(500)))
    splits = table.read(name, share=0.2)
    paths = {split: {each.path for each in rows} for split, rows in splits.items()}
    assert not paths["train"] & paths["validation"] and len(paths["validation"]) == 20
    assert table.read(name, share=0.2) == splits, "no random numbers"


def test_where_the_files_lie_makes_no_difference(tmp_path: Path) -> None:
    text = "image,label\n" + "\n".join(f"in/{i}.png,{i % 3}" for i in range(100))
    names = [csv_of(tmp_path / folder, text) for folder in ("here", "there")]
    chosen = [{Path(each.path).name for each in table.read(name)["validation"]} for name in names]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 5


def test_official_parts_stay_what_they_are(tmp_path: Path) -> None:
    rows = [f"{i}.png,text {i},{split}" for i in range(60) for split in [("train", "test")[i % 2]]]
    splits = table.read(csv_of(tmp_path, "image,text,split\n" + "\n".join(rows)))
    assert [int(Path(each.path).stem) % 2 for each in splits["test"]] == [1] * 30
    assert len(splits["train"]) + len(splits["validation"]) == 30 and splits["validation"]


def test_texts_of_validation_can_be_left_out_of_training(tmp_path: Path) -> None:
    rows = [f"{i}.png,text {i % 10},{'test' if i > 90 else 'train'}" for i in range(100)]
    name = csv_of(tmp_path, "image,text,split\n" + "\n".join(rows))
    kept = table.read(name, shared_texts=False)
    judged = {each.text for split in ("validation", "test") for each in kept[split]}
    assert not judged & {each.text for each in kept["train"]} and len(judged) == 9 and len(kept["train"]) >= 9
    assert len(table.read(name)["train"]) > 80


# -- mistakes


def test_mistakes_are_one_line_each(tmp_path: Path) -> None:
    touch(tmp_path, "pictures/notes.md")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.tar").write_bytes(b"no archive" * 100)
    with tarfile.open(tmp_path / "texts.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "pictures/notes.md", arcname="notes.md")
    for name, why in {
        str(tmp_path / "picture"): r"there is no such file or folder \(did you mean .*/pictures\?\); give a CSV",
        str(tmp_path / "pictures"): r"has no pictures \(\.png, \.jpg",
        str(tmp_path / "texts.tar.gz"): "has no pictures",
        str(tmp_path / "a.tar"): "a.tar: cannot be read as a TAR archive",
        "scene": r"did you mean scenes\?",
        "": "is empty",
        str(tmp_path / "binary.csv"): "is not UTF-8 text",
        csv_of(tmp_path, "# nothing\n"): "has no rows",
        csv_of(tmp_path, "one column\n", "b.csv"): "a row is `file,text`",
        csv_of(tmp_path, "image,text,split\na.png,b,tset\n", "c.csv"): "one of train, validation, test, is 'tset'",
        csv_of(tmp_path, "{}", "d.json"): r'is not of the form \{"images": .*KeyError',
        csv_of(tmp_path, '{"images": ["a"]}', "e.json"): r'is not of the form \{"images": .*TypeError',
        csv_of(tmp_path, '{"images": [', "f.json"): r'is not of the form \{"images": .*JSONDecodeError',
        "mjsynth": "is not on this machine: ./run/data.sh download --dataset mjsynth fetches it, about 15 GB",
    }.items():
        [line] = table.check(name)
        with pytest.raises(UserError, match=why):
            table.read(name)
        assert "\n" not in line
    assert table.check("scenes") == table.check("digits") == []
    assert table.check("scenes", group_by="(") == [
        "--group_by (: is no regular expression (missing ), unterminated subpattern at position 0)"]


def test_a_table_without_rows_but_a_header(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no pictures"):
        table.read(csv_of(tmp_path, "image,label\n"))


def test_a_single_picture_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of its 1 pictures nothing is left to validate on"):
        table.read(csv_of(tmp_path, "image,label\na.png,x\n"))


REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not REAL.exists(), reason="the pictures are not at hand")
def test_real_ones_as_they_come() -> None:
    """Counts as their authors give them."""
    cifar = table.read(str(REAL / "images/cifar10_train_jpg.tar.gz"), share=0.1)
    assert {split: len(rows) for split, rows in cifar.items()} == {"train": 45_000, "validation": 5_000}
    assert len({each.label for each in cifar["train"]}) == 10
    clothing = table.read(str(REAL / "images/clothing"))
    assert (len(clothing["train"]), len(clothing["validation"])) == (3068, 341)
    captions = table.read(str(REAL / "images/captions"))
    assert sum(map(len, captions.values())) == 700
    lines = table.read(str(REAL / "ocr/receipt_lines"), group_by=r"([^/]*)_[^/]*$")
    assert sum(map(len, lines.values())) == 6000
