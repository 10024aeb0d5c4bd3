"""The data check: each kind of bad row is named with its file and reason, and only those are refused."""

import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sounds import make_sound
from stoker.config import UserError, printable
from stoker.data.speech import audio, recordings
from stoker.data.speech.check import Limits, checked, examined, mel_length, mel_lengths, problem
from stoker.data.speech.decoded import Fact
from stoker.data.speech.recordings import Utterance


def utterance(path: Path, text: str = "hello there", speaker: str = "") -> Utterance:
    return Utterance(str(path), text, 0.0, speaker)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def alternating(count: int) -> np.ndarray:
    """1, -1, ...: without an offset."""
    return np.resize(np.array([1, -1], np.float32), count)


def at_25(samples: int) -> int:
    return samples // 640


def test_each_kind_of_bad_row_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fine = [utterance(make_sound(tmp_path / f"fine{i}.wav", 2, seed=i)) for i in range(3)]
    (tmp_path / "text.wav").write_text("not sound")
    soundfile.write(tmp_path / "silent.wav", 1e-4 * alternating(16000), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "loud.wav", np.sign(np.sin(np.arange(32000))).astype(np.float32), 16000)
    bad = {
        utterance(tmp_path / "text.wav"): "unreadable: cannot be read as sound (Format not recognised): if it is "
                                          "sound, convert it to FLAC or WAV",
        utterance(tmp_path / "none.wav"): "unreadable: there is no such file",
        utterance(tmp_path / "nothing.wav"): "unreadable: holds no samples",
        utterance(tmp_path / "silent.wav"): "silent: its loudest sample is at 1.0e-04 of full scale",
        utterance(make_sound(tmp_path / "long.wav", 3.01, seed=5)):
            "too long: 3.0 s are 301 frames, --max_mel_length is 300",
        utterance(make_sound(tmp_path / "said.wav", 2, seed=6), ""): "unlabelled: no text, or none but punctuation",
        utterance(make_sound(tmp_path / "much.wav", 2, seed=7), "x y" * 14):
            "long text: 42 characters, --max_text_length is 40",
        utterance(make_sound(tmp_path / "short.wav", 0.4, seed=8)): "not alignable: 10 frames, its 11 labels need 12",
        utterance(Path(fine[2].path)): "duplicate: the same recording is in another split",
    }
    clipped = utterance(tmp_path / "loud.wav")
    splits = {"train": [*fine[:2], *bad, clipped], "validation": [fine[2]]}
    limits = Limits(max_mel_length=300, max_text_length=40, labels=letters, frames=at_25)
    with caplog.at_level(logging.INFO):
        used, decoded, report = checked(splits, keep=True, limits=limits)
    assert [Path(row.path).name for row in used["train"]] == ["fine0.wav", "fine1.wav", "loud.wav"]
    assert all(row.seconds == 2 for row in used["train"])
    assert report.refused == [("train", row.path, why) for row, why in bad.items()]
    assert report.doubtful == [("train", clipped.path, "clipped: 100.0% of its samples")]
    assert (report.rows["train"], report.used["train"], report.seconds["train"]) == (12, 3, 6)
    for row, why in bad.items():
        assert f"train {row.path}: {why}" in caplog.text
    assert "Data check: train: 3 of 12 rows, 0.00 h" in caplog.text
    assert "refused: 3 unreadable, 1 silent, 1 too long, 1 unlabelled, 1 long text, 1 not alignable, 1 duplicate" in (
        caplog.text)


def test_what_is_odd_about_a_used_row_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An offset is subtracted before anything is measured: a constant alone is silence."""
    fine = [utterance(make_sound(tmp_path / f"fine{i}.wav", seed=i)) for i in range(2)]
    for name, samples in {"offset": 0.2 + 0.1 * alternating(16000), "constant": np.full(16000, 0.3, np.float32),
                          "short": 0.1 * alternating(800), "level": 0.001 + 0.1 * alternating(16000)}.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="FLOAT")
    odd = [utterance(tmp_path / f"{name}.wav", "a") for name in ("offset", "constant", "short", "level")]
    with caplog.at_level(logging.INFO):
        used, decoded, report = checked({"train": [*fine, *odd], "validation": [utterance(
            make_sound(tmp_path / "other.wav", seed=9))]}, keep=True)
    assert [Path(row.path).stem for row in used["train"]] == ["fine0", "fine1", "offset", "short", "level"]
    assert report.refused == [("train", odd[1].path, "silent: its loudest sample is at 0.0e+00 of full scale")]
    assert report.doubtful == [
        ("train", odd[0].path, "offset: its mean of 2.0e-01 of full scale was subtracted"),
        ("train", odd[2].path, "short: 0.05 s")]
    assert "Data check: used, but doubtful: 1 offset, 1 short" in caplog.text
    kept = decoded.samples(odd[0].path)
    assert kept is not None and np.abs(kept - 0.1 * alternating(16000)).max() < 1e-4


def test_hostile_rows_are_refused_and_the_others_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fine = [utterance(make_sound(tmp_path / f"fine{i}.wav", seed=i)) for i in range(3)]
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "slow.wav", np.zeros(9, np.int16), 1)
    bad = {"pipe.wav": "it is a pipe, a socket or a device", "zero.wav": "it is a pipe, a socket or a device",
           "folder.wav": "is a folder", "slow.wav": "has 1 samples a second",
           "a\0b.wav": "no file can have such a name", "\ud800.wav": "no file can have such a name",
           "x" * 300 + ".wav": "File name too long"}
    splits = {"train": [fine[0], *(utterance(tmp_path / name) for name in bad), fine[1]], "validation": [fine[2]]}
    used, _, report = checked(splits, keep=True)
    assert [row.path for row in used["train"]] == [fine[0].path, fine[1].path]
    assert [path for _, path, _ in report.refused] == [str(tmp_path / name) for name in bad]
    for (_, path, why), part in zip(report.refused, bad.values()):
        assert why.startswith("unreadable: ") and part in why and printable(f"{path}: {why}") in caplog.text


def test_what_ctc_can_align_is_what_torch_can() -> None:
    """A loss is infinite exactly where there is no alignment."""
    def numbers(text: str) -> list[int]:
        return ["abc".index(letter) + 1 for letter in text]

    draw, refused = random.Random(0), 0
    for _ in range(200):
        text, frames = "".join(draw.choices("abc", k=draw.randint(1, 6))), draw.randint(1, 9)
        fact = Fact("x", count=frames, peak=1.0)
        limits = Limits(labels=numbers, frames=lambda samples: samples)
        labels, scores = torch.tensor([numbers(text)]), torch.zeros(frames, 1, 4).log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(scores, labels, [frames], [len(text)])
        why = problem(Utterance("x", text), fact, limits)
        assert bool(why) == bool(loss.isinf()), (text, frames, why)
        refused += bool(why)
    assert 40 < refused < 160


def test_what_is_played_faster_must_be_alignable_too() -> None:
    row, fact = Utterance("x", "hello"), Fact("x", count=6 * 640, peak=1.0)
    assert problem(row, fact, Limits(labels=letters, frames=at_25)) == ""
    assert "5 frames" in problem(row, fact, Limits(labels=letters, frames=at_25, speed=0.1))


def test_what_has_the_longest_length_is_of_use() -> None:
    limits = Limits(max_mel_length=300, max_text_length=11)
    assert problem(Utterance("x", "hello there"), Fact("x", count=300 * 160, peak=1.0), limits) == ""
    assert problem(Utterance("x", "hello there"), Fact("x", count=300 * 160 + 1, peak=1.0), limits)
    assert problem(Utterance("x", "hello theres"), Fact("x", count=300 * 160, peak=1.0), limits)


def test_speech_without_texts_is_of_use_where_none_are_needed() -> None:
    assert problem(Utterance("x", ""), Fact("x", count=10, peak=1.0), Limits(labelled=False)) == ""


def test_what_training_shares_with_validation_is_reported(tmp_path: Path) -> None:
    def row(number: int, text: str, speaker: str) -> Utterance:
        return utterance(make_sound(tmp_path / f"{number}.wav", 0.5, seed=number), text, speaker)

    splits = {"train": [row(0, "a", "anna"), row(1, "b", "bo"), row(2, "c", "cy")],
              "validation": [row(3, "a", "bo")], "test": [row(4, "c", "bo"), row(5, "d", "")]}
    _, _, report = examined(splits, keep=False)
    assert report.shared == {"speakers": 1, "texts": 2, "recordings": 0}
    used, _, other = examined(splits | {"test": [*splits["test"], row(1, "e", "")]}, keep=False)
    assert other.shared["recordings"] == 1 and [each.text for each in used["train"]] == ["a", "c"]
    assert report.speakers == {"train": 3, "validation": 1, "test": 1}
    assert "Overlap of training and validation: 1 speakers, 2 texts, 0 recordings" in list(report.lines())


def test_a_split_without_usable_rows_is_refused(tmp_path: Path) -> None:
    good, gone = utterance(make_sound(tmp_path / "a.wav")), utterance(tmp_path / "b.wav")
    with pytest.raises(UserError, match="none of the 1 validation recordings can be used: .*b.wav is unreadable"):
        checked({"train": [good], "validation": [gone]}, keep=False)
    with pytest.raises(UserError, match="the data have no validation recordings: give at least two"):
        checked({"train": [good], "validation": []}, keep=False)


@pytest.mark.parametrize("split", ["all", "test"])
def test_to_evaluate_a_model_only_what_is_evaluated_must_be_there(tmp_path: Path, split: str) -> None:
    splits = {"train": [], "validation": [], "test": [utterance(make_sound(tmp_path / "a.wav"))]}
    assert len(checked(splits, keep=False, evaluated_split=split)[0]["test"]) == 1
    with pytest.raises(UserError, match="the data have no validation recordings: --split all evaluates those"):
        checked(splits, keep=False, evaluated_split="validation")


def test_of_all_rows_one_must_be_usable(tmp_path: Path) -> None:
    gone = {"train": [utterance(tmp_path / "b.wav")], "validation": []}
    with pytest.raises(UserError, match="none of the 1 recordings can be used: .*b.wav is unreadable"):
        checked(gone, keep=False, evaluated_split="all")


def test_percentiles_of_lengths() -> None:
    seconds = [number / 100 for number in range(1, 1001)]  # 1 to 1000 frames
    assert mel_lengths(seconds) == ("lengths in frames of 1/100 s: 50 % 500, 90 % 900, 95 % 950, 99 % 990, longest "
                                    "1,000; --max_mel_length 1024 takes all")
    at = [int(np.percentile(range(1, 1001), p, method="inverted_cdf")) for p in (50, 90, 95, 99, 100)]
    assert at == [500, 900, 950, 990, 1000]
    assert "longest 2,000; --max_mel_length 2048 takes all; 512 takes 99 %" in mel_lengths([*[5.0] * 999, 20.0])
    assert "frames of 1/12.5 s" in mel_lengths([1.0], 12.5) and "longest 13;" in mel_lengths([1.0], 12.5)
    assert [mel_length(seconds) for seconds in (0, 0.001, 1.0, 1.001)] == [0, 1, 100, 101]


REAL = Path(__file__).parents[3] / "shared" / "data" / "speech"


@pytest.mark.skipif(not REAL.exists(), reason="the recordings are not at hand")
def test_real_sentences_are_all_of_use() -> None:
    splits = recordings.read(str(REAL / "sentences"))
    limits = Limits(max_mel_length=2048, max_text_length=256, labels=letters, frames=at_25)
    used, decoded, report = examined(splits, keep=False, limits=limits)
    assert sum(map(len, used.values())) == 536 and not report.refused and report.shared["speakers"] == 0
    assert sum(report.seconds.values()) == pytest.approx(37 * 60, rel=0.02)
    assert audio.seconds(used["train"][0].path) == pytest.approx(used["train"][0].seconds)
