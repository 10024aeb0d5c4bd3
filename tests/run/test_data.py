"""./run/data.sh: what is wrong with data is found, named and told by the exit code."""

import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import made_pictures
from desk import Desk
from in_process import answer
from sounds import make_sound
from stoker.data import __main__ as program


def data(desk: Desk, *argv: str) -> subprocess.CompletedProcess[str]:
    """What the script calls, in this process."""
    ran = answer("data.sh", program._main, *argv, env={"STOKER_HOME": desk.env["STOKER_HOME"]})
    return subprocess.CompletedProcess(argv, ran.returncode, ran.stdout.decode(), ran.stderr.decode())


@pytest.fixture
def recordings(desk: Desk) -> Path:
    for i in range(40):
        make_sound(desk.folder / "speech" / f"{i}.wav", 0.5 + i / 20, seed=i)
    rows = [f"{i}.wav,said in number {i}" for i in range(40)]
    (desk.folder / "speech" / "a.csv").write_text("wav,text\n" + "\n".join(rows) + "\n")
    return desk.folder / "speech"


def test_check_and_mel_lengths(desk: Desk, recordings: Path) -> None:
    ran = data(desk, "check", str(recordings / "a.csv"), "--downsample_time", "2")
    assert ran.returncode == 0, ran.stderr
    first, second, refused, shared, lengths, ctc = ran.stdout.splitlines()
    assert first == "train: 38 of 38 rows, 0.02 h" and second.startswith("validation: 2 of 2 rows")
    assert (refused, shared) == ("refused: none",
                                 "Overlap of training and validation: 0 speakers, 0 texts, 0 recordings")
    (recordings / "3.wav").write_text("no sound")
    ran = desk.call("data.sh", "check", "a.csv", "--max_mel_length", "200", cwd=recordings)
    assert ran.returncode == 1 and f"\t{recordings}/3.wav\tunreadable: cannot be read as sound" in ran.stdout
    assert ran.stdout.count("too long: ") == 9, ran.stdout
    ran = data(desk, "mel_lengths", "--csv", str(recordings / "a.csv"), "--talker")
    assert ran.returncode == 1 and "39 recordings, 0.02 h\nlengths in frames of 1/12.5 s: 50 % 19" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith(f"{recordings}/3.wav cannot be read as sound")


def test_a_download_of_pictures_is_data_again(desk: Desk, tmp_path: Path) -> None:
    for split, first in (("train", 0), ("validation", 5)):
        rows = [{"image": {"bytes": made_pictures.make_picture(tmp_path / "x.png", i).read_bytes(), "path": None},
                 "text": f"{split} {i}"} for i in range(first, first + 5)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    ran = data(desk, "download", "--repository", str(tmp_path), "--out", str(desk.folder / "fetched"), "--max_samples",
               "4")
    assert (ran.returncode, ran.stdout) == (0, f"{desk.folder}/fetched/manifest.csv\n"), ran.stderr
    ran = data(desk, "check", str(desk.folder / "fetched"), "--max_text_length", "11")
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.startswith("train: 4 of 4 rows, 4 different texts\nvalidation: 0 of 4 rows")
    assert ran.stdout.count("long text: 12 characters, --max_text_length is 11") == 4


def test_strings_are_data_again(desk: Desk, recordings: Path) -> None:
    ran = desk.call("data.sh", "strings", str(recordings / "a.csv"), str(desk.folder / "out"), "--count", "5")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{desk.folder}/out/manifest.csv\n" and len(list((desk.folder / "out").glob("*.flac"))) == 5


MISTAKES = [
    (["chekc", "a"], "which of check, mel_lengths, download, strings? 'chekc' is none of them"),
    (["check"], "check takes DATA"),
    (["check", "/nowhere"], "/nowhere: there is no such file or folder"),
    (["check", "/dev/null"], "/dev/null: is a pipe, a socket or a device"),
    (["check", "a", "b"], "check takes DATA, not 2: a b"),
    (["check", "spoken", "--max_mel_lenght", "3"], "there is no flag --max_mel_lenght; did you mean --max_mel_length?"),
    (["download"], "download what? --dataset librispeech-100, "),
    (["download", "--dataset", "librispech-100"], "did you mean librispeech-100?"),
    (["download", "--modality", "audio_tts"], "--modality audio_tts: there is nothing to fetch by name for it"),
    (["check", "mjsynth"], "mjsynth is not on this machine: ./run/data.sh download --dataset mjsynth"),
    (["check", "scenes", "--group_by", "("], "--group_by (: is no regular expression"),
    (["check", "scenes", "--modality", "images"], "--modality: 'images' is none of audio_asr, image, ocr"),
    (["check", "scene"], "scene: there is no such file or folder"),
    (["check", "librispeech-100"], "is not on this machine: ./run/data.sh download --dataset librispeech-100"),
]


@pytest.mark.parametrize("argv, why", MISTAKES)
def test_a_mistake_is_one_line(desk: Desk, argv: list[str], why: str) -> None:
    ran = desk.call("data.sh", *argv)
    assert (ran.returncode, ran.stdout) == (2, "") and ran.stderr.startswith("data.sh: ")
    assert why in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr


def test_without_the_hub_a_download_says_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, argv in {"librispeech-100": ["download", "--modality", "audio_asr"], "mjsynth": ["mjsynth"]}.items():
        ran = desk.call("data.sh", *argv)
        assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", (
            f"data.sh: {name}: the Hugging Face hub (http://127.0.0.1:9) cannot be reached (Connection refused); "
            "connect, and try again\n"))
