"""What `--dataset` reads, refuses and says; and that the split lets nothing leak and loses nothing."""

import gzip
import io
import logging
import os
import random
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from stoker.config import UserError
from stoker.data.text import corpus as text


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))


def paragraphs(documents: list[str]) -> Counter[str]:
    """Independent of the code under test: paragraphs as a reader sees them."""
    joined = "\n\n".join(documents)
    return Counter(piece.strip() for piece in re.split(r"\n\s*\n", joined) if piece.strip())


def novel(count: int, seed: int = 0) -> str:
    """Paragraphs of random words; each fifth one repeats an earlier one."""
    draw = random.Random(seed)
    made = [" ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(30)) for _ in range(count)]
    for place in range(5, count, 5):
        made[place] = made[draw.randrange(place)]
    return "\n\n".join(made) + "\n"


# -- reading


def test_a_file_is_one_document_and_marks_divide_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff".encode() + b"one\r\n<|endoftext|>\r\ntwo <|endoftext|>\n \n<|endoftext|>three")
    assert text._between_marks(text._read(path)) == ["one\r\n", "two ", "three"]


def test_a_folder_is_read_recursively_by_path_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/config", "c"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text(f"text of {name}")
    os.mkfifo(tmp_path / "corpus" / "pipe")
    assert text._folder_texts(tmp_path / "corpus") == ["text of a/z.md", "text of b.txt", "text of c"]


def test_what_is_no_text_is_left_out_by_name_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "good.txt").write_text(novel(200))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "late.txt").write_bytes(b"a" * 70_000 + b"\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    corpus = text.documents(str(tmp_path))
    assert paragraphs(corpus.train + corpus.valid) == paragraphs([novel(200)])
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split("/")[-1] for line in lines] == [
        "empty.txt: is empty",
        "late.txt: is not UTF-8 text (byte 0xff at offset 70,000)",
        "latin.txt: is not UTF-8 text (byte 0xe9 at offset 3)",
        "picture.png: is not UTF-8 text (a zero byte at offset 4)",
    ]


def test_many_refused_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "good.txt").write_text(novel(200))
    for number in range(25):
        (tmp_path / f"{number:02d}.bin").write_bytes(b"\0")
    text.documents(str(tmp_path))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 21 and "5 more files" in warnings[-1]


def test_a_character_cut_by_the_end_of_the_head_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * (text.HEAD_BYTES - 1) + "é and more")
    assert text.check(str(path)) == []


MISTAKES = {
    "": "is empty",
    "nowhere.txt": "there is no such file",
    "novell.txt": r"did you mean \S*novel.txt\?",
    "pydoc": "did you mean pydocs?",
    "wikitext103": "did you mean wikitext-103?",
    "book.txt.gz": "is not text but a gzip file: unpack it first",
    "book.zip": "is not text but a zip file: unpack it first",
    "empty.txt": "is empty",
    "blank.txt": "nothing but blanks",
    "latin.txt": r"byte 0xe9 at offset 3",
    "zero.bin": "zero byte at offset 1",
    "utf16.txt": "is not UTF-8 text",
    "late.txt": "byte 0xff at offset 70,000",
    "pipe": "is a pipe, a socket or a device",
    "nothing": "has no files",
    "binaries": "none of its 1 files",
    "x" * 300: "File name too long",
}


def zipped() -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("book.txt", "a text")
        return file.getvalue()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("nothing", "binaries"):
        (tmp_path / folder).mkdir()
    for file, content in {
        "novel.txt": b"a novel", "empty.txt": b"", "blank.txt": b" \n", "latin.txt": b"caf\xe9 au lait",
        "zero.bin": b"a\0", "utf16.txt": "text".encode("utf-16"), "late.txt": b"a" * 70_000 + b"\xff",
        "binaries/one": b"\0", "book.txt.gz": gzip.compress(b"a text"), "book.zip": zipped(),
    }.items():
        (tmp_path / file).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=MISTAKES[name]) as caught:
        text.documents(name)
    [line] = caught.value.problems
    assert line.startswith("--dataset") and name in line and "\n" not in line and "give a text file" in line


def test_any_error_of_the_system_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text(novel(200))
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        assert "Permission denied" in text.check(str(tmp_path / "a.txt"))[0]
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        text.documents(str(tmp_path / "a.txt"))


def test_a_file_of_a_folder_that_fails_while_it_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "bad.txt":
            raise OSError(5, "Input/output error")
        return read(path)

    for name in ("bad.txt", "good.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert text._folder_texts(tmp_path) == ["good.txt"]
    assert "bad.txt: cannot be read (Input/output error)" in caplog.text


def test_a_folder_that_cannot_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "good.txt").write_text("good")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert text._folder_texts(tmp_path) == ["good"]
    assert "closed: cannot be read (Permission denied)" in caplog.text


def test_the_check_accepts_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\0")
    assert text.check(str(tmp_path)) == text.check(str(tmp_path / "a.txt")) == []
    assert all(text.check(name) == [] for name in text.NAMES)


# -- the split


def test_many_documents_are_split_whole_with_their_copies() -> None:
    documents = [f"document {number % 50} " * 20 for number in range(100)]
    corpus = text.split(documents)
    assert not set(corpus.train) & set(corpus.valid)
    assert Counter(corpus.train + corpus.valid) == Counter(documents)
    assert 0.05 <= sum(map(len, corpus.valid)) / sum(map(len, documents)) <= 0.10
    assert set(text.split(documents[::-1]).valid) == set(corpus.valid), "the order of files must not matter"


def test_blanks_around_a_document_make_no_other_of_it() -> None:
    documents = [f"document {number} " * 20 + end for number in range(30) for end in ("", "\n", "\n\n")]
    corpus = text.split(documents)
    assert corpus.leaked() == 0 and len(corpus.valid) % 3 == 0 and len(corpus.train + corpus.valid) == 90


def test_one_huge_document_never_is_the_validation_text() -> None:
    for seed in range(20):
        documents = [f"small {seed} {number} " * 30 for number in range(40)] + [f"huge {seed} " * 20_000]
        assert documents[-1] in text.split(documents).train


def test_a_few_documents_are_split_at_the_tail_between_paragraphs() -> None:
    documents = [novel(300, seed=1), novel(300, seed=2)]
    corpus = text.split(documents)
    train, valid = paragraphs(corpus.train), paragraphs(corpus.valid)
    assert not train.keys() & valid.keys()
    assert train + valid == paragraphs(documents)
    assert 0.03 < sum(map(len, corpus.valid)) / sum(map(len, documents)) < 0.05
    assert corpus.train[0] == documents[0] and documents[1].startswith(corpus.train[1])


def test_a_repeated_paragraph_of_the_tail_goes_to_training() -> None:
    fresh = [f"paragraph number {number}, unlike the others" for number in range(1000)]
    corpus = text.split(["\n\n".join([*fresh[:980], fresh[0], *fresh[980:]])])
    assert fresh[0] not in corpus.valid[0] and corpus.train[-1].strip() == fresh[0]


def test_without_blank_lines_it_is_lines_that_do_not_repeat() -> None:
    lines = [f"sample {number % 960}" for number in range(1000)]
    corpus = text.split(["\n".join(lines[:500]) + "\n", "\n".join(lines[500:]) + "\n"])
    train, valid = ("".join(side).split("\n") for side in (corpus.train, corpus.valid))
    assert not set(filter(None, train)) & set(filter(None, valid))
    assert Counter(filter(None, train + valid)) == Counter(lines)


def test_without_lines_it_is_cut_between_words_or_anywhere() -> None:
    words = " ".join(str(number) for number in range(10_000))
    corpus = text.split([words])
    assert "".join(corpus.train + corpus.valid) == words and corpus.train[0].endswith(" ")
    solid = "x".join(str(number) for number in range(10_000))
    assert "".join(text.split([solid]).train + text.split([solid]).valid) == solid


@pytest.mark.parametrize("documents", [["the same line\n" * 1000], ["x"]])
def test_where_nothing_can_be_set_aside_it_says_so(documents: list[str]) -> None:
    with pytest.raises(UserError, match="too short or too repetitive"):
        text.split(documents)


def test_the_fingerprint_knows_content_order_and_borders() -> None:
    prints = {text.fingerprint(each) for each in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "d"])}
    assert len(prints) == 5
    assert text.split([novel(100)]).fingerprint == text.fingerprint([novel(100)])
