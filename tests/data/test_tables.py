"""Tables: what stands in their rows, and mistakes that would make other texts of them."""

from pathlib import Path

import pytest

from config import UserError
from data import tables

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
    ("# nothing\n", "has no rows; see the guide"), ("a.png\n", "a row is `file,text`, the first is 'a.png'")])
def test_what_would_be_another_text_is_refused(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(UserError, match="rows.csv: ") as error:
        read(tmp_path, content)
    assert told in str(error.value) and len(error.value.problems) == 1


def test_tabs_part_cells_too(tmp_path: Path) -> None:
    found = read(tmp_path, "file\tcaption\na.png\t1,234.50, please\n", "rows.tsv")
    assert found == [("a.png", "1,234.50, please")]
    with pytest.raises(UserError, match="line 2 has a cell that begins with a quote"):
        read(tmp_path, 'file\tcaption\na.png\t"tea\n', "rows.tsv")
