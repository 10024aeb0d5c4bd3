"""A talker that has learned a tone for each letter, and what the command says with it."""

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

import made_speech
from in_process import answer
from stoker.daemon import registry
from stoker.daemon.rundir import RunDir
from stoker.inference import speak as script
from stoker.training.train_talker import TalkerStage
from stoker.training.train_vocoder import Vocoder
from toys import WITHOUT_MONITORS, new_run, session

SECONDS = 0.12  # of a letter
TEXTS = ["fade b", "bagg e", "cabe g", "ecfd a", "gdab c", "dfce f"]  # none of them among those of `made_speech.texts`


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speech")


@pytest.fixture(scope="module")
def run(home: Path) -> RunDir:
    """Trained on 400 texts of 5 to 7 letters."""
    return finished(TalkerStage, home, dataset=str(made_speech.write(home, 400)), voices=4, judge="none", d_model=48,
                    num_layers=2, codec_d_model=48, codec_layers=1, latent=8, num_books=2, book_size=32, num_mels=40,
                    dropout=0.0, max_steps=600, lr=1e-2, codec_share=0.65, book_dropout=0.0)


@pytest.fixture(scope="module")
def vocoder(home: Path) -> RunDir:
    return finished(Vocoder, home, dataset=str(made_speech.write(home, 400)), d_model=32, num_layers=2, num_mels=40,
                    max_steps=20, lr=5e-3)


def finished(stage: type, home: Path, **options: object) -> RunDir:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_HOME", str(home / "home"))
        steps = options["max_steps"]
        sitting = session(stage, new_run(home, stage), batch_size=16, grad_accum_steps=1, warmup_steps=15,
                          log_interval=50, eval_interval=steps, snapshot_interval=0, **WITHOUT_MONITORS, **options)
        with sitting.run.lock():
            assert sitting.train().state == "finished"
    return sitting.run


def speak(run: RunDir, *argv: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    how = () if "--vocoder" in argv else ("--vocoder", "griffin-lim")
    return answer("speak.sh", script._main, "--model", str(run.path), *how, *map(str, argv), stdin=stdin)


def heard(samples: np.ndarray, count: int) -> str:
    """The letter whose tone is loudest in each of `count` equal parts."""
    found = ""
    for part in np.array_split(samples, count):
        middle = part[len(part) // 4:-len(part) // 4]
        power = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 16000))
        found += max(f" {made_speech.LETTERS}", key=lambda letter: power[
            round(0.1 * (1 + f" {made_speech.LETTERS}".index(letter)) * 16000 / (2 * np.pi))])
    return found


def likeness(said: np.ndarray, text: str) -> float:
    """The share of the text's letters that are heard in their places."""
    return float(np.mean([one == other for one, other in zip(heard(said, len(text)), text)]))


def test_it_says_texts_that_it_never_heard(run: RunDir, tmp_path: Path) -> None:
    """And each of them, not some text."""
    said = list[np.ndarray]()
    for text in TEXTS:
        ran = speak(run, text, "-o", tmp_path / "a.wav", "--voice", "boris")
        assert ran.returncode == 0, ran.stderr
        samples, rate = soundfile.read(tmp_path / "a.wav")
        assert rate == 16000 and len(samples) / rate == pytest.approx(SECONDS * len(text), rel=0.15)
        assert ran.stdout.decode() == f"{tmp_path / 'a.wav'}: {len(samples) / rate:.2f} s\n"
        assert f"{run.models / 'best'}, step 600; mel " in ran.stderr.decode() and b"Griffin-Lim" in ran.stderr
        said.append(samples)
    own, others = ([likeness(sound, text) for sound, text in zip(said, texts)]
                   for texts in (TEXTS, [*TEXTS[1:], TEXTS[0]]))
    assert np.mean(own) > 0.75 and np.mean(others) < 0.45, (own, others)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
def test_the_format_is_that_of_the_name(run: RunDir, tmp_path: Path, kind: str) -> None:
    assert speak(run, "fade b", "--out", tmp_path / f"a.{kind}").returncode == 0
    assert soundfile.info(tmp_path / f"a.{kind}").format == kind.upper()
    samples, _ = soundfile.read(tmp_path / f"a.{kind}")
    raw = np.frombuffer(speak(run, "fade b").stdout, "<i2") / 32767
    assert heard(samples, 6) == heard(raw, 6) and len(samples) == pytest.approx(len(raw), rel=0.1)


def test_raw_sound_is_that_of_the_file(run: RunDir, vocoder: RunDir, tmp_path: Path) -> None:
    """Also where it is written block by block, by a vocoder that streams."""
    with_vocoder = ["--vocoder", vocoder.path]
    raw = speak(run, "fade b", *with_vocoder)
    assert speak(run, "fade b", *with_vocoder, "-o", tmp_path / "a.wav").returncode == 0
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert len(raw.stdout) == 2 * len(samples) > 0
    assert np.abs(np.frombuffer(raw.stdout, "<i2").astype(int) - samples).max() <= 1


def test_lines_are_said_one_after_another(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("fade b\n\nbag e\n")
    one, other, both, piped = (speak(run, *argv, stdin=b"fade b\nbag e\n").stdout
                               for argv in (["fade b"], ["bag e"], ["--lines", tmp_path / "lines.txt"], ["-"]))
    assert both == piped == one + bytes(2 * 4800) + other


def test_rate_temperature_and_seed(run: RunDir) -> None:
    plain, quick = (len(speak(run, "fade b", *argv).stdout) for argv in ([], ["--rate", "2"]))
    assert quick == pytest.approx(plain / 2, rel=0.15)
    one, same, other = (speak(run, "fade b", "--temperature", "1.5", "--seed", seed).stdout for seed in "112")
    assert one == same != other


@pytest.mark.parametrize("argv, part", [
    ([], "say what? give a text"), (["xyz"], "the talker cannot say x y z in 'xyz'"),
    (["!?"], "there is nothing to say"),
    (["bad", "--voice", "zoe"], "--voice zoe: the talker has boris, carla, david"),
    (["bad", "-o", "a.txt"], "--out a.txt: its name must end in .wav, .flac, .mp3, .ogg"),
    (["bad", "-o", "/nowhere/a.wav"], "there is no folder /nowhere"), (["bad", "--rate", "9"], "--rate must be"),
    (["bad", "--lines", "x"], "give one of these"), (["--lines", "nowhere.txt"], "--lines nowhere.txt: cannot be read"),
    (["bad", "--vocoder", "RUN"], "is of stage talker, not of vocoder")])
def test_a_mistake_is_one_line(run: RunDir, argv: list[str], part: str) -> None:
    ran = speak(run, *[str(run.path) if word == "RUN" else word for word in argv])
    lines = [line for line in ran.stderr.decode().splitlines() if line.startswith("speak.sh")]
    assert (ran.returncode, ran.stdout) == (2, b"") and len(lines) == 1 and part in lines[0], ran.stderr


def test_where_no_vocoder_was_trained_it_says_so(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "runs", list)
    by_itself, asked = (speak(run, "bad", "--vocoder", which).stderr.decode() for which in ("newest", "griffin-lim"))
    assert "vocoder: Griffin-Lim, since no vocoder was trained here" in by_itself
    assert asked.endswith("vocoder: Griffin-Lim\n")


def test_what_cannot_be_written_leaves_no_half_file(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "a.wav").mkdir()
    ran = speak(run, "fade b", "-o", tmp_path / "a.wav")
    assert ran.returncode == 2 and b"cannot be written" in ran.stderr and [*tmp_path.iterdir()] == [tmp_path / "a.wav"]


def test_sound_is_read_back(run: RunDir) -> None:
    """What `heard` hears is not what it hears of silence or of another text."""
    assert heard(made_speech.said("fade b"), 6) == "fade b"
    raw = speak(run, "bag e").stdout
    assert heard(np.frombuffer(raw, "<i2") / 32767, 6) != "fade b" and io.BytesIO(raw).read(2)
