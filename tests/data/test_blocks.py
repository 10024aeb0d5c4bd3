"""Digests are those of each block; a block is verified once, when it is first read, and a damaged one is never read."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from damage import flip
from stoker.config import Damaged
from stoker.data import blocks
from stoker.data.blocks import Numbers

BLOCK = 64  # bytes: 32 numbers
NUMBERS = np.arange(100, dtype=np.uint16)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "numbers.bin"


def written(path: Path, sizes: tuple[int, ...] = (100,)) -> Numbers:
    parts = np.split(NUMBERS, np.cumsum(sizes)[:-1])
    found = blocks.opened(path, np.uint16, 100, blocks.write(path, (part.tobytes() for part in parts)))
    assert found is not None
    return found


@pytest.mark.parametrize("sizes", [(100,), (32, 32, 32, 4), (1, 99), (0, 64, 0, 36), (31, 2, 67)])
def test_digests_are_those_of_the_blocks_however_they_are_written(sizes: tuple[int, ...], path: Path) -> None:
    found, content = written(path, sizes), NUMBERS.tobytes()
    assert path.read_bytes() == content
    assert found.digests == [hashlib.sha256(content[i:i + BLOCK]).hexdigest() for i in range(0, len(content), BLOCK)]


@pytest.mark.parametrize("count, digests", [(0, 0), (32, 1), (64, 2)])
def test_no_block_is_begun_at_the_end_of_the_last(count: int, digests: int, path: Path) -> None:
    found = blocks.opened(path, np.uint16, count, blocks.write(path, [NUMBERS[:count].tobytes()]))
    assert found is not None and len(found.digests) == digests and found[:].tolist() == list(range(count))


@pytest.mark.parametrize("part", [slice(None), slice(0, 1), slice(31, 33), slice(99, 100), slice(-5, None),
                                  slice(50, 50), slice(90, 500), slice(200, 300)])
def test_a_slice_is_that_of_an_array(part: slice, path: Path) -> None:
    found = written(path)
    assert found[part].tolist() == NUMBERS[part].tolist() and len(found) == 100 and type(found[part]) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        found[0:1][0] = 1


@pytest.mark.parametrize("damaged, first, last", [(0, 0, 32), (1, 32, 64), (2, 64, 96), (3, 96, 100)])
def test_each_block_is_verified_when_it_is_read_and_no_other(damaged: int, first: int, last: int, path: Path) -> None:
    """Up to its first number, and from its last one on, everything can be read."""
    found = written(path)
    flip(path, 2 * first)
    assert found[:first].tolist() == list(range(first)) and found[last:].tolist() == list(range(last, 100))
    assert path.exists()
    for part in (slice(first, first + 1), slice(last - 1, last), slice(None)):
        with pytest.raises(Damaged, match=f"{path} is damaged: bytes {2 * first} to {2 * last} are not"):
            found[part]
        assert not path.exists(), "or the next start would take it again"


def test_a_block_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, read, places = written(path), os.pread, list[int]()
    monkeypatch.setattr(os, "pread", lambda file, size, place: places.append(place) or read(file, size, place))
    for start in (40, 0, 33, 10, 95, 96):
        found[start:start + 4]
    assert places == [64, 0, 128, 192]


def test_forked_processes_share_what_was_verified(path: Path) -> None:
    """By each other's blocks, too."""
    found = written(path)
    if (child := os.fork()) == 0:
        found[0:1]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert found._verified[:] == b"\1\0\0\0"


def test_what_the_disk_cannot_read_is_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*args: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    found = written(path)
    monkeypatch.setattr(os, "pread", unreadable)
    with pytest.raises(Damaged, match=r"cannot be read \(Input/output error\)"):
        found[0:1]
    assert not path.exists()


def test_a_file_cut_short_after_it_was_opened_is_damaged(path: Path) -> None:
    """A map of it would end the process."""
    found = written(path)
    os.truncate(path, 150)
    with pytest.raises(Damaged):
        found[60:]


def test_numbers_without_digests_are_not_opened(path: Path) -> None:
    digests = written(path).digests
    assert blocks.opened(path, np.uint16, 100, []) is None is blocks.opened(path, np.uint16, 100, digests[:-1])
