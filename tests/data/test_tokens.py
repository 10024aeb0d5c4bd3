"""The token cache holds exactly the documents' ids, is used again, and is made again when damaged; windows cover it."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from damage import flip, full_disk
from stoker import files
from stoker.config import Damaged, UserError
from stoker.data.text import tokenizers, tokens
from stoker.data.text.tokens import ShiftedOrder, Windows, tokenize, unigram_perplexity


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))


def documents(count: int) -> list[str]:
    """Of all lengths, from one letter to several pieces."""
    draw = random.Random(count)
    return ["".join(draw.choices("abcé    \n", k=int(10 ** draw.uniform(0, 3.5)))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_stream_is_every_document_and_its_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "pieces", partial(tokenizers.pieces, size=500))
    monkeypatch.setattr(tokens, "BATCH", 700)
    texts = documents(60)
    tokenizer = tokenizers.open_tokenizer(kind, 300, texts)
    stream = tokenize(texts, tokenizer, "text")
    expected = [number for ids in tokenizer.encode_batch(texts) for number in [*ids.tolist(), tokenizer.end_of_text]]
    assert stream[:].tolist() == expected and stream.dtype == np.uint16 and not stream[:].flags.writeable
    assert tokenizer.decode(stream[:].tolist()) == "".join(text + "<|endoftext|>" for text in texts)


def test_a_large_vocabulary_takes_four_bytes() -> None:
    class Wide(tokenizers.Bytes):
        def encode_batch(self, texts: object) -> list[np.ndarray]:
            return [np.array([65_535, 65_536, 99_999], np.uint32)]

    wide = Wide()
    wide.vocab_size, wide.end_of_text, wide.fingerprint = 100_000, 70_000, "wide"
    assert tokenize(["x"], wide, "text")[:].tolist() == [65_535, 65_536, 99_999, 70_000]


class Once(tokenizers.Bytes):
    """Counts how often it is asked."""

    asked = 0

    def encode_batch(self, texts: object) -> list[np.ndarray]:
        self.asked += 1
        return super().encode_batch(texts)  # type: ignore[arg-type]


def test_the_cache_is_keyed_by_content_and_tokenizer() -> None:
    once = Once()
    first = tokenize(["a b", "c"], once, "text")
    assert tokenize(["a b", "c"], once, "text")[:].tolist() == first[:].tolist() and once.asked == 1
    assert tokenize(["a", " bc"], once, "text")[:].tolist() == [97, 256, 32, 98, 99, 256] and once.asked == 2
    once.fingerprint = "another"
    tokenize(["a b", "c"], once, "text")
    assert once.asked == 3


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "short": lambda content: content[:-3],
    "long": lambda content: content + b"xx",
    "gone": lambda content: None,
    "no JSON": lambda content: b"{",
    "another JSON": lambda content: b'{"count": "9", "blocks": null}',
    "not text": lambda content: b"\xff\xfe",
    "a digit": lambda content: content.replace(b'"count": 1', b'"count": 2'),
    "without its digest": lambda content: content.partition(b"\n")[2],
}


@pytest.mark.parametrize("name, damage", [("bin", "short"), ("bin", "long"), ("bin", "gone"),
                                          *(("note", damage) for damage in DAMAGES)])
def test_a_damaged_cache_is_made_again(name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    once = Once()
    expected = tokenize(["some text"], once, "text")[:].tolist()
    [path] = (files.home() / "tokens").glob(f"*.{name}")
    was = path.read_bytes()
    content = DAMAGES[damage](was)
    assert content != was
    path.unlink() if content is None else path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert tokenize(["some text"], once, "text")[:].tolist() == expected and once.asked == 2
    assert (f"{path} is damaged" in caplog.text) == (damage != "gone")
    assert tokenize(["some text"], once, "text")[:].tolist() == expected and once.asked == 2


def test_a_damaged_token_is_never_read_and_the_file_is_made_again() -> None:
    once = Once()
    stream = tokenize(["some text"], once, "text")
    [path] = (files.home() / "tokens").glob("*.bin")
    flip(path, 5)
    with pytest.raises(Damaged, match=r"bytes 0 to 20 are not what was written.*resume, and it is made again"):
        Windows(stream, 4)[0]
    assert not path.exists()
    again = tokenize(["some text"], once, "text")
    assert Windows(again, 4)[0].tolist() == list(b"some ") and once.asked == 2


def test_a_cache_of_a_former_version_is_made_again() -> None:
    """It had no digests, and its note another name."""
    once = Once()
    expected = tokenize(["some text"], once, "text")[:].tolist()
    [note] = (files.home() / "tokens").glob("*.note")
    note.unlink()
    note.with_suffix(".json").write_text('{"count": 10, "dtype": "uint16"}')
    note.with_suffix(".bin").write_bytes(bytes(20))
    assert tokenize(["some text"], once, "text")[:].tolist() == expected and once.asked == 2


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write", full_disk)
    with pytest.raises(UserError, match="No space left on device in .*tokens: make room there, set STOKER_HOME"):
        tokenize(["some text"], tokenizers.Bytes(), "text")


def test_a_build_that_fails_leaves_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(tokenizers.Bytes):
        def encode_batch(self, texts: object) -> list[np.ndarray]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(["some text"], Failing(), "text")
    assert [path.suffix for path in (files.home() / "tokens").iterdir()] == [".lock"]
    assert len(tokenize(["some text"], tokenizers.Bytes(), "text")) == 10


def test_unigram_perplexity_is_that_of_the_smoothed_counts() -> None:
    train, valid = np.array([0, 0, 1], np.uint16), np.array([0, 2], np.uint16)
    assert unigram_perplexity(train, valid, 3) == pytest.approx((3 / 6 * 1 / 6) ** -0.5)
    uniform = np.tile(np.arange(50, dtype=np.uint16), 100)
    assert unigram_perplexity(uniform, uniform, 50) == pytest.approx(50)


def test_counting_in_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.random.default_rng(0).integers(0, 9, 1000).astype(np.uint16)
    whole = unigram_perplexity(stream[:700], stream[700:], 9)
    monkeypatch.setattr(tokens, "COUNTED_AT_ONCE", 64)
    assert unigram_perplexity(stream[:700], stream[700:], 9) == whole


@pytest.mark.parametrize("count, length", [(101, 10), (110, 10), (11, 10), (57, 8)])
def test_windows_make_each_token_a_target_once(count: int, length: int) -> None:
    stream = np.arange(count, dtype=np.uint16)
    windows = Windows(stream, length)
    rows = list(windows)  # type: ignore[call-overload]
    assert len(rows) == len(windows) == (count - 1) // length
    assert all(row.shape == (length + 1,) and row.dtype == torch.int64 for row in rows)
    assert torch.cat([row[1:] for row in rows]).tolist() == list(range(1, len(rows) * length + 1))
    assert all(row[:-1].tolist() == (row[1:] - 1).tolist() for row in rows)


@pytest.mark.parametrize("count, limit", [(101, 0), (107, 0), (107, 3), (11, 0)])
def test_shifted_windows_cut_the_text_as_a_circle(count: int, limit: int) -> None:
    """Each epoch after the first from a place of its own; without a seed there is one cut."""
    stream = np.arange(count, dtype=np.uint16)
    windows, plain = (Windows(stream, 10, max_samples=limit, seed=seed) for seed in (5, None))
    rows, size = len(windows), 31 if limit else count
    assert all(torch.equal(windows[row], plain[row]) for row in range(rows))
    begins = []
    for epoch in range(1, 40):
        cut = [windows[epoch * rows + row] for row in range(rows)]
        begins.append(int(cut[0][0]))
        assert all(row.shape == (11,) and row.dtype == torch.int64 for row in cut)
        expected = [(begins[-1] + place) % size for place in range(1, rows * 10 + 1)]
        assert torch.cat([row[1:] for row in cut]).tolist() == expected and cut[0][1] == (cut[0][0] + 1) % size
    assert len(set(begins)) > min(size, 39) / 2 and max(begins) < size
    again, other = (Windows(stream, 10, max_samples=limit, seed=seed) for seed in (5, 6))
    assert [int(again[epoch * rows][0]) for epoch in range(1, 40)] == begins
    assert [int(other[epoch * rows][0]) for epoch in range(1, 40)] != begins
    for absent in (rows, 2 * rows):
        with pytest.raises(IndexError):
            plain[absent]
    with pytest.raises(IndexError):
        windows[-1]


def test_what_is_left_out_stays_out_when_windows_are_shifted() -> None:
    """Row 5 of the second epoch, from its last step on: each of its targets is trained on before, and never after."""
    windows = Windows(np.arange(107, dtype=np.uint16), 10, seed=5)
    whole = ShiftedOrder(len(windows), 3, 1, seed=1, windows=windows)
    last = 2 * whole.steps_per_epoch - 1
    order = replace(whole, left_out={5: last})
    bad = set(windows[5 + len(windows)][1:].tolist())
    found = []
    for step in range(12 * order.steps_per_epoch):
        kept, every = (sum(each.items(step), []) for each in (order, whole))
        assert set(kept) <= set(every) and (step < last) <= (kept == every)
        assert all(bad & set(windows[item][1:].tolist()) for item in set(every) - set(kept))
        assert step < last or not any(bad & set(windows[item][1:].tolist()) for item in kept)
        found.append(len(every) - len(kept))
    assert 10 <= sum(found) <= 21, "one or two in each of ten epochs"
    assert [other for other in range(len(windows)) if windows.share_targets(3, other)] == [3], "neighbours share none"


def test_windows_are_loaded_in_batches() -> None:
    loader = torch.utils.data.DataLoader(Windows(np.arange(101, dtype=np.uint16), 10), batch_size=4)
    assert [batch.shape[0] for batch in loader] == [4, 4, 2]


def test_max_samples_limits_the_windows() -> None:
    stream = np.arange(101, dtype=np.uint16)
    assert [len(Windows(stream, 10, max_samples=limit)) for limit in (0, 3, 99)] == [10, 3, 10]


def test_a_window_owns_its_memory() -> None:
    tokenizer = tokenizers.Bytes()
    windows = Windows(tokenize(["abcdefgh"], tokenizer, "text"), 4)
    windows[0].zero_()
    assert windows[0].tolist() == [97, 98, 99, 100, 101]


def test_a_text_too_short_says_how_much_is_needed() -> None:
    with pytest.raises(UserError, match=r"validation text has 10 tokens.*--max_seq_len 10 needs 11.*shorter"):
        Windows(np.arange(10, dtype=np.uint16), 10, what="validation text")
