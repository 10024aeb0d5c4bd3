"""An evaluation with a language model: its weight, on which recordings it is tuned, and what is reported."""

import logging
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch

import language_models
import made_speech
from stoker import config
from stoker.config import UserError
from stoker.data.speech import recordings
from stoker.data.text.spelling import spelled
from stoker.model.fusion import Fusion, Hypothesis, Weights
from stoker.training.assembly import eval_only, launch
from stoker.training.core import language, pretrained
from stoker.training.stages import fusion
from stoker.training.train_audio_enc import AudioEncoder, Config

SMALL: dict[str, Any] = dict(d_model=32, num_heads=2, num_layers=1, d_ff=64, dropout=0.0, num_mels=40, batch_size=8,
                             head_frames=1, precision="fp32", num_workers=0, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recognizer that was not trained, in `model`; its data in speech.csv, others in `other`; a language model."""
    home = tmp_path_factory.mktemp("fusion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_HOME", str(home / "home"))
        cfg = replace(Config(), **SMALL, dataset=str(made_speech.write(home / "own")), held_out="anna,boris")
        stage = AudioEncoder(cfg, home)
        stage.prepare()
        torch.manual_seed(0)
        model = stage.model()
        torch.nn.init.normal_(model.head.weight, std=0.2)
        (home / "model").mkdir()
        stage.export(model, home / "model")
        pretrained.note(home / "model", stage.name, 3, config.to_json(cfg), {})
        made_speech.write(home / "other", 12, seed=5)
        language_models.write(home / "lm", made_speech.texts(40))
    return home


def job(folder: Path, *argv: str, data: str = "own") -> Any:
    return launch.decide(AudioEncoder, ["--eval_only", "--init_from", str(folder / "model"), "--dataset",
                                        str(folder / data / "speech.csv"), "--held_out", "anna,boris", "--device",
                                        "cpu", "--threads", "1", "--precision", "fp32", "--num_workers", "0", *argv])


@pytest.fixture
def tunings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of the recordings of each tuning."""
    found, tuned = list[list[str]](), fusion.tuned

    def noting(search: Any, heard: Any, said: Any, *more: Any) -> Any:
        found.append(said)
        return tuned(search, heard, said, *more)

    monkeypatch.setattr(fusion, "tuned", noting)
    return found


def texts_of(path: Path, split: str) -> list[str]:
    return [each.text for each in recordings.read(str(path), held_out=["anna", "boris"])[split]]


def test_rates_are_those_of_the_texts_that_the_search_finds(folder: Path, tunings: list[list[str]]) -> None:
    """Beside those without a language model, which stay what they are."""
    asked = job(folder, "--lm", str(folder / "lm"), "--lm_weight", "0.7", "--lm_bonus", "2", "--beam", "4")
    [scores] = eval_only.evaluated(asked)
    stage, model = pretrained.opened(pretrained.find(str(folder / "model")), AudioEncoder, "cpu")
    tokenizer, network = language.opened(language.found(str(folder / "lm")), "cpu")
    search = Fusion(spelled(stage.tokenizer), stage.tokenizer.end_of_text, network, spelled(tokenizer), 256).search
    said, found = list[str](), list[str]()
    assert scores.rows
    for clip in scores.rows.dataset:
        heard = model.log_probs(clip.waveform, window_seconds=99, overlap_seconds=0).numpy()
        labels = search(heard, Weights(0.7, 2.0), 4)[0].labels
        said, found = [*said, clip.text], [*found, " ".join(stage.tokenizer.decode(labels).split())]
    metrics = scores.metrics
    assert metrics["eval/lm_wer"] == pytest.approx(jiwer.wer(said, found))
    assert metrics["eval/lm_cer"] == pytest.approx(jiwer.cer(said, found))
    assert (metrics["eval/lm_weight"], metrics["eval/lm_bonus"]) == (pytest.approx(0.7), 2.0)
    assert not tunings and {"eval/lm_wer", "eval/lm_cer", "eval/wer", "eval/cer"} <= scores.intervals(0).keys()
    [alone] = eval_only.evaluated(job(folder))
    assert alone.metrics == {name: value for name, value in metrics.items() if "lm_" not in name}
    assert alone.metrics["eval/cer"] != metrics["eval/lm_cer"]


def test_the_weight_is_tuned_on_the_validation_set_of_the_run(folder: Path, tunings: list[list[str]],
                                                               caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is evaluated: other data, which share no text with it, or that set itself, which is then reported."""
    own, other = folder / "own/speech.csv", folder / "other/speech.csv"
    line = eval_only.report(job(folder, "--lm", str(folder / "lm"), "--beam", "3", "--split", "all", data="other"))
    assert tunings == [texts_of(own, "validation")] and "are evaluated, too" not in caplog.text
    assert len(tunings[0]) == 20 and not set(tunings[0]) & set(texts_of(other, "train"))
    assert all(f"{name}=" in line for name in ("wer", "cer", "lm_wer", "lm_cer", "lm_weight", "lm_bonus")), line
    with caplog.at_level(logging.INFO):
        line = eval_only.report(job(folder, "--lm", str(folder / "lm"), "--beam", "3", "--lm_weight", "0.5"))
    assert tunings[1] == tunings[0] and "20 of the 20 recordings" in caplog.text
    with_lm, alone = (float(re.search(rf" {name}=([0-9.]+)%", line)[1]) for name in ("lm_wer", "wer"))  # type: ignore[index]
    assert "Tuned --lm_bonus on 20 validation recordings: --lm_weight 0.5" in caplog.text
    assert f"with a WER of {with_lm:.1f}% there, {alone:.1f}% without a language model" in caplog.text


@pytest.mark.parametrize("wer, is_worse", [(9.0, True), (0.0, False)])
def test_a_language_model_that_does_harm_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch, wer: float,
                                                     is_worse: bool, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fusion, "tuned", lambda *arguments: (Weights(0.5, 1.0), wer))
    eval_only.report(job(folder, "--lm", str(folder / "lm"), "--beam", "3"))
    assert ("makes the transcripts worse, 900.0% instead of" in caplog.text) == is_worse


def test_at_most_so_many_recordings_are_tuned_on(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                 tunings: list[list[str]]) -> None:
    monkeypatch.setattr(fusion, "TUNED_ON", 7)
    eval_only.report(job(folder, "--lm", str(folder / "lm"), "--beam", "3", "--lm_bonus", "1"))
    assert tunings == [texts_of(folder / "own/speech.csv", "validation")[::3]]


def test_data_that_are_gone_cannot_be_tuned_on(folder: Path, tmp_path: Path) -> None:
    made_speech.write(tmp_path / "data", 8)
    known = pretrained.find(str(folder / "model"))
    lost = replace(known, options={**known.options, "dataset": str(tmp_path / "gone.csv")})
    with pytest.raises(UserError, match="which cannot be read: .*gone.csv.*; or type --lm_weight and --lm_bonus"):
        eval_only.report(replace(job(folder, "--lm", str(folder / "lm")), evaluated=lost))


@pytest.mark.parametrize("argv, part", [
    (["--lm", "nothing"], "nothing"), (["--lm", "MODEL"], "is of stage audio_enc, not a language model"),
    (["--lm_weight", "0.5"], "--lm_weight 0.5 is for --lm"), (["--lm_bonus", "0"], "--lm_bonus 0 is for --lm"),
    (["--beam", "4"], "--beam 4 is for an evaluation with --lm"),
    (["--lm", "LM", "--beam", "0"], "--beam must be"), (["--lm", "LM", "--lm_weight", "-1"], "--lm_weight must be"),
])
def test_a_mistake_is_one_line(folder: Path, argv: list[str], part: str) -> None:
    names = {"MODEL": str(folder / "model"), "LM": str(folder / "lm")}
    with pytest.raises(UserError) as refusal:
        job(folder, *[names.get(word, word) for word in argv])
    assert len(refusal.value.problems) == 1 and part in refusal.value.problems[0]


def test_nothing_is_trained_with_a_language_model(folder: Path) -> None:
    with pytest.raises(UserError, match="a recognizer is trained without a language model") as refusal:
        launch.decide(AudioEncoder, ["--dataset", str(folder / "own/speech.csv"), "--lm", str(folder / "lm")])
    assert len(refusal.value.problems) == 1


# -- tuning ---------------------------------------------------------------------------------------------------------


def test_the_best_weights_of_the_grid_are_found() -> None:
    """Where a search finds the same texts whatever the weights: by a loop over all of the grid."""
    draw, words = random.Random(0), "a ab abc b bc".split()
    said = [" ".join(draw.choices(words, k=4)) for _ in range(30)]
    texts = [[text, *{" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(7)} - {text}] for text in said]
    lists = [[Hypothesis([*map(ord, each)], ctc=draw.gauss(0, 1), lm=draw.gauss(0, 1), words=draw.randint(1, 6))
              for each in sorted(found)] for found in texts]
    grid = [Weights(weight, bonus) for weight in (0.0, 0.5, 1.0, 2.0) for bonus in (-1.0, 0.0, 1.0)]

    def search(heard: np.ndarray, weights: Weights) -> list[Hypothesis]:
        return sorted(lists[int(heard[0])], key=lambda each: -each.ctc - weights.of(each.lm, each.words))

    def text(labels: Any) -> str:
        return "".join(map(chr, labels))

    def wer(weights: Weights) -> float:
        return float(jiwer.wer(said, [text(search(np.array([row]), weights)[0].labels) for row in range(30)]))

    rates = {weights: wer(weights) for weights in grid}
    assert len(set(rates.values())) > 4
    heard = [np.array([row]) for row in range(30)]
    for first in (grid[0], max(grid, key=lambda weights: rates[weights])):
        best, rate = fusion.tuned(search, heard, said, text, first, grid)
        assert rate == pytest.approx(min(rates.values())) == rates[best]
    best_first = min(grid, key=lambda weights: rates[weights])
    worse = [weights for weights in grid if rates[weights] > rates[best_first]]
    assert fusion.tuned(search, heard, said, text, best_first, worse)[0] == best_first, "none that was tried is better"
    few = [each[:1] for each in lists]
    stays = fusion.tuned(lambda each, weights: few[int(each[0])], heard, said, text, Weights(0.6, 0.1), grid)
    assert stays[0] in (Weights(0.6, 0.1), Weights(0.5, 0.0)), "of equal ones the nearest"
