"""A reader that has learned a few lines by heart, and what the command says of pictures with it."""

import io
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import made_lines
from stoker import command
from stoker.daemon.rundir import RunDir
from stoker.inference import read as script
from stoker.training.train_ocr import OCR, Augmentation
from toys import WITHOUT_MONITORS, new_run, session

TEXT = "Milk 2.50"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("lines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_HOME", str(folder / "home"))
        (folder / "data").mkdir()
        for number, text in enumerate(("tea", TEXT, "sugar")):
            made_lines.drawn(text).save(folder / "data" / f"{number}.png")
        (folder / "data" / "lines.csv").write_text(
            f"image,text,split\n0.png,tea,train\n1.png,{TEXT},train\n2.png,sugar,validation\n")
        sitting = session(OCR, new_run(folder, OCR), dataset=str(folder / "data" / "lines.csv"), stem_width=8,
                          d_model=32, num_heads=2, num_layers=1, decoder_layers=1, d_ff=64, batch_size=2,
                          grad_accum_steps=1, max_steps=120, lr=5e-3, warmup_steps=10, log_interval=50,
                          eval_interval=120, snapshot_interval=0, max_width=200, max_text_length=40, **WITHOUT_MONITORS,
                          **dict.fromkeys(vars(Augmentation()), 0.0))
        with sitting.run.lock():
            assert sitting.train().state == "finished"
    return sitting.run


Read = Callable[..., tuple[int, str, str]]


@pytest.fixture
def read(run: RunDir, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Read:
    """Exit code, standard output, standard error; in this process, which has torch already."""
    def call(*argv: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
        capsysbinary.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "argv", ["read.sh", "--model", str(run.path), *map(str, argv)])
        code = command.answered(script._main)
        out, told = capsysbinary.readouterr()
        return code, out.decode(), told.decode()

    return call


@pytest.fixture
def line(tmp_path: Path) -> Path:
    made_lines.drawn(TEXT).save(tmp_path / "line.png")
    return tmp_path / "line.png"


def test_a_line_is_read(read: Read, line: Path, run: RunDir) -> None:
    code, out, told = read(line)
    text, confidence = out.rstrip("\n").split("\t")
    assert code == 0 and text == TEXT and 0 < float(confidence.rstrip("%")) <= 100
    assert str(run.path) in told and "cer " in told and "on validation data of lines.csv" in told


def test_files_folders_and_standard_input(read: Read, line: Path) -> None:
    made_lines.drawn("tea").save(line.parent / "other.jpg")
    _, out, _ = read(line.parent)
    assert [row.split("\t")[:2] for row in out.splitlines()] == [[str(line), TEXT],
                                                                 [str(line.parent / "other.jpg"), "tea"]]
    assert read("-", stdin=line.read_bytes())[1].startswith(TEXT)


def test_confidence_is_the_probability_of_the_text(read: Read, line: Path, run: RunDir) -> None:
    """And of words that of their labels, blanks not counted; against the decoder without a cache, and CTC."""
    from stoker.model.ctc import PrefixScores
    from stoker.training.core import pretrained

    _, out, _ = read(line, "--json")
    found = json.loads(out)
    stage, model = pretrained.opened(pretrained.of_run(run), OCR, "cpu")
    pixels = script.LineReader(pretrained.of_run(run), torch.device("cpu")).open(str(line))
    ids, end = stage.encode(TEXT), stage.tokenizer.end_of_text
    with torch.no_grad():
        seen = model(pixels[None], torch.tensor([pixels.shape[2]]))
        hidden = model.decoder(torch.tensor([[end, *ids]]), model.memory(seen))
        scores = PrefixScores(seen.logits, seen.lengths, blank=end)
        aligned = torch.cat([scores.following(torch.tensor([unit])) for unit in (end, *ids)])
        odds = model.decoder.logits(hidden)[0].log_softmax(-1).exp() * aligned.exp()
        table = (odds.sqrt() / odds.sqrt().sum(1, keepdim=True)).gather(1, torch.tensor([*ids, end])[:, None])[:, 0]
    assert found["file"] == str(line) and found["text"] == TEXT
    assert found["confidence"] == pytest.approx(float(table.prod()), abs=2e-4)
    assert [each["word"] for each in found["words"]] == TEXT.split()
    assert found["words"][0]["confidence"] == pytest.approx(float(table[:4].prod()), abs=2e-4)


def test_a_beam_is_at_least_as_sure(read: Read, line: Path) -> None:
    one, many = (json.loads(read(line, "--json", "--beam", width)[1]) for width in ("1", "6"))
    assert many["confidence"] >= one["confidence"] - 1e-4 and many["text"] == TEXT


def test_more_than_a_line_is_reported(read: Read, tmp_path: Path) -> None:
    made_lines.drawn("tea\nMilk").save(tmp_path / "two.png")
    code, out, told = read(tmp_path / "two.png")
    assert code == 0 and len(out.splitlines()) == 1
    assert "two.png seems to have 2 lines of text and is read as if it had one: cut it into lines" in told


@pytest.mark.parametrize("text", ["i", "=", "i;j: fine!", "Milk 2.50", "g", "-", '"quoted"', "Ünder Älter"])
def test_one_line_is_one_line(text: str) -> None:
    assert script.text_lines(np.asarray(made_lines.drawn(text))) == 1
    assert script.text_lines(255 - np.asarray(made_lines.drawn(text))) == 1
    assert script.text_lines(np.full((32, 40), 7, np.uint8)) == 1


def test_what_is_wider_than_trained_on_is_reported(read: Read, tmp_path: Path) -> None:
    made_lines.drawn("Milk " * 12).save(tmp_path / "wide.png")
    assert "the model was trained on up to 200: cut it into shorter lines" in read(tmp_path / "wide.png")[2]


def test_what_cannot_be_read_is_reported_and_the_rest_read(read: Read, line: Path) -> None:
    os.mkfifo(line.parent / "pipe.png")
    (line.parent / "folder.png").mkdir()
    Image.linear_gradient("L").resize((9000, 32)).save(line.parent / "wide.png")
    (line.parent / "broken.png").write_bytes(line.read_bytes()[:60])
    Image.new("L", (40, 20), 9).save(line.parent / "blank.png")
    Image.linear_gradient("L").resize((1, 200)).save(line.parent / "thin.png")
    code, out, told = read(line.parent)
    assert code == 1 and "broken.png cannot be read as a picture" in told
    assert "wide.png is 9,000 pixels wide at a height of 32, up to 3,200 can be read: cut it into lines" in told
    assert "pipe.png cannot be read (it is a pipe" in told and "folder.png" not in told
    assert "blank.png is blank: nothing is written there" in told
    assert [Path(row.split("\t")[0]).name for row in out.splitlines()] == ["line.png", "thin.png"]


def test_many_pictures_of_all_widths_come_in_their_order(read: Read, tmp_path: Path) -> None:
    texts = [("tea", TEXT, "Milk tea sugar bread")[number % 3] for number in range(35)]
    for number, text in enumerate(texts):
        made_lines.drawn(text).save(tmp_path / f"{number:02}.png")
    rows = [row.split("\t") for row in read(tmp_path)[1].splitlines()]
    assert [Path(row[0]).stem for row in rows] == [f"{number:02}" for number in range(35)]
    assert all(row[1] == text for row, text in zip(rows, texts) if text in ("tea", TEXT))


def test_lines_are_read_with_others_of_like_width() -> None:
    draw = random.Random(0)
    widths = [draw.randint(1, 900) for _ in range(200)]
    groups = list(script._alike(widths))
    assert sorted(row for group in groups for row in group) == list(range(200)) and 5 < len(groups) < 40
    for group in groups:
        assert max(widths[row] for row in group) <= 1.25 * min(widths[row] for row in group)
    assert [len(group) for group in script._alike([16_000] * 5)] == [2, 2, 1], "what they take is bounded"


def test_the_beam_and_the_limits_of_training_are_those_of_reading(read: Read, line: Path, run: RunDir,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()
    written = OCR.written
    monkeypatch.setattr(OCR, "written", lambda self, model, seen, beam: (
        asked.append((beam, self.cfg.max_text_length)) or written(self, model, seen, beam)))
    read(line)
    read(line, "--beam", "7")
    assert asked == [(1, 40), (7, 40)]


@pytest.mark.parametrize("argv, told", [
    ([], "which picture?"), (["nowhere.png"], "nowhere.png: there is no such file"),
    (["/dev/null"], "/dev/null is a pipe, a socket or a device, not a file; give -"), (["--beem", "2"], "--beam"),
    (["--beam", "0", "x"], "--beam")])
def test_mistakes_are_one_line(read: Read, argv: list[str], told: str) -> None:
    code, out, err = read(*argv)
    assert code == 2 and not out and told in err and len(err.splitlines()) == 1
