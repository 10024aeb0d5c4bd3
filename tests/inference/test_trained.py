"""What the commands print of each file: in batches, whatever could be read of them, and what could not."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from stoker.config import UserError
from stoker.inference import trained


class NoNumber(Exception):
    """is no number"""


def read(path: str) -> int:
    if not path.isdigit():
        raise NoNumber("is no number")
    return int(path)


class Model:
    """Answers with a number and its square, and remembers the batches it got."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, numbers: list[int]) -> Iterator[dict[str, Any]]:
        self.batches.append(numbers)
        yield from ({"number": number, "square": number ** 2} for number in numbers)


def answered(capsysbinary: pytest.CaptureFixture[bytes], *paths: str, as_json: bool = False,
             at_once: int = 2) -> tuple[int, str, str, list[list[int]]]:
    model = Model()
    code = trained.answer(paths, read, NoNumber, model, lambda found: [f"n {found['number']}", f"s {found['square']}"],
                          as_json=as_json, at_once=at_once)
    out, err = capsysbinary.readouterr()
    return code, out.decode(), err.decode(), model.batches


def test_each_answer_stands_after_its_file(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    code, out, err, batches = answered(capsysbinary, "1", "2", "3")
    assert (code, err, batches) == (0, "", [[1, 2], [3]])
    assert out == "1\tn 1\n1\ts 1\n2\tn 2\n2\ts 4\n3\tn 3\n3\ts 9\n"


def test_the_answer_to_one_file_stands_alone(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert answered(capsysbinary, "7")[:3] == (0, "n 7\ns 49\n", "")


def test_what_cannot_be_read_is_reported_and_the_rest_answered(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    code, out, err, batches = answered(capsysbinary, "1", "x", "y", "z", "3", as_json=True)
    assert code == 1 and batches == [[1], [3]]
    assert [json.loads(line) for line in out.splitlines()] == [
        {"file": "1", "number": 1, "square": 1}, {"file": "3", "number": 3, "square": 9}]
    assert [line.partition(": ")[2] for line in err.splitlines()] == [f"{name} is no number" for name in "xyz"]


def test_another_error_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        trained.answer(["1"], read, NoNumber, lambda numbers: [{"text": 1 / 0}], lambda found: [], as_json=False)


def test_files_must_be_named() -> None:
    with pytest.raises(UserError, match="which picture. give files, folders, or - for standard input"):
        trained.inputs([], [".png"], "picture")
