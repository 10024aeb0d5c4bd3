"""The pages that a stage's script prints instead of training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stoker import config
from stoker.config import UserError
from stoker.daemon import machine
from stoker.daemon.rundir import PROJECT
from stoker.training.assembly import launch, pages
from stoker.training.core.stage import discover
from stoker.training.train_lm import LanguageModel
from test_docs import PAGES

SCRIPT = PROJECT / "src/training/train_lm.py"


def ran(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", str(SCRIPT), *argv], text=True, capture_output=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(PROJECT / "run/python")})


def script(*argv: str) -> str:
    return ran(*argv).stdout


@pytest.mark.parametrize("stage", discover().values())
def test_every_stage_has_a_guide(stage: type[LanguageModel]) -> None:
    text = pages.guide(stage)
    assert "```bash" in pages.section(text, "In short") and len(text.splitlines()) > 50


def test_explain_is_short_and_has_examples() -> None:
    told = script("--explain")
    assert len(told.splitlines()) < 25 and "./run/run_train_lm.sh --preset nano" in told and "\n## " not in told


def test_info_prints_the_figures_of_these_options(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(400)))
    printed = ran("--info", "--preset", "nano", "--tokenizer", "bytes", "--dataset", str(tmp_path / "text.txt"),
                  "--max_seq_len", "32", "--batch_size", "4", "--max_steps", "50")
    told = printed.stdout
    assert "Estimating time and memory" in printed.stderr and "Estimating" not in told, "it may take minutes"
    block = 12 * 128 * 128 + 13 * 128  # four matrices of attention, two of the MLP; biases and two norms
    parameters = 257 * 128 + 32 * 128 + 4 * block + 2 * 128
    assert f"parameters       {parameters:,}\n" in told and "the run          50 steps, " in told
    assert "eval_interval 2" in told, "cut as in the run itself"
    rows = int(re.search(r"(\d+) samples evaluated", told)[1])  # type: ignore[index]
    assert rows % 25 == 0 and rows, "at every second update"
    assert "# The language model" in told and re.search(r"^takes about +\d+", told, re.MULTILINE)
    assert list(tmp_path.iterdir()) == [tmp_path / "text.txt"]


def test_the_feed_forward_size_that_follows_the_width_is_reported_and_stays(tmp_path: Path) -> None:
    """It counts as typed, so that a run that is resumed before it began has it too; weights that give one win."""
    (tmp_path / "text.txt").write_text("one two three\n" * 200)
    argv = ["--dataset", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--n-embd", "96"]
    parsed, lines = pages.resolve_config(LanguageModel, pages.parse(LanguageModel, argv))
    assert parsed.config.d_ff == 384 and "d_ff" in parsed.typed
    assert lines == ["d_ff 384 (4 x the d_model given; --d_ff sets another)"]
    assert pages.resolve_config(LanguageModel, pages.parse(LanguageModel, [*argv, "--d_ff", "200"]))[1] == []
    assert '"d_ff": 384' in script("--print_config", *argv)


def test_the_printed_config_is_that_of_the_run_and_is_read_back(tmp_path: Path) -> None:
    stage = discover()["audio_enc"]
    page = pages.asked(stage, ["--preset", "nano", "--print_config"])
    assert page
    printed = json.loads(page())
    cfg = pages.resolve_config(stage, pages.parse(stage, ["--preset", "nano"]))[0].config
    assert printed == config.to_json(cfg) and (printed["head_frames"], printed["warp"]) == (1, 0.12)
    (tmp_path / "printed.json").write_text(page())
    again = pages.asked(stage, ["--config", str(tmp_path / "printed.json"), "--print_config"])
    assert again and json.loads(again()) == printed


def test_help_has_the_flags_that_are_no_options() -> None:
    page = pages.asked(LanguageModel, ["--preset", "nano", "--help"])
    assert page
    for flag in (*PAGES, "--check", "--foreground", "--preset", "--config"):
        assert re.search(rf"^  {flag}\b", page(), re.MULTILINE), flag
    assert max(map(len, page().splitlines())) <= 120


def test_a_stage_s_script_takes_the_foreground_flag_of_its_wrapper(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three\n" * 200)
    argv = ["--dataset", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--foreground", "--check"]
    assert launch._main(LanguageModel, argv) == launch.FINISHED


def test_info_is_about_new_runs() -> None:
    with pytest.raises(UserError, match="leave --resume out"):
        made = pages.asked(LanguageModel, ["--info", "--dataset", "pydocs", "--resume"])
        assert made and made()


def test_a_recipe_may_stand_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.json").write_text('{"hardware": "auto", "epochs": 3}')
    monkeypatch.setattr(machine, "hardware", lambda: "mid")
    parsed = pages.parse(LanguageModel, ["--config", str(tmp_path / "own.json")])
    assert (parsed.preset, parsed.config.num_layers, parsed.config.epochs) == ("mid", 6, 3)


def test_hardware_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    low = pages.parse(LanguageModel, ["--hardware", "low", "--epochs", "3"])
    assert (low.config.batch_size, low.config.grad_accum_steps, low.config.epochs, low.preset) == (4, 16, 3, "low")
    monkeypatch.setattr(machine, "hardware", lambda: "mid")
    auto = pages.parse(LanguageModel, ["--hardware", "auto"])
    assert auto == pages.parse(LanguageModel, ["--hardware=mid"]) and auto.config.num_layers == 6
    assert pages.parse(LanguageModel, ["--device", "auto"]).preset == ""
