"""Files of numbers in the cache, with a digest of every 16 MB: a block is verified when it is first read.

So a run that resumes does not wait until all of a large file has been read, and never trains on a damaged part of it.
The digest is SHA-256: on a processor with instructions for it, 1.8 GB/s.
"""

import hashlib
import logging
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from stoker import files
from stoker.config import Damaged

log = logging.getLogger(__name__)

BLOCK = 2**24  # bytes


def write(path: Path, parts: Iterable[bytes]) -> list[str]:
    """Write a file from its parts; returns the digests of its blocks. Raises OSError."""
    digests = _Digests()

    def fill(file: IO[bytes]) -> None:
        for part in parts:
            file.write(part)
            digests.update(part)

    files.write(path, fill)
    return digests.all()


class Numbers:
    """The numbers in a file, mapped into memory: a slice is a read-only array, (N,).

    Which blocks have been verified is shared with processes that are forked later, such as loader workers. A slice
    raises Damaged where a block is not what was written; then the file has been removed.
    """

    def __init__(self, path: Path, dtype: Any, digests: Sequence[str]):
        self.path, self.dtype, self.digests = path, np.dtype(dtype), digests
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._array = np.asarray(np.memmap(path, dtype, "r")) if digests else np.zeros(0, dtype)
        self._verified = mmap.mmap(-1, max(1, len(digests)))  # a byte a block, in memory that forked processes share

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        if start < stop:
            for block in range(start * self.dtype.itemsize // BLOCK, (stop * self.dtype.itemsize - 1) // BLOCK + 1):
                if not self._verified[block]:
                    self._verify(block)
        return self._array[part]

    def _verify(self, block: int) -> None:
        try:  # not by the mapping: a disk error there would end the process
            content = os.pread(self._descriptor, BLOCK, block * BLOCK)
        except OSError as error:
            self._remove(f"cannot be read ({error.strerror})")
        if hashlib.sha256(content).hexdigest() != self.digests[block]:
            self._remove(f"is damaged: bytes {block * BLOCK:,} to {block * BLOCK + len(content):,} are not what was "
                         "written there")
        self._verified[block] = 1

    def _remove(self, why: str) -> NoReturn:
        self.path.unlink(missing_ok=True)
        raise Damaged(f"{self.path} {why}. The file was removed; start again, or resume, and it is made again")


def opened(path: Path, dtype: Any, count: int, digests: Sequence[str]) -> Numbers | None:
    """The file of so many numbers; None where there is none, or it has another size, which the log says."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    if size != count * np.dtype(dtype).itemsize:
        log.warning("%s is damaged (%s bytes for %s numbers): it is made again", path, f"{size:,}", f"{count:,}")
        return None
    if len(digests) != -(-size // BLOCK):  # the note was written by a run that did not keep the numbers
        return None
    return Numbers(path, dtype, digests)


class _Digests:
    """Of each block of what is written, whatever the size of its parts."""

    def __init__(self) -> None:
        self._whole: list[str] = []
        self._begin()

    def update(self, part: bytes) -> None:
        left = memoryview(part)
        while left:
            taken = left[:self._room]
            self._hash.update(taken)
            self._room -= len(taken)
            left = left[len(taken):]
            if not self._room:
                self._whole.append(self._hash.hexdigest())
                self._begin()

    def all(self) -> list[str]:
        return [*self._whole, self._hash.hexdigest()] if self._room < BLOCK else self._whole

    def _begin(self) -> None:
        self._hash, self._room = hashlib.sha256(), BLOCK
