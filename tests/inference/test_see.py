"""An encoder that has learned colours, and what the command says of pictures with it."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import made_pictures
from stoker import command, config
from stoker.config import UserError
from stoker.daemon import registry
from stoker.daemon.rundir import PROJECT, RunDir
from stoker.data.pictures.resized import Frame, opened
from stoker.inference import see as script
from stoker.inference import trained
from stoker.inference.see import Viewer
from stoker.training.core import pretrained
from stoker.training.train_vision import Vision
from toys import WITHOUT_MONITORS, new_run, session

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 230), "yellow": (230, 220, 40)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_HOME", str(folder / "home"))
        sitting = session(Vision, new_run(folder, Vision), dataset=str(made_pictures.write(folder / "data", 200)),
                          image_size=16, patch_size=8, d_model=32, num_heads=2, num_layers=1, d_ff=64, text_d_model=16,
                          text_num_heads=2, text_layers=1, embed_dim=16, batch_size=16, grad_accum_steps=1,
                          max_steps=100, lr=5e-3, warmup_steps=10, log_interval=50, eval_interval=100,
                          snapshot_interval=0, template="a {} square", **WITHOUT_MONITORS)
        with sitting.run.lock():
            assert sitting.train().state == "finished"
    return sitting.run


Seen = Callable[..., tuple[int, str, str]]


@pytest.fixture
def see(run: RunDir, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Exit code, standard output, standard error; in this process, which has torch already."""
    def call(*argv: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
        capsysbinary.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        model = () if "--model" in argv else ("--model", str(run.path))
        monkeypatch.setattr(sys, "argv", ["see.sh", *model, *map(str, argv)])
        code = command.answered(script._main)
        out, told = capsysbinary.readouterr()
        return code, out.decode(), told.decode()

    return call


def square(path: Path, colour: str, *, side: int = 40) -> Path:
    """Larger than the pictures of training, and a square elsewhere."""
    canvas = np.full((side, side, 3), 120, np.uint8)
    canvas[side // 5:side // 5 + side // 2, side // 4:side // 4 + side // 2] = COLOURS[colour]
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(canvas).save(path)
    return path


def test_it_says_what_class_and_by_which_model(run: RunDir, tmp_path: Path) -> None:
    """The program itself."""
    path = square(tmp_path / "a.png", "blue")
    ran = subprocess.run([sys.executable, "-P", "-m", "stoker.inference.see", str(path), "--model", str(run.path)],
                         env=os.environ | {"PYTHONPATH": str(PROJECT / "run/python"), "OMP_NUM_THREADS": "1"},
                         text=True, capture_output=True, timeout=120)
    answer, probability = ran.stdout.strip().split("\t")
    assert ran.returncode == 0 and answer == "blue" and 50 < float(probability.strip("%")) <= 100, ran.stderr
    assert f"{run.models / 'best'}, step 100; acc " in ran.stderr
    assert ran.stderr.endswith(" on validation data of pictures.csv\n")


def test_answers_are_probabilities_of_what_is_proposed(see: Seen, tmp_path: Path) -> None:
    """Of two classes, of captions, of all: in their order, the rest left out."""
    path = square(tmp_path / "a.webp", "red")
    found = json.loads(see(path, "--labels", "yellow,red", "--top_k", "5", "--json")[1])
    assert found["file"] == str(path) and [answer["text"] for answer in found["answers"]] == ["red", "yellow"]
    assert sum(answer["probability"] for answer in found["answers"]) == pytest.approx(1, abs=1e-3)
    assert found["answers"][0]["cosine"] > found["answers"][1]["cosine"]
    (tmp_path / "captions.txt").write_text("a green square\n\na red square\na blue square\n")
    lines = see(path, "--captions", tmp_path / "captions.txt", "--top_k", "2")[1].splitlines()
    assert len(lines) == 2 and lines[0].startswith("a red square\t")


def test_the_caption_of_a_class_is_as_in_training_unless_template_is_set(see: Seen, tmp_path: Path) -> None:
    path, labels = square(tmp_path / "a.png", "red"), ("--labels", "red,blue", "--json")
    cosines = [json.loads(see(path, *labels, *more)[1])["answers"][0]["cosine"]
               for more in ((), ("--template", "a {} square"), ("--template", "no {}"))]
    assert cosines[0] == cosines[1] != cosines[2]


def test_folders_and_several_files_are_a_line_each(see: Seen, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time."""
    monkeypatch.setattr(script, "AT_ONCE", 2)
    for name, colour in (("b.jpg", "green"), ("a.png", "yellow"), ("deeper/c.bmp", "red")):
        square(tmp_path / name, colour)
    lines = [line.split("\t")[:2] for line in see(tmp_path)[1].splitlines()]
    assert lines == [[str(tmp_path / name), colour] for name, colour in
                     (("a.png", "yellow"), ("b.jpg", "green"), ("deeper/c.bmp", "red"))]


def test_a_picture_may_come_from_standard_input(see: Seen, tmp_path: Path) -> None:
    assert see("-", stdin=square(tmp_path / "a.png", "green").read_bytes())[1].startswith("green\t")


def test_what_cannot_be_read_is_reported_and_the_rest_is_seen(see: Seen, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("1", (8000, 8000)).save(tmp_path / "huge.png")
    code, out, told = see(tmp_path / "bad.png", tmp_path / "huge.png", square(tmp_path / "good.png", "red"))
    assert code == 1 and out.startswith(f"{tmp_path / 'good.png'}\tred\t") and out.count("\n") == 1
    assert f"{tmp_path / 'huge.png'} has more than 50 million pixels: make it smaller" in told
    assert f"{tmp_path / 'bad.png'} cannot be read as a picture" in told


@pytest.mark.parametrize("argv, part", [
    (["nowhere.png"], "nowhere.png: there is no such file"), ([], "which picture?"),
    (["FILE", "--model", "nothing"], "nothing"), (["FILE", "--lables", "a,b"], "did you mean --labels?"),
    (["FILE", "--labels", "red"], "two or more to choose from, are 1"),
    (["FILE", "--labels", "a,b", "--captions", "c.txt"], "--labels and --captions: give one of them"),
    (["FILE", "--captions", "nowhere.txt"], "--captions nowhere.txt: No such file"),
    (["FILE", "--template", "a {}"], "--template is for --labels"), (["FILE", "--top_k", "0"], "--top_k must be"),
])
def test_a_mistake_is_one_line(see: Seen, tmp_path: Path, argv: list[str], part: str) -> None:
    path = str(square(tmp_path / "a.png", "red"))
    code, out, told = see(*[path if word == "FILE" else word for word in argv])
    assert (code, out, told.count("\n")) == (2, "", 1) and part in told, told


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """A model folder."""
    data = str(made_pictures.write(tmp_path / "data"))
    stage = Vision(replace(Vision.Config(), dataset=data, image_size=16, patch_size=8, d_model=16, num_heads=2,
                           num_layers=1, d_ff=16, text_d_model=16, text_num_heads=2, text_layers=1, embed_dim=8,
                           tokenizer="chars", fit="pad"), tmp_path)
    stage.prepare()
    (tmp_path / "model").mkdir()
    stage.export(stage.model(), tmp_path / "model")
    pretrained.note(tmp_path / "model", "vision", 1, config.to_json(stage.cfg), {})
    return tmp_path / "model"


def test_with_tta_a_picture_and_its_mirror_image_are_seen_alike(see: Seen, untrained: Path, tmp_path: Path) -> None:
    """By a model that has not learned to take them for the same."""
    pixels = made_pictures.pixels(3, 16, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, ::-1]).save(tmp_path / "b.png")
    (plain, other), (both, again) = ([[answer["cosine"] for answer in json.loads(line)["answers"]] for line in see(
        tmp_path / "a.png", tmp_path / "b.png", "--model", untrained, "--labels", "a,b,c", "--json", "--top_k", "3",
        *more)[1].splitlines()] for more in ((), ("--tta",)))
    assert both == again and plain != other and both not in (plain, other)
    notes = [see(tmp_path / "a.png", *more)[2].strip() for more in ((), ("--tta",))]
    assert notes[1] == f"{notes[0]}, evaluated without --tta", "the score is of other views than the answer"


def test_pictures_fit_as_in_training(untrained: Path, tmp_path: Path) -> None:
    viewer = Viewer(pretrained.find(str(untrained)), "cpu", {"a": "a", "b": "b"})
    wide = made_pictures.make_picture(tmp_path / "wide.png", height=10, width=40)
    assert torch.equal(viewer.read(str(wide)), Frame(16, 16, "pad")(opened(str(wide))))


def test_a_caption_that_says_nothing_to_the_model_is_refused(untrained: Path) -> None:
    """It was trained on letters of `a photo of red` and the like."""
    with pytest.raises(UserError, match="'7' has nothing in it that this model can read"):
        Viewer(pretrained.find(str(untrained)), "cpu", {"red": "red", "seven": "7"})


def test_a_model_of_another_kind_is_refused(untrained: Path) -> None:
    assert trained.found(str(untrained), "vision", "sees").stage == "vision"
    with pytest.raises(UserError, match="is of stage vision, not of audio_enc, which hears"):
        trained.found(str(untrained), "audio_enc", "hears")


def test_a_model_without_classes_says_that_it_needs_some(run: RunDir, see: Seen, tmp_path: Path) -> None:
    shutil.copytree(run.models / "best", tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"labels": {}}))
    found = pretrained.find(str(run.models / "best"))
    pretrained.note(tmp_path / "model", found.stage, found.step, found.options, found.scores)
    code, _, told = see(square(tmp_path / "a.png", "red"), "--model", tmp_path / "model")
    assert code == 2 and "what may the pictures show?" in told


def test_without_a_finished_run_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "runs", list)
    with pytest.raises(UserError, match="no finished run of vision"):
        script._main([str(square(tmp_path / "a.png", "red"))])
