"""Text that is shown as it is made."""

import io
import random
from collections.abc import Iterable

import pytest

from stoker.data.text.tokenizers import Bytes, open_tokenizer
from stoker.inference import generate, trained
from stoker.inference.generate import pieces

TEXTS = ["plain", "Größe", "東京 und 🚀🚀!", "e\u0301 \u200d👩\u200d🚀", " ", "\n\n\t"]


def spaced(ids: Iterable[int]) -> str:
    """As tokenizers decode whose words carry the space before them: the first one's is left out."""
    return " ".join(["one", "two", "three"][i] for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_never_half_a_character(text: str) -> None:
    tokenizer = Bytes()
    shown = list(pieces(tokenizer.encode_batch([text])[0].tolist(), tokenizer.decode, []))
    assert "".join(shown) == text and not any("\ufffd" in piece for piece in shown)
    assert len(shown) == len(text), "each character as soon as it is whole"


def test_pieces_of_several_bytes() -> None:
    """Of a BPE, whose pieces may begin and end within characters."""
    draw = random.Random(0)
    train = ["".join(draw.choices("ab ßü東京🚀", k=2000))]
    tokenizer = open_tokenizer("bpe", 262, train)
    ids = tokenizer.encode_batch(train)[0].tolist()
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)
    shown = list(pieces(ids, tokenizer.decode, []))
    assert "".join(shown) == train[0] and not any("\ufffd" in piece for piece in shown)


def test_what_ends_within_a_character_ends_before_it() -> None:
    assert "".join(pieces("aß🚀".encode()[:-1], Bytes().decode, [])) == "aß"


def test_bytes_that_are_no_text_do_not_hold_up_what_follows() -> None:
    assert list(pieces([255, 97, 98], Bytes().decode, [])) == ["\ufffda", "b"]


def test_the_space_before_the_first_word_stays_where_words_carry_it() -> None:
    assert "".join(pieces([1, 2, 0], spaced, [0])) == " two three one"
    assert "".join(pieces([1, 2, 0], spaced, [])) == "two three one"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_commands_and_a_file_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one\x1b[2J\ttwo\x9b\nthree"
    for kind, made, told in ((Terminal, "one\\x1b[2J\ttwo\\x9b\nthree", "one\\x1b[2J\ttwo\\x9b\\nthree\n"),
                             (io.TextIOWrapper, text, text + "\n")):
        monkeypatch.setattr("sys.stdout", kind(io.BytesIO()))
        generate._print(text)
        trained.write_line(text)
        assert generate.sys.stdout.buffer.getvalue().decode() == made + told  # type: ignore[attr-defined]
