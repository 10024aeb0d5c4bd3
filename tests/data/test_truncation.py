"""A recording whose end is missing, in each format that soundfile writes; whole ones are read, with whatever behind."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from stoker.data.speech import audio, truncation

FORMATS = ["WAV", "RF64", "W64", "AIFF", "FLAC", "OGG", "MP3"]
RATE = 16_000


def written(path: Path, format: str, subtype: str | None = None) -> bytes:
    samples = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
    soundfile.write(path, samples, RATE, format=format, subtype=subtype)
    return path.read_bytes()


@pytest.mark.parametrize("format, subtype", [*((name, None) for name in FORMATS), ("OGG", "OPUS")])
@pytest.mark.parametrize("left", [0.5, 0.95])
def test_what_is_cut_short_is_refused(tmp_path: Path, format: str, subtype: str | None, left: float) -> None:
    path = tmp_path / "a.wav"
    content = written(path, format, subtype)
    assert len(audio.read(path)) == 2 * RATE
    path.write_bytes(content[:round(left * len(content))])
    with pytest.raises(audio.AudioError, match="is cut short|flac decoder lost sync"):
        audio.read(path)


@pytest.mark.parametrize("format", ["WAV", "RF64", "W64", "AIFF", "OGG"])
def test_one_byte_is_missing(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(written(path, format)[:-1])
    with pytest.raises(audio.AudioError, match="is cut short"):
        audio.seconds(path)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "W64"])  # libsndfile takes it for sound there
def test_a_tag_behind_the_sound_is_no_mistake(tmp_path: Path, format: str) -> None:
    """As old players write it: ID3v1, 128 bytes."""
    path = tmp_path / "a.wav"
    path.write_bytes(written(path, format) + b"TAG".ljust(128, b"\0"))
    assert len(audio.read(path)) == 2 * RATE


def test_the_length_of_an_mp3_file_without_a_table_is_a_guess(tmp_path: Path) -> None:
    """Its first frame, which holds the table, is taken away: then the file ends where it ends. With a tag before it,
    of a size of 7 bits a byte, the table is found all the same."""
    path = tmp_path / "a.mp3"
    content = written(path, "MP3")
    second = content.index(content[:2], 4)
    path.write_bytes(content[second:len(content) // 2])
    assert 0.4 * RATE < len(audio.read(path)) < 1.6 * RATE
    path.write_bytes(b"ID3\4\0\0\0\0\1\x02" + bytes(130) + content[:len(content) // 2])
    with pytest.raises(audio.AudioError, match="is cut short: its header names 1.1"):
        audio.read(path)


def test_a_variable_bit_rate_without_a_table_is_no_mistake(tmp_path: Path) -> None:
    """libsndfile takes the rate of the first frames for that of all: it expects half as much again as there is."""
    path = tmp_path / "a.mp3"
    sound = np.concatenate([np.zeros(4 * RATE), 0.3 * np.random.default_rng(0).standard_normal(RATE)])
    soundfile.write(path, sound.astype(np.float32), RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    path.write_bytes(content[content.index(content[:2], 4):])
    assert soundfile.info(path).frames > 6 * RATE
    assert len(audio.read(path)) == pytest.approx(5 * RATE, rel=0.05)


def test_an_ogg_file_that_ends_between_two_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.ogg"
    content = written(path, "OGG")
    path.write_bytes(content[:content.rindex(b"OggS")])
    with pytest.raises(audio.AudioError, match="is cut short: its end is missing"):
        audio.read(path)


@pytest.mark.parametrize("head, claimed", [(b"RIFF", 2**32 - 1), (b"RIFF", 0)])
def test_a_length_that_was_not_known_is_no_mistake(tmp_path: Path, head: bytes, claimed: int) -> None:
    """As of a program that wrote into a pipe."""
    path = tmp_path / "a.wav"
    content = written(path, "WAV")
    path.write_bytes(head + claimed.to_bytes(4, "little") + content[8:])
    with open(path, "rb") as file:
        assert truncation.missing(file.fileno()) == ""
    assert len(audio.read(path)) == 2 * RATE
