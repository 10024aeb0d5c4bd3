"""Clips: the same bits from a cache as from the files, and in each epoch changed as (seed, epoch, row) says."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from damage import flip
from sounds import make_sound
from stoker.config import Damaged, UserError
from stoker.data import decode_cache
from stoker.data.loader import LengthOrder, training_batches
from stoker.data.speech import audio
from stoker.data.speech.augmentation import Augmentation
from stoker.data.speech.clips import Clips
from stoker.data.speech.decoded import as_int16, decode
from stoker.data.speech.recordings import Utterance

LOUD = Augmentation(speed=0.1, gain=6, noise=20)


@pytest.fixture
def rows(tmp_path: Path) -> list[Utterance]:
    paths = [make_sound(tmp_path / f"{i}.flac", 0.4 + 0.1 * i, rate=rate, seed=i)
             for i, rate in enumerate((16000, 8000, 22050, 44100, 16000))]
    return [Utterance(str(path), f"text {i}", 0.4 + 0.1 * i) for i, path in enumerate(paths)]


def paths_of(rows: list[Utterance]) -> list[str]:
    return [row.path for row in rows]


def test_kept_or_not_the_samples_are_the_same(rows: list[Utterance]) -> None:
    kept = decode(paths_of(rows), keep=True)
    for augmentation in (Augmentation(), LOUD):
        from_disk = Clips(rows, decoded=kept, augmentation=augmentation, seed=3)
        from_files = Clips(rows, augmentation=augmentation, seed=3)
        for a, b in zip(from_disk, from_files, strict=True):
            assert torch.equal(a.waveform, b.waveform) and a[1:] == b[1:]
            assert a.waveform.dtype == torch.float32 and a.waveform.abs().max() <= 1
    whole = Clips(rows)[0].waveform.numpy()
    recorded = soundfile.read(rows[0].path, dtype="float64")[0]
    assert np.abs(whole - (recorded - recorded.mean())).max() <= 2**-16 + 1e-7 and Clips(rows)[0].text == "text 0"


def test_what_was_decoded_is_remembered_until_a_file_changes(rows: list[Utterance],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    first = decode(paths_of(rows), keep=True)
    with monkeypatch.context() as patch:
        patch.setattr(audio, "read", lambda path: pytest.fail("was decoded again"))
        again = decode(paths_of(rows), keep=True)
    assert again.facts == first.facts and again.fingerprint() == first.fingerprint()
    make_sound(Path(rows[1].path), 0.7, seed=9)
    changed = decode(paths_of(rows), keep=True)
    assert changed.facts[rows[1].path].seconds == 0.7 and changed.fingerprint() != first.fingerprint()
    assert (changed.samples(rows[4].path) == first.samples(rows[4].path)).all()


def test_a_cache_that_lost_its_end_is_made_anew(rows: list[Utterance], own_home: Path) -> None:
    first = decode(paths_of(rows), keep=True)
    expected = first.samples(rows[4].path)
    [kept] = (own_home / "audio").glob("*.bin")
    os.truncate(kept, 1000)
    assert (decode(paths_of(rows), keep=True).samples(rows[4].path) == expected).all()


def test_a_damaged_sample_is_never_heard_and_the_cache_is_made_again(rows: list[Utterance], own_home: Path) -> None:
    expected = [clip.waveform for clip in Clips(rows)]
    clips = Clips(rows, decoded=decode(paths_of(rows), keep=True))
    [kept] = (own_home / "audio").glob("*.bin")
    flip(kept, 1001)
    with pytest.raises(Damaged, match=f"{kept} is damaged"):
        clips[4]
    again = Clips(rows, decoded=decode(paths_of(rows), keep=True))
    assert all(torch.equal(clip.waveform, one) for clip, one in zip(again, expected, strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_damaged_facts_are_found_out_again(keep: bool, rows: list[Utterance], own_home: Path) -> None:
    first = decode(paths_of(rows), keep=keep)
    [note] = (own_home / "audio").glob("*.note")
    was = note.read_bytes()
    note.write_bytes(was.replace(b'"count": ', b'"count": 1', 1))
    assert note.read_bytes() != was and decode(paths_of(rows), keep=keep).facts == first.facts
    assert note.read_bytes() == was


def test_facts_found_without_keeping_are_no_digests_of_what_was_kept(rows: list[Utterance], own_home: Path) -> None:
    first = decode(paths_of(rows), keep=True)
    [note] = (own_home / "audio").glob("*.note")
    note.unlink()
    decode(paths_of(rows), keep=False)
    samples = decode(paths_of(rows), keep=True).samples(rows[4].path)
    assert samples is not None and np.array_equal(samples, first.samples(rows[4].path))  # type: ignore[arg-type]


def test_where_no_file_can_be_read_nothing_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        found = decode([str(tmp_path / "none.wav")], keep=True)
        assert [fact.problem for fact in found.facts.values()] == ["there is no such file"]


def test_a_file_that_changed_since_it_was_checked_is_not_heard(rows: list[Utterance]) -> None:
    """Also where its samples are not kept."""
    clips = Clips(rows, decoded=decode(paths_of(rows), keep=False))
    make_sound(Path(rows[2].path), rows[2].seconds or 0.5, seed=99)
    assert len(clips[1].waveform)
    with pytest.raises(UserError, match=r"2\.flac has changed since the data were checked"):
        clips[2]


def test_the_facts_of_a_file(tmp_path: Path) -> None:
    samples = np.zeros(16000, np.float32)
    samples[:4000:2], samples[1:4000:2] = 0.5, -0.5
    samples[4000:4160:2], samples[4001:4160:2] = 1.0, -1.0
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    fact = decode([str(tmp_path / "a.wav")], keep=False).facts[str(tmp_path / "a.wav")]
    assert (fact.problem, fact.count, fact.seconds, fact.peak, fact.clipped) == ("", 16000, 1.0, 1.0, 0.01)
    assert fact.rms == pytest.approx(np.sqrt((4000 * 0.25 + 160) / 16000))
    none = decode([str(tmp_path / "none.wav")], keep=True)
    assert none.facts[str(tmp_path / "none.wav")].problem == "there is no such file"


def test_samples_are_kept_as_the_nearest_of_16_bits() -> None:
    steps = np.array([0, 0.4, 0.6, -0.4, -0.6, 1000.6, -1000.6, 2**15 - 0.7, 2**15, -2**15], np.float32)
    assert as_int16(steps / 2**15).tolist() == [0, 0, 1, 0, -1, 1001, -1001, 32767, 32767, -32768]


def test_the_fingerprint_changes_when_two_files_are_exchanged(rows: list[Utterance]) -> None:
    paths = paths_of(rows)
    before = decode(paths, keep=False).fingerprint()
    first, second = (Path(path).read_bytes() for path in paths[:2])
    Path(paths[0]).write_bytes(second)
    Path(paths[1]).write_bytes(first)
    assert decode(paths, keep=False).fingerprint() != before


def test_with_processes_it_is_the_same(rows: list[Utterance], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = decode(paths_of(rows), keep=False)
    monkeypatch.setattr(decode_cache, "WORTH_WORKERS", 1)
    several = decode(paths_of(rows), keep=True)
    assert several.facts == alone.facts and several.samples(rows[0].path) is not None


def test_what_is_changed_follows_from_seed_epoch_and_row(rows: list[Utterance]) -> None:
    def heard(item: int, seed: int = 1) -> np.ndarray:
        return Clips(rows, augmentation=LOUD, seed=seed)[item].waveform.numpy()

    assert len({heard(item, seed).tobytes() for item in (0, 5, 10) for seed in (1, 2)}) == 6
    clips = Clips(rows, augmentation=LOUD, seed=1)
    other_order = [clips[item].waveform.numpy() for item in (13, 2, 7)]
    assert all((a == heard(item)).all() for a, item in zip(other_order, (13, 2, 7)))
    assert (clips[13].epoch, clips[13].row, clips[13].text) == (2, 3, "text 3")
    twice = Clips([rows[0], rows[0]], augmentation=LOUD, seed=1)
    assert len({clip.waveform.numpy().tobytes() for clip in twice}) == 2, "one recording, two rows"


def test_nothing_is_changed_unless_asked(rows: list[Utterance]) -> None:
    clips = Clips(rows)
    assert torch.equal(clips[0].waveform, clips[5].waveform) and len(list(clips)) == len(clips) == 5
    with pytest.raises(IndexError):
        clips[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_hears_what_it_would_have_heard(rows: list[Utterance], workers: int) -> None:
    order = LengthOrder(5, 2, 1, 7, lengths=tuple(row.seconds for row in rows), batch_length=1.5)
    clips = Clips(rows, augmentation=LOUD, seed=7)
    whole = list(training_batches(clips, list, order, 0, 9, 0))
    rest = list(training_batches(clips, list, order, 4, 9, workers))
    for a, b in zip(sum(whole[4:], []), sum(rest, []), strict=True):
        assert torch.equal(a.waveform, b.waveform) and a[1:] == b[1:]


def test_a_file_that_vanished_meanwhile_is_reported(rows: list[Utterance]) -> None:
    os.unlink(rows[2].path)
    with pytest.raises(UserError, match=r"2\.flac there is no such file; it was all right when the data were checked"):
        Clips(rows)[2]


def test_a_full_disk_is_reported(rows: list[Utterance], monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stoker.files.write", full)
    with pytest.raises(UserError, match="No space left on device in .*: make room there"):
        decode(paths_of(rows), keep=True)
    assert not list((own_home / "audio").glob("*.bin"))
