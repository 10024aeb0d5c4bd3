"""What ./run/data.sh runs, in this process: which data are taken for pictures, and what is told of them."""

import os
from pathlib import Path

import pytest

import made_pictures
from sounds import make_sound
from stoker.data import __main__ as commands
from stoker.data.check import Report


def ran(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = commands._main(argv)
    return code, capsys.readouterr().out


def test_check_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                           monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(made_pictures.write(tmp_path))
    code, told = ran(capsys, "check", name)
    train, validation, refused, shared, heights, _, labels = told.splitlines()
    assert code == 0 and train.startswith("train: 38 of 38 rows, 4 different texts, 4 labels, the largest ")
    assert validation.startswith("validation: 2 of 2 rows, ") and refused == "refused: none"
    assert shared == "Overlap of training and validation: 0 groups, 1 texts, 0 pictures"
    assert heights == "heights in pixels: smallest 16, 50 % 16, 90 % 16, 99 % 16, largest 16"
    assert labels == "labels: red 10, green 10, blue 10, yellow 10"
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    (tmp_path / "4.png").write_bytes((tmp_path / "5.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    code, told = ran(capsys, "check", "pictures.csv", "--min_side", "17")
    assert code == 1 and told.count("too small: 16 x 16 pixels, the shorter side must have 17") == 39
    assert f"\t{tmp_path}/3.png\tunreadable: cannot be read as a picture (" in told
    code, told = ran(capsys, "check", name, "--group_by", r"(\d)\d*\.png$", "--held_out", "7,8")
    assert "validation: 2 of 2 rows, 2 groups" in told and "files with the same picture as another: 1" in told


def test_names_in_another_encoding_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_pictures.write(tmp_path)
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    (tmp_path / "0.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/0.png"))
    (tmp_path / "pictures.csv").unlink()
    code, told = ran(capsys, "check", str(tmp_path))
    assert code == 1 and told.isascii() and "caf\\udce9/0.png\tnot Unicode: its text or label" in told


def test_which_data_are_pictures(tmp_path: Path) -> None:
    made_pictures.write(tmp_path / "pictures")
    make_sound(tmp_path / "sounds" / "a.wav")
    (tmp_path / "sounds" / "a.csv").write_text("audio_path,transcription\na.wav,so\n")
    (tmp_path / "sounds" / "b.csv").write_text("a.wav,so\n")
    (tmp_path / "lines.csv").write_text("pictures/1.png,so\n")
    (tmp_path / "annotations.json").write_text('{"images": [{"file_name": "1.JPG", "caption": "so"}]}')
    for name in ("pictures", "pictures/pictures.csv", "lines.csv", "annotations.json"):
        assert commands._of_pictures(str(tmp_path / name)), name
    for name in ("sounds", "sounds/a.csv", "sounds/b.csv", "nowhere"):
        assert not commands._of_pictures(str(tmp_path / name)), name
    for name in ("scenes", "digits", "lines", "mjsynth", "a.tar.gz"):
        assert commands._of_pictures(name), name
    assert not commands._of_pictures("spoken") and not commands._of_pictures("librispeech-100")


def test_lines_have_a_limit_and_descriptions_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_pictures.write(tmp_path)
    (tmp_path / "lines.csv").write_text("".join(f"{i}.png,{'word ' * (i + 31)}\n" for i in range(40)))
    assert ran(capsys, "check", str(tmp_path / "lines.csv"))[0] == 0
    code, told = ran(capsys, "check", str(tmp_path / "lines.csv"), "--modality", "ocr")
    assert code == 1 and told.count("--max_text_length is 256") == 19
    assert "CTC is asked to put a character in 4 columns of pixels (--image_height 32)" in told
    assert told.count("not alignable: 8 columns") >= 19
    code, told = ran(capsys, "check", str(tmp_path / "lines.csv"), "--modality", "ocr", "--max_width", "31")
    assert told.count("too wide: 32 pixels at a height of 32, --max_width is 31") == 40


def test_names_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of pictures and of recordings that are refused."""
    name = "evil\x1b[2J"
    made_pictures.write(tmp_path / "pictures")
    (tmp_path / "pictures" / "3.png").write_text("no picture")
    (tmp_path / "pictures" / "3.png").rename(tmp_path / "pictures" / f"{name}.png")
    table = tmp_path / "pictures" / "pictures.csv"
    table.write_text(table.read_text().replace("3.png", f'"{name}.png"', 1))
    sounds = tmp_path / "sounds"
    for speaker in "ab":
        make_sound(sounds / f"{speaker}.wav")
    (sounds / f"{name}.wav").write_text("no sound")
    (sounds / "a.csv").write_text(f'audio_path,transcription\na.wav,so\nb.wav,la\n"{name}.wav",si\n')
    for data in (table, sounds / "a.csv"):
        code, told = ran(capsys, "check", str(data))
        assert code == 1 and "evil\\x1b[2J" in told and told.replace("\n", "").replace("\t", "").isprintable()
    commands._listed(Report(rows={}, used={}, shared={}, refused=[("train", "a\nvalidation\tb", "why")]))
    assert capsys.readouterr().out == "train\ta\\nvalidation\tb\twhy\n"
