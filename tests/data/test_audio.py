"""Sound files: every format, rate and number of channels comes out as the same mono samples; what is broken is told."""

import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data import audio


def tone(frequency: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_a_wave_file_of_the_standard_library_reads_as_it_was_written(tmp_path: Path) -> None:
    samples = np.array([0, 1, -1, 12345, -2**15, 2**15 - 1], "<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    found = audio.read(tmp_path / "a.wav")
    assert found.dtype == np.float32 and (found == samples / np.float32(2**15)).all()
    assert audio.seconds(tmp_path / "a.wav") == 6 / 16000


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_another_rate_is_the_same_sound(tmp_path: Path, rate: int) -> None:
    """Against the sine itself; the ends, where the filter reaches beyond, are left out."""
    soundfile.write(tmp_path / "a.wav", tone(1000, rate), rate, subtype="FLOAT")
    found, known = audio.read(tmp_path / "a.wav"), tone(1000, 16000)
    assert len(found) == len(known)
    assert np.abs(found - known)[200:-200].max() < 2e-3


def test_what_the_new_rate_cannot_hold_is_gone(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(11000, 44100), 44100, subtype="FLOAT")
    assert np.abs(audio.read(tmp_path / "a.wav"))[200:-200].max() < 0.01
    assert np.abs(audio.read(tmp_path / "a.wav", 44100)).max() > 0.49


def test_channels_become_their_mean(tmp_path: Path) -> None:
    left, right = tone(300, 16000), tone(500, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    assert np.allclose(audio.read(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("suffix, close", [(".flac", 1e-4), (".ogg", 0.05), (".mp3", 0.05)])
def test_every_format(tmp_path: Path, suffix: str, close: float) -> None:
    known = tone(700, 16000)
    soundfile.write(tmp_path / f"a{suffix}", known, 16000)
    found = audio.read(tmp_path / f"a{suffix}")
    assert suffix in audio.SUFFIXES and abs(len(found) - len(known)) < 2000
    middle = slice(2000, 6000)
    assert np.abs(found[middle] - known[middle]).max() < close
    assert audio.seconds(tmp_path / f"a{suffix}") == pytest.approx(0.5, abs=0.1)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    known = tone(440, 16000)
    audio.write(tmp_path / "a.flac", known)
    found = audio.read(tmp_path / "a.flac")
    assert np.abs(found - known).max() <= 2**-15
    with open(tmp_path / "b.flac", "wb") as file:
        audio.write(file, (known * 2**15).astype(np.int16), 8000)
    assert (audio.read(tmp_path / "b.flac", 8000) == (known * 2**15).astype(np.int16) / 2**15).all()


def test_what_is_too_loud_is_cut_at_full_scale(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 4 * tone(100, 16000), 16000, subtype="FLOAT")
    assert np.abs(audio.read(tmp_path / "a.wav")).max() == 1


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound at all" * 100)
    (tmp_path / "empty.flac").touch()
    soundfile.write(tmp_path / "whole.wav", tone(300, 16000), 16000)
    content = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[:-1000])
    soundfile.write(tmp_path / "whole.flac", tone(300, 16000), 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:-2000])
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], np.float32), 16000, subtype="FLOAT")
    for name, why in {"text.wav": "cannot be read as sound (Format not recognised)", "empty.flac": "is empty",
                      "cut.wav": "is cut short: its last 1,000 bytes are missing", "nan.wav": "holds NaN or Inf",
                      "cut.flac": "cannot be read as sound (flac decoder lost sync)", "": "is a folder",
                      "none.wav": "there is no such file"}.items():
        with pytest.raises(audio.AudioError) as caught:
            audio.read(tmp_path / name)
        assert str(caught.value) == why, name
    with pytest.raises(audio.AudioError, match="there is no such file"):
        audio.seconds(tmp_path / "none.wav")


def test_a_wave_file_from_a_pipe_does_not_know_its_length(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(300, 16000), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert len(audio.read(tmp_path / "a.wav")) == 8000


REAL = Path(__file__).parents[3] / "shared" / "data" / "speech" / "read_misc" / "jfk.flac"


@pytest.mark.skipif(not REAL.exists(), reason="the recording is not at hand")
def test_a_real_recording_of_two_channels_at_another_rate() -> None:
    assert soundfile.info(REAL).samplerate == 44100 and soundfile.info(REAL).channels == 2
    assert len(audio.read(REAL)) == 11 * 16000 and audio.seconds(REAL) == 11


def test_resampled_by_any_number_of_threads_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one, that is, whatever the number: not on all machines are the last bits of several others."""
    samples, threads = np.random.default_rng(0).standard_normal(50000).astype(np.float32), torch.get_num_threads()
    asked, resampler = [], audio._resampler
    monkeypatch.setattr(audio, "_resampler", lambda *rates: (asked.append(torch.get_num_threads()),
                                                             resampler(*rates))[1])
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(audio.resampled(samples, 8000, 16000))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert asked == [1, 1, 1] and np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
