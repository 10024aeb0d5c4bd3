"""Tables: what stands in their rows, and mistakes that would make other texts of them."""

from pathlib import Path

import pytest

from stoker import files
from stoker.config import UserError
from stoker.data.sources import tables

COLUMNS = {"path": ("image", "file"), "text": ("text", "caption"), "group": ("page",)}


def read(folder: Path, content: str, name: str = "rows.csv") -> list[tuple[str, str]]:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return [(row["path"], row["text"]) for row in tables.rows(folder / name, COLUMNS, "see the guide")]


@pytest.mark.parametrize("content", [
    'image,text\na.png,"1,234.50"\nb.png,5"" x 7""\n', 'page,text,image\n1,"1,234.50",a.png\n1,5"" x 7"",b.png',
    '# made by hand\n\na.png,"1,234.50",\r\nb.png,"5"""" x 7"""""\r\n',
    '\ufeffa.png ,"1,234.50"\nb.png,5"" x 7"",,\n'])
def test_quotes_commas_and_line_ends(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == [("a.png", "1,234.50"), ("b.png", '5"" x 7""')]


@pytest.mark.parametrize("content, told", [
    ("image,text\na.png,1,234.50\n", "line 2 has 3 cells instead of 2: put a text that has a comma in quotes"),
    ("a.png,tea\n# no\nb.png,Hello, world\n", "line 3 has 3 cells instead of 2"),
    ('image,text\na.png,"5 inch\nb.png,tea\n', "line 2 has a cell that begins with a quote and does not end with one"),
    ('image,text\na.png,"5" inch\n', "line 2 has a cell that begins with a quote"),
    ("photo,caption\na.png,tea\n", "the first row, 'photo,caption', has the column caption but none for the file"),
    ("image,words\na.png,tea\n", "the first row, 'image,words', has the column image but none for the text"),
    ("# nothing\n", "has no rows; see the guide"), ("a.png\n", "a row is `file,text`, the first is 'a.png'")])
def test_what_would_be_another_text_is_refused(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(UserError, match="rows.csv: ") as error:
        read(tmp_path, content)
    assert told in str(error.value) and len(error.value.problems) == 1


def test_a_text_may_be_the_name_of_a_column(tmp_path: Path) -> None:
    assert read(tmp_path, "a.png,caption\nb.png,page\n") == [("a.png", "caption"), ("b.png", "page")]


def test_tabs_part_cells_too(tmp_path: Path) -> None:
    found = read(tmp_path, "file\tcaption\na.png\t1,234.50, please\n", "rows.tsv")
    assert found == [("a.png", "1,234.50, please")]
    with pytest.raises(UserError, match="line 2 has a cell that begins with a quote"):
        read(tmp_path, 'file\tcaption\na.png\t"tea\n', "rows.tsv")


def test_names_that_no_file_can_have_are_passed_on(tmp_path: Path) -> None:
    """The check refuses their rows; the others are read."""
    for name in ("a\0b.png", "x" * 5000, "\ud800.png"):
        assert tables.located(name, tmp_path) == str(tmp_path / name)


def test_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 has 200,000 characters, more than 131,072: a row is one line"):
        read(tmp_path, "a" * 200_000)
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="it is a pipe, a socket or a device instead of a regular file"):
        list(tables.rows(tmp_path / "zero.csv", COLUMNS, ""))


@pytest.mark.parametrize("content, told", [
    (b"caf\xe9", "is not UTF-8 text (unexpected end of data)"), (b"x" * (tables.TEXT + 1), "it has 1,048,577 bytes")])
def test_a_text_of_its_own_that_cannot_be_read_is_reported(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        tables.text("a.txt", lambda: files.read(tmp_path / "a.txt", most=tables.TEXT))
    assert told in str(caught.value) and str(caught.value).startswith("--dataset a.txt: ")
