"""A recogniser that has learned tones for letters, and what the command writes down with it."""

import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import language_models
import made_speech
from in_process import answer
from stoker.config import UserError
from stoker.daemon import registry
from stoker.daemon.rundir import RunDir
from stoker.data.speech import audio
from stoker.data.text.labels import open_labels
from stoker.data.text.spelling import spelled
from stoker.inference import transcribe as script
from stoker.inference.transcribe import Listener
from stoker.model.fusion import Fusion
from stoker.training.core import language
from stoker.training.train_audio_enc import AudioEncoder
from toys import WITHOUT_MONITORS, new_run, session


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Trained on three speakers, to hear texts of a fourth that were never said."""
    folder = tmp_path_factory.mktemp("speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_HOME", str(folder / "home"))
        sitting = session(AudioEncoder, new_run(folder, AudioEncoder), dataset=str(made_speech.write(folder, 200)),
                          d_model=32, num_heads=2, num_layers=2, d_ff=64, dropout=0.0, num_mels=40, head_frames=1,
                          mask_bands=6, batch_size=16, grad_accum_steps=1, max_steps=150, lr=5e-3, warmup_steps=15,
                          log_interval=50, eval_interval=150, snapshot_interval=0, held_out="david", **WITHOUT_MONITORS)
        with sitting.run.lock():
            assert sitting.train().state == "finished"
    return sitting.run


def transcribe(run: RunDir, *argv: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    model = () if "--model" in argv else ("--model", str(run.path))
    return answer("transcribe.sh", script._main, *model, *map(str, argv), stdin=stdin)


def recording(path: Path, text: str) -> Path:
    audio.write(path, made_speech.said(text))
    return path


def test_it_writes_down_what_was_said_and_says_by_which_model(run: RunDir, tmp_path: Path) -> None:
    """The text was in no training row."""
    ran = transcribe(run, recording(tmp_path / "a.flac", "fade bag"))
    assert (ran.returncode, ran.stdout) == (0, b"fade bag\n"), ran.stderr
    told = ran.stderr.decode()
    assert f"{run.models / 'best'}, step 150; wer " in told and told.endswith(" on validation data of speech.csv\n")
    rates = {name: float(rate.strip(",%")) for name, rate in zip(told.split()[3::2], told.split()[4::2]) if "%" in rate}
    assert rates.keys() == {"wer", "cer"} and max(rates.values()) < 10


@pytest.mark.parametrize("how", [[], ["--beam", "8"]])
def test_times_are_those_of_the_sounds(run: RunDir, tmp_path: Path, how: list[str]) -> None:
    ran = transcribe(run, recording(tmp_path / "a.flac", "abcd eg"), "--json", *how)
    found = json.loads(ran.stdout)
    assert (found["file"], found["text"], found["seconds"]) == (str(tmp_path / "a.flac"), "abcd eg", 0.84)
    first, second = found["words"]
    assert [first["word"], second["word"]] == ["abcd", "eg"]
    assert first["start"] <= 0.12 and 0.32 <= first["end"] <= 0.6 <= second["start"] + 0.12 and second["end"] <= 0.84
    assert all(0.5 < each["confidence"] <= 1 for each in (found, first, second))


@pytest.fixture
def listener() -> Any:
    """Without a model: what is likely in each frame, 25 of them a second, is written down."""
    made = Listener.__new__(Listener)
    made.tokenizer, made.device = open_labels("chars", 0, ["ab cd"]), "cpu"
    return made


def heard(listener: Any, frames: list[tuple[str, float]], **options: Any) -> dict[str, Any]:
    """Frames: a character, "-" for the blank, and its probability; the rest of that is the blank's, or another's."""
    V, blank = listener.tokenizer.vocab_size, listener.tokenizer.end_of_text
    ids = [blank if unit == "-" else listener.tokenizer.encode_batch([unit])[0].tolist()[0] for unit, _ in frames]
    probabilities = torch.full((len(frames), V), 1e-6)
    for t, (unit, (_, likely)) in enumerate(zip(ids, frames)):
        probabilities[t, 0 if unit == blank else blank], probabilities[t, unit] = 1 - likely, likely
    asked: list[dict[str, float]] = []

    def log_probs(waveform: torch.Tensor, **how: float) -> torch.Tensor:
        asked.append(how)
        return probabilities.log()

    listener.model = SimpleNamespace(rate=25, log_probs=log_probs)
    found: dict[str, Any] = listener.hear(np.zeros(16000, np.float32), replace(script.Config(), **options))
    assert asked == [{"window_seconds": options.get("window_seconds", 10.0),
                      "overlap_seconds": options.get("overlap_seconds", 2.0)}]
    return found


@pytest.mark.parametrize("beam", [1, 4])
def test_times_and_confidences_are_those_of_the_frames(listener: Any, beam: int) -> None:
    """By hand: 40 ms to a frame, from the first of a word to the end of its last."""
    frames = [("-", 0.99), ("a", 0.9), ("a", 0.8), ("-", 0.99), ("b", 0.95), (" ", 0.9), ("-", 0.99), ("c", 0.75),
              ("d", 0.99), ("d", 0.97), ("-", 0.99)]
    assert heard(listener, frames, beam=beam, window_seconds=7.0, overlap_seconds=3.0) == {
        "seconds": 1.0, "text": "ab cd", "confidence": pytest.approx((0.85 + 0.95 + 0.9 + 0.75 + 0.98) / 5, abs=1e-4),
        "words": [{"word": "ab", "start": 0.04, "end": 0.2, "confidence": pytest.approx(0.9, abs=1e-4)},
                  {"word": "cd", "start": 0.28, "end": 0.4, "confidence": pytest.approx(0.865, abs=1e-4)}]}


def test_a_beam_finds_what_is_likelier_in_all_than_in_any_one_way(listener: Any) -> None:
    """Nothing in two frames: 0.6 * 0.6; an "a" somewhere in them: 1 - 0.36."""
    frames = [("b", 0.99), ("a", 0.4), ("a", 0.4)]
    assert heard(listener, frames)["text"] == "b" and heard(listener, frames, beam=4)["text"] == "ba"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that has read a few texts again and again."""
    return language_models.write(tmp_path_factory.mktemp("lm") / "model", ["ab cd", "ab dd"] * 10)


def test_a_language_model_decides_what_sounds_alike(listener: Any, lm: Path) -> None:
    """By how much it counts: "ad cd" is a little likelier by the sound, "ab cd" by far by the texts."""
    frames = [("a", 0.9), ("d", 0.5), (" ", 0.9), ("c", 0.9), ("d", 0.9)]
    tokenizer, model = language.opened(language.found(str(lm)), "cpu")
    own = listener.tokenizer
    listener.fusion = Fusion(spelled(own), own.end_of_text, model, spelled(tokenizer), tokenizer.end_of_text)
    odds = heard_with_b(listener, frames)
    assert odds(lm_weight=0.0, lm_bonus=0.0) == "ad cd" and odds(lm_weight=0.5) == "ab cd" == odds()


def heard_with_b(listener: Any, frames: list[tuple[str, float]]) -> Any:
    """As `heard`; what is left of the second frame is not the blank's but that of a "b"."""
    def text(**options: Any) -> str:
        own, b = listener.tokenizer, listener.tokenizer.encode_batch(["b"])[0].tolist()[0]
        ids = [own.encode_batch([letter])[0].tolist()[0] for letter, _ in frames]
        probabilities = torch.full((len(frames), own.vocab_size), 1e-6)
        for frame, label, (_, likely) in zip(probabilities, ids, frames):
            frame[own.end_of_text], frame[label] = 1 - likely, likely
        probabilities[1, own.end_of_text], probabilities[1, b] = 0.1, 0.4
        listener.model = SimpleNamespace(rate=25, log_probs=lambda waveform, **how: probabilities.log())
        return str(listener.hear(np.zeros(16000, np.float32), replace(script.Config(lm="it"), **options))["text"])

    return text


def test_the_command_searches_with_a_language_model(run: RunDir, lm: Path, tmp_path: Path) -> None:
    """Which one, and how much it counts, is printed; where it counts nothing, the text is that of the beam alone."""
    path = recording(tmp_path / "a.flac", "fade bag")
    alone = transcribe(run, path, "--json", "--beam", "16")
    nothing = transcribe(run, path, "--json", "--lm", lm, "--lm_weight", "0", "--lm_bonus", "0")
    assert nothing.returncode == 0 and nothing.stdout == alone.stdout
    assert nothing.stderr.decode().splitlines()[1] == (
        f"with the language model {lm}, step 60; --lm_weight 0 --lm_bonus 0 --beam 16")
    much = transcribe(run, path, "--lm", lm, "--lm_weight", "20", "--beam", "200")
    assert much.stdout != b"fade bag\n" and much.returncode == 0


def test_a_long_recording_is_heard_in_windows(run: RunDir, tmp_path: Path) -> None:
    words = " ".join(made_speech.texts(12, seed=9))
    path = recording(tmp_path / "long.flac", words)
    ran = transcribe(run, path, "--json", "--window_seconds", "2", "--overlap_seconds", "1")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    heard, said = found["text"].split(), words.split()
    assert len(heard) == len(said) and sum(a != b for a, b in zip(heard, said)) <= len(said) / 10
    starts = [word["start"] for word in found["words"]]
    assert starts == sorted(starts) and found["seconds"] - 1 < found["words"][-1]["end"] <= found["seconds"]


def test_a_recording_is_cut_at_its_pauses(run: RunDir, tmp_path: Path) -> None:
    """Each text is heard as if it were alone, and stands where it was said."""
    texts, parts, places = made_speech.texts(5, seed=3), list[np.ndarray](), list[float]()
    for text in texts:
        places.append(sum(map(len, parts)) / audio.RATE)
        parts += [made_speech.said(text), np.zeros(8000)]
    noise = 1e-5 * np.random.default_rng(0).standard_normal(sum(map(len, parts)))
    audio.write(tmp_path / "long.flac", np.concatenate(parts) + noise)
    ran = transcribe(run, tmp_path / "long.flac", "--json", "--window_seconds", "2", "--overlap_seconds", "1")
    found = json.loads(ran.stdout)
    words = found["words"]
    assert " ".join(word["word"] for word in words) == found["text"] and found["notes"] == []
    assert all(a["end"] <= b["start"] for a, b in zip(words, words[1:])) and 0.5 < found["confidence"] <= 1
    for text, at in zip(texts, places):
        end = at + len(text) * 0.12
        heard = [word for word in words if at - 0.3 < (word["start"] + word["end"]) / 2 < end + 0.3]
        assert text in " ".join(word["word"] for word in heard)


def test_an_offset_changes_nothing(run: RunDir, tmp_path: Path) -> None:
    samples = made_speech.said("fade bag")
    answers = []
    for offset in (0.0, 0.5):
        soundfile.write(tmp_path / "a.wav", samples + offset, audio.RATE, subtype="FLOAT")
        answers.append(json.loads(transcribe(run, tmp_path / "a.wav", "--json").stdout))
    assert answers[0] == answers[1] and answers[0]["text"] == "fade bag"


@pytest.mark.parametrize("rate", [4000, 8000, 44100, 192_000, 384_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_any_channels(run: RunDir, tmp_path: Path, rate: int, channels: int) -> None:
    samples = audio.resampled(made_speech.said("cab a").astype(np.float32), audio.RATE, rate)
    soundfile.write(tmp_path / "a.wav", np.stack([samples] * channels, 1), rate)
    assert transcribe(run, tmp_path / "a.wav").stdout == b"cab a\n"


@pytest.mark.parametrize("samples, rest", [
    (np.zeros(16000), "is silent: no sample is above -60 dB of full scale; no text"),
    (np.full(16000, 0.4), "is silent: no sample is above -60 dB of full scale; no text"),
    (0.3 * np.sin(np.arange(100) * 0.3), "is too short for a word: 0.01 s; no text"),
    (np.zeros(0), "holds no samples; no text"),
    (made_speech.said(" ") * 0.1, "has no speech that the model recognizes; no text")])
def test_why_there_is_no_text_is_a_line(run: RunDir, tmp_path: Path, samples: np.ndarray, rest: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, samples.astype(np.float32), audio.RATE, subtype="FLOAT")
    ran = transcribe(run, path)
    assert (ran.returncode, ran.stdout) == (0, b"\n") and f"\n{path} {rest}\n" in ran.stderr.decode()
    found = json.loads(transcribe(run, path, "--json").stdout)
    assert (found["text"], found["words"], found["notes"]) == ("", [], [rest])
    assert transcribe(run, path, "--srt").stdout == b"" and transcribe(run, path, "--vtt").stdout == b"WEBVTT\n\n"


@pytest.mark.parametrize("options, is_noted", [
    ({"dataset": "spoken"}, True), ({"dataset": "spoken", "extra_dataset": "spoken-digits", "init_from": ""}, True),
    ({"dataset": "spoken", "extra_dataset": "people.csv"}, False), ({"dataset": "spoken", "init_from": "run"}, False),
    ({"dataset": "people.csv"}, False)])
def test_a_model_that_heard_no_people_says_so(options: dict[str, str], is_noted: bool) -> None:
    assert script._heard_no_people(options) == is_noted


def test_what_is_odd_about_a_recording_is_noted(run: RunDir, tmp_path: Path) -> None:
    said = made_speech.said("fade bag")
    soundfile.write(tmp_path / "clipped.wav", np.clip(20 * said, -1, 1), audio.RATE)
    soundfile.write(tmp_path / "phases.wav", np.stack([0.8 * said, -said], 1), audio.RATE)
    ran = transcribe(run, tmp_path, "--json")
    clipped, phases = [json.loads(line) for line in ran.stdout.splitlines()]
    share = (np.abs(20 * said) >= 0.999).mean()
    assert clipped["notes"] == [f"is clipped: {share:.1%} of its samples are at full scale"]
    assert phases["notes"] == ["has channels that cancel each other out: only channel 2 of 2, the loudest, is heard"]
    assert phases["text"] == "fade bag" and ran.stderr.decode().count("\n") == 3


def sparse_wave(path: Path, hours: float, rate: int, sounds: dict[float, np.ndarray]) -> None:
    """16 bits, 0 where there is no sound: a file with holes, which takes no room."""
    size = round(hours * 3600 * rate) * 2
    with open(path, "wb") as file:
        file.write(b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate,
                                                                                   2 * rate, 2, 16))
        file.write(b"data" + struct.pack("<I", size))
        file.truncate(44 + size)
        for seconds, samples in sounds.items():
            os.pwrite(file.fileno(), (samples * 2**15).astype("<i2").tobytes(), 44 + 2 * round(seconds * rate))


def test_three_hours_need_no_more_memory_than_a_minute(listener: Any, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sound is in a piece of its own, at its time; 691 MB would be all samples at 16 kHz."""
    sound = 0.3 * np.sin(np.arange(2 * 2000) * 0.9)
    places = [0.0, 1800.0, 1803.0, 5400.0, 10797.9]
    sparse_wave(tmp_path / "a.wav", 3, 2000, dict.fromkeys(places, sound))

    def hear(samples: np.ndarray, cfg: script.Config) -> dict[str, Any]:
        loud = np.flatnonzero(np.abs(samples) > 0.1) / audio.RATE
        return {"text": "beep", "confidence": 0.5,
                "words": [{"word": "beep", "start": loud[0], "end": loud[-1], "confidence": 0.5}]}

    monkeypatch.setattr(listener, "hear", hear)
    tracemalloc.start()
    try:
        found = listener.transcribe(str(tmp_path / "a.wav"), script.Config())
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()
    assert (found["seconds"], found["text"], found["confidence"]) == (10800, " ".join(["beep"] * 5), 0.5)
    assert [word["start"] for word in found["words"]] == pytest.approx(places, abs=0.01)
    assert [word["end"] - word["start"] for word in found["words"]] == pytest.approx([2] * 5, abs=0.01)


def test_subtitles_of_one_file_are_printed_and_of_several_written_beside(run: RunDir, tmp_path: Path) -> None:
    paths = [recording(tmp_path / f"{name}.flac", text) for name, text in (("a", "fade bag"), ("b", "cab a"))]
    alone = transcribe(run, paths[0], "--srt")
    lines = alone.stdout.decode().split("\n")
    assert (lines[0], lines[2:]) == ("1", ["fade bag", "", ""]) and " --> " in lines[1]
    both = transcribe(run, *paths, "--srt")
    assert both.stdout.decode().splitlines() == [f"{path}\t{path.with_suffix('.srt')}" for path in paths]
    assert (tmp_path / "a.srt").read_bytes() == alone.stdout
    assert "cab a" in (tmp_path / "b.srt").read_text()
    (tmp_path / "a.srt").write_text("corrected by hand")
    again = transcribe(run, *paths, "--srt")
    assert (again.returncode, again.stdout) == (2, b"")
    assert again.stderr.endswith(b"a.srt and 1 more exist already: move them away\n")
    assert (tmp_path / "a.srt").read_text() == "corrected by hand"
    assert transcribe(run, *paths, "--vtt").returncode == 0 and (tmp_path / "b.vtt").read_text().startswith("WEBVTT\n")


def test_folders_and_several_files_are_a_line_each(run: RunDir, tmp_path: Path) -> None:
    for name, text in (("b\nb", "abc d"), ("a", "gfe d"), ("deeper/c", "bad e")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        recording(tmp_path / f"{name}.flac", text)
    ran = transcribe(run, tmp_path)
    lines = [line.split("\t") for line in ran.stdout.decode().splitlines()]
    assert lines == [[str(tmp_path / name), text] for name, text in
                     (("a.flac", "gfe d"), ("b\\nb.flac", "abc d"), ("deeper/c.flac", "bad e"))]


def test_sound_may_come_from_standard_input(run: RunDir, tmp_path: Path) -> None:
    ran = transcribe(run, "-", stdin=recording(tmp_path / "a.flac", "cab a").read_bytes())
    assert ran.stdout == b"cab a\n"


def test_a_moment_of_sound_is_nothing_said(run: RunDir, tmp_path: Path) -> None:
    audio.write(tmp_path / "short.flac", made_speech.said("a")[:100])
    ran = transcribe(run, tmp_path / "short.flac", "--json", "--beam", "4")
    assert json.loads(ran.stdout)["text"] == "" and json.loads(ran.stdout)["words"] == []


def test_what_cannot_be_read_is_reported_and_the_rest_is_heard(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_text("no sound")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    recording(tmp_path / "good.flac", "abc d")
    ran = transcribe(run, tmp_path)
    assert ran.returncode == 1 and ran.stdout.decode() == f"{tmp_path / 'good.flac'}\tabc d\n"
    assert f"{tmp_path / 'bad.wav'} cannot be read as sound" in ran.stderr.decode()
    assert f"{tmp_path / 'zero.wav'} cannot be read (it is a pipe, a socket or a device" in ran.stderr.decode()


def test_standard_input_may_go_on_for_so_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = recording(tmp_path / "a.flac", "abc d").read_bytes()
    for most, longest, why in ((len(content) - 1, 9.0, "has more than"), (len(content), 0.1, "is longer than")):
        monkeypatch.setattr(script, "BYTES", most)
        monkeypatch.setattr(script, "LONGEST", longest)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(audio.AudioError, match=why):
            with script._file("-") as name:
                audio.survey(name, longest=script.LONGEST)


@pytest.mark.parametrize("argv, part", [
    (["nowhere.wav"], "nowhere.wav: there is no such file"), ([], "which sound?"),
    (["FILE", "--model", "nothing"], "nothing"),
    (["FILE", "--beem", "2"], "did you mean --beam?"), (["FILE", "--beam", "0"], "--beam must be"),
    (["-", "-"], "- is given twice"), (["speech.csv"], "speech.csv is a table, not a recording: "),
    (["FILE", "--window_seconds", "inf"], "--window_seconds must be at least 1 and at most 600, is inf"),
    (["FILE", "--overlap_seconds", "10"], "must be less than --window_seconds"),
    (["FILE", "--json", "--srt"], "--json and --srt exclude one another: choose one"),
    (["FILE", "--srt", "--vtt"], "--srt and --vtt exclude one another: choose one"),
    (["FILE", "--cut", "silence"], "'silence' is none of pauses, silero, windows"),
    (["FILE", "--cut", "silero"], "the package silero-vad is not installed; install it, or leave --cut out: "),
    (["FILE", "-", "--srt"], "standard input does not have: give - alone"),
    (["FILE", "FILE", "--vtt"], "a.vtt would have the subtitles of several recordings: name them in two calls"),
    (["FILE", "--lm", "nothing"], "nothing"), (["FILE", "--lm", "RUN"], "is of stage audio_enc, not a language model"),
    (["FILE", "--lm_weight", "1"], "--lm_weight 1 is for --lm"), (["FILE", "--lm_bonus", "1"], "is for --lm"),
    (["FILE", "--lm", "RUN", "--beam", "-3"], "--beam must be"),
])
def test_a_mistake_is_one_line(run: RunDir, tmp_path: Path, argv: list[str], part: str) -> None:
    path = str(recording(tmp_path / "a.flac", "abc d"))
    names = {"FILE": path, "RUN": str(run.path)}
    ran = transcribe(run, *[names.get(word, word) for word in argv])
    told = ran.stderr.decode()
    assert (ran.returncode, ran.stdout, told.count("\n")) == (2, b"", 1) and part in told, told


def test_without_a_finished_run_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "runs", list)
    with pytest.raises(UserError, match="no finished run of audio_enc"):
        script._main([str(recording(tmp_path / "a.flac", "abc d"))])


def test_a_model_that_is_damaged_is_an_error(run: RunDir, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run.models / "best", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = transcribe(run, recording(tmp_path / "a.flac", "abc d"), "--model", tmp_path / "model")
    assert ran.returncode == 2 and ran.stdout == b"" and b"not as it was written: model.safetensors has" in ran.stderr
