"""The embedded corpus is prose, in a fixed order, without repetition; built once and only from installed packages."""

import importlib.util
import sysconfig
from pathlib import Path

import pytest

from damage import flip
from stoker import files
from stoker.config import UserError
from stoker.data.text import corpus, pydocs

MODULE = '''"""Tools for measuring rivers, written for the people who live beside them."""
from . import add_newdoc

add_newdoc("rivers", "depth",
    """
    Depth of the river in metres, measured at the deepest place.

    Examples
    --------
    >>> depth("Thames")
    20.0
    """)
width = add_newdoc("rivers", "{common}\\nWidth at the {{mouth}} of the river in kilometres.".format(common=1))
print("a long string that documents nothing at all, and so stays out of the text")

class Bank:
    """The left or the right bank of a river, seen from its source."""

    async def walk(self):
        """Walk along the bank without getting wet feet, slowly."""
        if True:
            def inner():
                "A function within a function also has something to say here."
'''
TOPICS = 'topics = {"oceans": "Oceans\\n\\nare wide\\nand deep, and the rivers all end in one of them."}\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))
    folder = tmp_path / "rivers"
    (folder / "tests").mkdir(parents=True)
    (folder / "rivers.py").write_text(MODULE)
    (folder / "again.py").write_text('"""Again."""\ndef f():\n    "Is said again, and this time it is long enough."\n')
    (folder / "copy.py").write_text(MODULE)
    (folder / "topics.py").write_text(TOPICS)
    (folder / "tests" / "test_rivers.py").write_text('"""Tests are no documentation, however long their text."""\n')
    (folder / "broken.py").write_text('"""Never closed')
    return folder


def test_one_document_a_module_and_nothing_twice(package: Path) -> None:
    assert list(pydocs.gather([package])) == [
        "Is said again, and this time it is long enough.",
        "Tools for measuring rivers, written for the people who live beside them.\n\n"
        "Depth of the river in metres, measured at the deepest place.\n\n"
        "Width at the {mouth} of the river in kilometres.\n\n"
        "The left or the right bank of a river, seen from its source.\n\n"
        "Walk along the bank without getting wet feet, slowly.\n\n"
        "A function within a function also has something to say here.",
        "Oceans\n\nare wide\nand deep, and the rivers all end in one of them.",
    ]


PROSE = {
    "Uses :class:`~torch.nn.Linear`, :func:`torch.add` and :ref:`the notes <notes>`.":
        "Uses Linear, torch.add and the notes.",
    "See ``x`` and `y`, *this* and **that** [1]_.": "See x and y, this and that.",
    ":param size: how many\n:returns: the lot": "size: how many\nreturns: the lot",
    "First.\n\n.. code-block:: python\n\n    x = 1\n\nLast.": "First.\n\nLast.",
    "First.\n\n.. note::\n    Mind the gap.\n\n.. versionadded:: 1.2": "First.\n\n    Mind the gap.",
    "Do this::\n\n    rm -r everything\n\nand rest.": "Do this:\n\nand rest.",
    "Title\n=====\n\nText below it.": "Title:\n\nText below it.",
    "Kept.\n\nExamples\n--------\n>>> print(words)\nonly words and no figures\n\n>>> 1 + 1\n2\n": "Kept.",
    "Table\n\n=====  =====\n1.0    2.0\n=====  =====\n": "Table",
    "First.\n\nArgs:\n    x: a number\n\nReturns:": "First.\n\nArgs:\n    x: a number",
    "2 * 3 * 4 and *args and **kwargs stay": "2 * 3 * 4 and *args and **kwargs stay",
}


@pytest.mark.parametrize("docstring", PROSE)
def test_markup_becomes_prose(docstring: str) -> None:
    assert pydocs.prose(docstring) == PROSE[docstring]


def test_it_is_built_once_and_read_as_documents(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydocs, "_roots", lambda: [package])
    built = pydocs.build()
    [path] = (files.home() / "pydocs").glob("*.txt")
    read = corpus._between_marks(built)
    assert [document.removesuffix("\n") for document in read] == list(pydocs.gather([package]))
    monkeypatch.setattr(pydocs, "gather", None)
    assert pydocs.build() == built
    flip(path, 100)
    with pytest.raises(TypeError):
        pydocs.build()
    monkeypatch.setattr(pydocs, "BUILDER", pydocs.BUILDER + 1)
    with pytest.raises(TypeError):
        pydocs.build()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(UserError, match="pip install torch"):
        corpus.documents("pydocs")


def test_the_real_standard_library_gives_english() -> None:
    [email] = [Path(sysconfig.get_paths()["stdlib"]) / "email"]
    found = "\n".join(pydocs.gather([email]))
    assert "Parser of RFC 2822 and MIME email messages." in found and ">>>" not in found and len(found) > 40_000
    words = [word.lower() for word in found.split()]
    assert sum(word in {"the", "a", "of", "to", "is", "and", "in"} for word in words) > 0.15 * len(words)


def test_the_documentation_of_what_is_written_in_c_is_found() -> None:
    [numpy] = [root for root in pydocs._roots() if root.name == "numpy"]
    source = numpy / "_core" / "_add_newdocs.py"
    found = "\n".join(map(pydocs.prose, pydocs.docstrings(source.read_bytes(), str(source))))
    assert "Return evenly spaced values within a given interval." in found
