"""Sound files: every format, rate and number of channels comes out as the same mono samples; what is broken is told."""

import math
import os
import tracemalloc
import wave
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import Dataset

from stoker.data.loader import evaluation_batches
from stoker.data.speech import audio


def tone(frequency: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_a_wave_file_of_the_standard_library_reads_as_it_was_written(tmp_path: Path) -> None:
    samples = np.array([0, 1, 12345, -12345, -2**15, 2**15 - 1], "<i2")  # without an offset
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


@pytest.mark.parametrize("rate", [22050, 44100, 48000, 48017])
def test_what_the_new_rate_cannot_hold_is_gone_and_the_rest_stays(rate: int) -> None:
    """Against the sines themselves: above half of the new rate nothing comes through, also not as another tone."""
    above = audio.resampled(tone(8100, rate, 2), rate, 16000)[4000:-4000]
    assert np.sqrt(np.mean(np.square(above))) < 0.5 * math.sqrt(0.5) * 10 ** (-100 / 20)
    for frequency in (100, 3000, 7000):
        found, known = audio.resampled(tone(frequency, rate, 2), rate, 16000), tone(frequency, 16000, 2)
        loudness = [np.sqrt(np.mean(np.square(each[4000:-4000].astype(float)))) for each in (found, known)]
        assert abs(20 * math.log10(loudness[0] / loudness[1])) < 0.01
        assert np.abs(found - known)[4000:-4000].max() < 1e-3, "nor is it moved"


@pytest.mark.parametrize("rate, new", [(8000, 16000), (44100, 16000), (48000, 16000), (48017, 16000), (19, 20)])
def test_the_length_at_another_rate_is_rounded_up(rate: int, new: int) -> None:
    for count in [*range(130), *np.random.default_rng(rate).integers(130, 200_000, 20).tolist()]:
        found = audio.resampled(np.ones(count, np.float32), rate, new)
        assert len(found) == -(-count * new // rate) and found.dtype == np.float32 and np.isfinite(found).all(), count


def test_channels_become_their_mean(tmp_path: Path) -> None:
    left, right = tone(300, 16000), tone(500, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    assert np.allclose(audio.read(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


def test_channels_that_cancel_each_other_out_are_heard_by_the_loudest(tmp_path: Path) -> None:
    """In opposite phase almost nothing is left of the mean; of channels without anything in common, or of a silent one
    beside, a half."""
    left, right, still = tone(300, 16000), tone(500, 16000), np.zeros(8000, np.float32)
    for number, (channels, wanted) in enumerate([((0.9 * left, -left), -left), ((left, -0.9 * left), left),
                                                 ((left, right), (left + right) / 2), ((left, still), left / 2),
                                                 ((left, -left, right), right / 3), ((left, left), left)]):
        soundfile.write(tmp_path / f"{number}.wav", np.stack(channels, 1), 16000, subtype="FLOAT")
        assert np.allclose(audio.read(tmp_path / f"{number}.wav"), wanted, atol=1e-6), number
    assert audio.survey(tmp_path / "0.wav").channel == 1 and audio.survey(tmp_path / "2.wav").channel is None


@pytest.mark.parametrize("rate, channels", [(16000, 1), (44100, 2), (4000, 1)])
def test_an_offset_makes_no_difference(tmp_path: Path, rate: int, channels: int) -> None:
    """Also where the sum is beyond full scale."""
    known = np.stack([1.2 * tone(300, rate)] * channels, 1)
    for name, offset in (("none", 0.0), ("offset", 0.6)):
        soundfile.write(tmp_path / f"{name}.wav", known + np.float32(offset), rate, subtype="FLOAT")
    assert np.abs(audio.read(tmp_path / "offset.wav") - audio.read(tmp_path / "none.wav")).max() < 1e-6


def test_a_survey_is_what_numpy_computes_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(0).uniform(-0.9, 1.2, (10_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 22050, subtype="FLOAT")
    mean = samples.mean(axis=1).astype(float)
    for size in (1000, 2**16):
        monkeypatch.setattr(audio, "AT_ONCE", size)
        found = audio.survey(tmp_path / "a.wav")
        assert (found.rate, found.channels, found.count, found.channel) == (22050, 2, 10_000, None)
        assert found.offset == pytest.approx(mean.mean()) and found.rms == pytest.approx(mean.std())
        assert found.peak == pytest.approx(np.abs(mean - mean.mean()).max())
        assert found.clipped == (np.abs(samples) >= audio.FULL_SCALE).mean() > 0.05


def test_the_blocks_of_a_file_are_what_is_read_at_once(tmp_path: Path) -> None:
    for rate in (16000, 44100, 1000):
        soundfile.write(tmp_path / "a.wav", 0.1 + tone(40, rate, 150_000 / rate), rate, subtype="FLOAT")
        blocks = list(audio.blocks(tmp_path / "a.wav", audio.survey(tmp_path / "a.wav")))
        assert len(blocks) > 1 and np.array_equal(np.concatenate(blocks), audio.read(tmp_path / "a.wav"))


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
    soundfile.write(tmp_path / "loud.wav", np.array([0.1, -2e4]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], np.float32), 16000, subtype="FLOAT")
    for name, why in {"text.wav": "cannot be read as sound (Format not recognised): if it is sound, "
                      "convert it to FLAC or WAV", "empty.flac": "is empty",
                      "loud.wav": "holds samples of up to 2e+04, where full scale is 1: save it again with 16 bits",
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


class Resampled(Dataset[np.ndarray]):
    """Item i is a sound at another rate."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> np.ndarray:
        return audio.resampled(np.random.default_rng(0).standard_normal(50_000).astype(np.float32), 44100, 16000)


def test_resampled_anywhere_and_in_any_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    known, threads = Resampled()[0], torch.get_num_threads()
    assert len(known) and np.array_equal(next(evaluation_batches(Resampled(), list, 1, 1))[0], known), "in a worker"
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert np.array_equal(Resampled()[0], known)
    torch.set_num_threads(threads)
    for size in (1000, 7919, 2**20):
        monkeypatch.setattr(audio, "AT_ONCE", size)
        assert np.array_equal(Resampled()[0], known)


# -- hostile files --------------------------------------------------------------------------------------------------


def wave_file(path: Path, *, rate: int = 16000, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * channels * 100))


def flac_file(path: Path, *, rate: int = 16000, frames: int = 8000) -> None:
    """With a header that claims so much of 8,000 samples (RFC 9639, 8.2: 20 bits, and the last 36 of the same 64)."""
    soundfile.write(path, tone(300, 16000), 16000)
    content = bytearray(path.read_bytes())
    middle = int.from_bytes(content[18:26], "big") >> 36 & 0xFF
    content[18:26] = (rate << 44 | middle << 36 | frames).to_bytes(8, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("make, why", [
    (lambda path: wave_file(path, rate=1), "has 1 samples a second: from 1,000 to 384,000 can be read"),
    (lambda path: wave_file(path, rate=2**31 - 1), "has 2,147,483,647 samples a second: from"),
    (lambda path: wave_file(path, channels=1000), "has 1,000 channels: up to 64 can be read"),
    (lambda path: flac_file(path, rate=655_350), "has 655,350 samples a second: from"),
    (lambda path: flac_file(path, frames=2**36 - 1), "is longer than 10 minutes: cut it into parts"),
    (lambda path: flac_file(path, frames=0), "does not say how long it is, as if written to a pipe: save it again"),
    (lambda path: soundfile.write(path.with_suffix(".flac"), np.zeros(601 * 1000, np.int16), 1000) or
     path.with_suffix(".flac").rename(path), "is longer than 10 minutes: cut it into parts"),
    (os.mkfifo, "cannot be read (it is a pipe, a socket or a device instead of a regular file)"),
    (lambda path: path.symlink_to("/dev/zero"), "cannot be read (it is a pipe, a socket or a device"),
    (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
    (Path.mkdir, "is a folder")])
def test_a_hostile_file_is_refused(tmp_path: Path, make: Callable[[Path], None], why: str) -> None:
    make(tmp_path / "a.flac")
    for read in (audio.read, audio.seconds):
        with pytest.raises(audio.AudioError) as caught:
            read(tmp_path / "a.flac")
        assert str(caught.value).startswith(why)


def test_a_rate_without_a_common_divisor_is_read(tmp_path: Path) -> None:
    """The windowed sinc that such rates once went through needed a table of 6 GB."""
    wave_file(tmp_path / "a.wav", rate=48017)
    assert len(audio.read(tmp_path / "a.wav")) == math.ceil(100 * 16000 / 48017)


@pytest.mark.parametrize("claimed, why", [(9_000_000, "is cut short: its header names more"), (8000, "")])
def test_what_a_header_claims_takes_no_memory(tmp_path: Path, claimed: int, why: str) -> None:
    flac_file(tmp_path / "a.flac", frames=claimed)
    tracemalloc.start()
    try:
        with pytest.raises(audio.AudioError) if why else nullcontext() as caught:
            audio.read(tmp_path / "a.flac")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000, "a block, not the 36 MB of that length"
    finally:
        tracemalloc.stop()
    assert why in str(caught.value if why else "")


def test_a_longer_recording_may_be_asked_for(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(601 * 1000, np.int16), 1000)
    assert len(audio.read(tmp_path / "a.wav", 1000, longest=601)) == 601_000
    with pytest.raises(audio.AudioError, match="is longer than 10 minutes"):
        audio.read(tmp_path / "a.wav", 1000, longest=600)
