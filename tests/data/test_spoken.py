"""The embedded speech: enough different sentences, nothing judged by in training, the same bits from the same seed."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stoker.config import UserError
from stoker.data.speech import audio, espeak, recordings, spoken, timbres
from stoker.data.speech.check import examined
from stoker.data.speech.espeak import Voice
from stoker.data.text import sentences

FEW = {"train": 12, "validation": 3, "test": 2}


def digest(path: Path) -> str:
    return hashlib.sha256(b"".join(audio.read(each).tobytes() for each in sorted(path.glob("*.flac")))).hexdigest()


def test_the_same_seed_is_the_same_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also with processes, and whatever was said before in the same one."""
    first = spoken.build("spoken", sizes=FEW, workers=0)
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    again = spoken.build("spoken", sizes=FEW, workers=2)
    assert first != again and first.read_text() == again.read_text()
    assert digest(first.parent) == digest(again.parent) and len(list(first.parent.glob("*.flac"))) == 17
    assert spoken.build("spoken", sizes=FEW, seed=1, workers=0).read_text() != first.read_text()


def test_it_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = spoken.build("spoken-digits", sizes=FEW, workers=0)
    monkeypatch.setattr(espeak, "say", lambda *args: pytest.fail("was said again"))
    assert spoken.build("spoken-digits", sizes=FEW) == path


def test_what_a_killed_start_left_is_made_anew(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    say = espeak.say

    def killed(text: str, voice: Voice) -> tuple[np.ndarray, int]:
        if len(list(own_home.glob("spoken/half-*/*.flac"))) >= 1:
            raise KeyboardInterrupt
        return say(text, voice)

    monkeypatch.setattr(espeak, "say", killed)
    monkeypatch.setattr(spoken, "AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        spoken.build("spoken", sizes=FEW, workers=0)
    assert [path.name[:5] for path in own_home.glob("spoken/*/")] == ["half-"]
    monkeypatch.setattr(espeak, "say", say)
    path = spoken.build("spoken", sizes=FEW, workers=0)
    assert len(list(path.parent.glob("*.flac"))) == 17 and not list(own_home.glob("spoken/half-*"))


def test_each_sentence_can_be_heard() -> None:
    splits = {"train": [row for _, row in recordings.listed(str(spoken.build("spoken", sizes=FEW, workers=0)))]}
    used, decoded, report = examined(splits, keep=False)
    assert len(used["train"]) == 17 and not report.refused
    assert all(0.5 < row.seconds < 8 for row in used["train"])
    assert all(abs(row.seconds - told.seconds) < 1e-3 for row, told in zip(used["train"], splits["train"]))
    assert len({fact.digest for fact in decoded.facts.values()}) == 17
    assert not report.doubtful


@pytest.mark.parametrize("name", ["spoken", "spoken-digits"])
def test_nothing_of_validation_is_in_training(name: str) -> None:
    lines = spoken.script(name, spoken.SIZES[name])
    assert Counter(line.split for line in lines) == spoken.SIZES[name]
    assert len({recordings.normalised(line.text) for line in lines}) == len(lines), "each sentence once"
    timbres = {split: {line.voice.name.partition("+")[2] for line in lines if line.split == split}
               for split in spoken.SIZES[name]}
    assert all(timbres.values()) and not timbres["train"] & (timbres["validation"] | timbres["test"])
    assert not timbres["validation"] & timbres["test"]
    assert len({line.voice.name for line in lines if line.split == "train"}) > 200
    words = [(line.split, set(recordings.normalised(line.text).split())) for line in lines]
    known = {word for split, found in words if split == "train" for word in found}
    assert known == {word for _, found in words for word in found}


def test_the_grammar_says_ten_thousand_different_sentences_of_three_hundred_words() -> None:
    lines = spoken.script("spoken", spoken.SIZES["spoken"])
    words = {word for line in lines for word in line.text.split()}
    assert len([line for line in lines if line.split == "train"]) == 10_000
    assert words == sentences.vocabulary() and 290 <= len(words) <= 320
    assert all(recordings.normalised(line.text) == line.text for line in lines)
    assert lines[0].text == "can you follow the tables on friday", "what older runs were trained on must not change"


def test_no_two_words_of_the_grammar_sound_alike() -> None:
    sounds: dict[bytes, str] = {}
    for word in sorted(random.Random(0).sample(sorted(sentences.vocabulary()), 100)):
        samples = espeak.say(word).samples
        assert sounds.setdefault(samples.tobytes(), word) == word


def test_strings_of_digits() -> None:
    lines = spoken.script("spoken-digits", spoken.SIZES["spoken-digits"])
    texts = [recordings.normalised(line.text).split() for line in lines]
    assert {len(words) for words in texts} == set(range(1, 8)) and {word for words in texts for word in words} == {
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    pauses = Counter(line.text[len(words[0])] for line, words in zip(lines, texts) if len(words) > 1)
    assert set(pauses) == {" ", ",", "."} and min(pauses.values()) > len(lines) / 4


def test_sentences_of_the_documentation_are_plain() -> None:
    text = ("Return the number of items. This uses `x` and 3 others. See RFC 822 for it.\n\nThe lines\nare joined, if "
            "need be, by a blank. Return the number of items. No. It doesn't matter what comes first.")
    assert list(sentences.of_documentation([text])) == [
        "Return the number of items", "The lines are joined, if need be, by a blank",
        "It doesn't matter what comes first"]


@pytest.mark.parametrize("name", ["en-us", "en-us+caleb", "en+Reed", "en-us+whisper", "en-029+Andy"])
def test_a_voice_says_it_the_same_again(name: str) -> None:
    """Also one that draws noise, and after something else was said."""
    first, rate, _ = espeak.say("the knife is under the bridge", Voice(name, 150))
    espeak.say("something else", Voice("en-us+whisper"))
    again, *_ = espeak.say("the knife is under the bridge", Voice(name, 150))
    assert rate == 22050 and (first == again).all() and np.abs(first).max() > 1000
    assert len(espeak.say("the knife is under the bridge", Voice(name, 250))[0]) < 0.8 * len(first)


def test_every_second_training_sentence_has_a_timbre_of_its_own() -> None:
    lines = spoken.script("spoken", spoken.SIZES["spoken"])
    drawn = [line for line in lines if line.voice.variant]
    assert len(drawn) == 5000 and {line.split for line in drawn} == {"train"}
    assert len({line.voice.name.partition("+")[2] for line in drawn}) == 5000
    assert len({line.voice.variant for line in drawn}) == 5000
    assert sum("klatt" in line.voice.variant for line in drawn) == pytest.approx(1750, abs=150)


def test_espeak_has_each_timbre_that_is_named() -> None:
    """It says nothing of one that it lacks, and speaks in its own voice."""
    own, *_ = espeak.say("now", Voice("en-us"))
    named = [name for names in spoken.TIMBRES.values() for name in names]
    assert len(set(named)) == len(named) == 95
    for name in named:
        samples, *_ = espeak.say("now", Voice(f"en-us+{name}"))
        assert samples.shape != own.shape or (samples != own).any(), name


def test_a_drawn_timbre_is_heard_and_the_same_again() -> None:
    """Each speaks in another voice, whatever was said before."""
    drawn = [Voice("en-us+drawn", variant=timbres.drawn(random.Random(seed))) for seed in range(12)]
    first = [espeak.say("the knife is under the bridge", voice)[0] for voice in drawn]
    again = [espeak.say("the knife is under the bridge", voice)[0] for voice in reversed(drawn)][::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len({samples.tobytes() for samples in first}) == 12
    assert all(1000 < np.abs(samples.astype(int)).max() < 2**15 - 1 for samples in first)


def test_a_longer_vocal_tract_has_lower_formants() -> None:
    """The centre of the spectrum of a vowel moves with the formants that a variant scales."""
    def centre(percent: int) -> float:
        lines = ["language variant", "name drawn", *(f"formant {number} {percent} 100 100" for number in range(9))]
        samples, rate, _ = espeak.say("ah", Voice("en-us+drawn", variant="\n".join([*lines, ""])))
        power = np.abs(np.fft.rfft(samples)) ** 2
        return float((np.fft.rfftfreq(len(samples), 1 / rate) * power).sum() / power.sum())

    assert centre(80) < 0.92 * centre(100) < 0.85 * centre(120)


def melody(voice: Voice) -> tuple[float, float]:
    """Median and spread of the pitch in Hz, by autocorrelation."""
    samples, rate, _ = espeak.say("now we are all here in a row", voice)
    lags, found = slice(rate // 400, rate // 60), []
    for start in range(0, len(samples) - 2048, 512):
        part = samples[start:start + 2048] - samples[start:start + 2048].mean()
        if np.sqrt(np.mean(part**2)) > 1000:
            alike = np.fft.irfft(np.abs(np.fft.rfft(part, 4096)) ** 2)[lags]
            found.append(rate / (lags.start + alike.argmax()))
    return float(np.median(found)), float(np.std(found))


def test_a_voice_is_as_high_and_as_lively_as_asked() -> None:
    low, high, dull, lively = (melody(Voice(rate=150, pitch=pitch, range=range))
                               for pitch, range in ((25, 50), (75, 50), (50, 30), (50, 70)))
    assert high[0] > 1.3 * low[0] and abs(high[1] - low[1]) < 2
    assert lively[1] > 1.5 * dull[1] and lively[0] == pytest.approx(dull[0], rel=0.15)


def test_the_loudest_voice_is_not_clipped() -> None:
    samples, *_ = espeak.say("the knife is under the bridge", Voice("en-us+iven", 150))
    assert np.abs(samples.astype(int)).max() > 20000 and np.mean(np.abs(samples.astype(int)) > 32700) < 1e-4


def test_what_is_said_lasts_as_long_at_16_khz() -> None:
    samples, rate, _ = espeak.say("the knife is under the bridge")
    found = spoken.said("the knife is under the bridge", Voice())
    assert len(found) / 16000 == pytest.approx(len(samples) / rate, abs=1e-4)
    loudness = [np.sqrt(np.mean(np.square(each, dtype=float))) for each in (found, samples)]
    assert loudness[0] == pytest.approx(loudness[1] / 2**15, rel=0.05)


def test_a_voice_that_does_not_exist_is_reported() -> None:
    with pytest.raises(ValueError, match="espeak-ng has no voice 'xx'"):
        espeak.say("hello", Voice("xx"))


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "PACKAGES", ("espeakng_loader_not",))
    with pytest.raises(UserError, match="made with espeakng_loader_not, which is not installed; install it: pip"):
        spoken.build("spoken")


def test_a_full_disk_leaves_nothing_half(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device in .*: make room there"):
        spoken.build("spoken", sizes=FEW, workers=0)
    assert not list(own_home.glob("spoken/*/"))


def test_the_sounds_of_a_text() -> None:
    """As the dictionaries write them: two that sound alike are the same, whatever their spelling."""
    one, other, far, nothing = espeak.ipa(["the knight red", "the night read", "the lamp, was new", ""])
    assert one == "ðə nˈaɪt ɹˈɛd" and other.startswith("ðə nˈaɪt ɹ") and nothing == ""
    assert far.split()[:2] == ["ðə", "lˈæmp"] and len(far.split()) == 4
    with pytest.raises(ValueError, match="espeak-ng has no voice 'xx'"):
        espeak.ipa(["hello"], "xx")


def test_a_voice_for_a_talker_says_all_at_one_rate_and_pitch() -> None:
    sizes = {"train": 30, "validation": 5, "test": 5}
    one, several = (spoken.script(name, sizes) for name in ("spoken-voice", "spoken-voices"))
    assert {line.voice for line in one} == {Voice()} and len({line.text for line in one}) == 40
    assert {line.voice for line in several} == {*spoken.VOICES["spoken-voices"]}
    assert [line.text for line in one] == [line.text for line in several]
