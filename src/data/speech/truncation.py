"""Whether a sound file is all there. libsndfile reads what is left of one that was cut short, and says nothing."""

import os
import struct
from typing import NamedTuple

OGG_PAGE = 65_307  # bytes, at most (RFC 3533, section 6)
OGG_LAST = 4  # the flag of a stream's last page
ID3 = 10  # bytes of the header of an ID3v2 tag
MP3_FRAME = 4_096  # bytes in which the first frame ends; only that may hold a table with the file's length


class Length(NamedTuple):
    """Where the header of a format names the length of the file: a struct's format, and what is not counted."""

    at: int
    format: str
    more: int


# Microsoft's RIFF, EBU Tech 3306 (RF64), Apple's AIFF, Sonic Foundry's W64
LENGTHS = {b"RIFF": Length(4, "<I", 8), b"RF64": Length(20, "<Q", 8), b"FORM": Length(4, ">I", 8),
           b"riff": Length(16, "<Q", 0)}
UNKNOWN = 2**31  # and more: a program that wrote to a pipe did not know the length


def missing(descriptor: int) -> str:
    """What is missing at the end of an open file, in words; '' where its beginning and end do not show it."""
    size, head = os.fstat(descriptor).st_size, os.pread(descriptor, 28, 0)
    if head[:4] == b"OggS":
        return "" if _ends_as_ogg(os.pread(descriptor, OGG_PAGE, max(0, size - OGG_PAGE))) else "its end is missing"
    length = LENGTHS.get(head[:4])
    if not length or len(head) < 28:
        return ""
    claimed, = struct.unpack_from(length.format, head, length.at)
    lacking = 0 if claimed >= UNKNOWN and length.format == "<I" else claimed + length.more - size
    return f"its last {lacking:,} bytes are missing" if lacking > 0 else ""


def _ends_as_ogg(tail: bytes) -> bool:
    """Whether the last page of the file is whole, and the last of a stream. (RFC 3533, section 6)"""
    start = tail.rfind(b"OggS")
    page = tail[start:]
    if start < 0 or len(page) < 27 or len(page) < 27 + page[26]:
        return False
    whole = 27 + page[26] + sum(page[27:27 + page[26]])
    return len(page) >= whole and bool(page[5] & OGG_LAST)


def knows_frames(descriptor: int) -> bool:
    """Whether the file states the number of frames that libsndfile reports: for an MP3 file without a table in its
    first frame, libsndfile guesses it."""
    head = os.pread(descriptor, ID3, 0)
    tag = 0
    if head[:3] == b"ID3" and len(head) == ID3:  # its size has seven bits to a byte
        tag = ID3 + sum(byte << 7 * (3 - i) for i, byte in enumerate(head[6:]))
    first = os.pread(descriptor, MP3_FRAME, tag)
    return first[:1] != b"\xff" or any(table in first for table in (b"Xing", b"Info", b"VBRI"))
