"""What a command line and a JSON file make of a config, what is refused, and in which words."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stoker import config
from stoker.config import UserError, opt
from stoker.training.core.stage import discover
from stoker.training.train_lm import LanguageModel
from stoker.training.train_text import Thinker

SOURCE = Path(config.__file__).parent
SCRIPT = SOURCE / "training" / "train_lm.py"


@dataclass
class Shape:
    """What shape"""

    width: int = opt(8, "how wide", ge=1, le=100, usual=(4, 64), aliases=("n_width", "w"))
    heads: int = opt(2, "they divide the width", ge=1)

    def problems(self) -> list[str]:
        return [f"--heads {self.heads} does not divide --width {self.width}"] if self.width % self.heads else []


@dataclass
class Plan(Shape):
    """What to do"""

    rate: float = opt(0.5, "how fast", gt=0, lt=1)
    level: float = opt(0.0, "how high", ge=-5, le=5)
    from_zero: float = opt(0.0, "not below it", ge=0)
    above_zero: float = opt(1.0, "not zero either", gt=0)
    to_one: float = opt(0.0, "not above it", le=1)
    below_one: float = opt(0.0, "not one either", lt=1)
    words: str = opt("", "what it is called")
    kind: str = opt("red", "which colour", choices=("red", "green"))
    resume: str = opt("", "go on", bare="newest")
    steps: int | None = opt(None, "how long", ge=1)
    watch: bool = opt(False, "look at it", aliases=("use_watch",))
    keep: bool = opt(True, "do not throw it away", aliases=("k",))
    first_interval: int = opt(10, "between looks", ge=0, aliases=("interval",))
    second_interval: int = opt(10, "between other looks", ge=0, aliases=("interval",))


PRESETS: dict[str, dict[str, Any]] = {"small": {"width": 16, "rate": 0.25}, "large": {"width": 64, "heads": 8}}


def parsed(*argv: str) -> Plan:
    return config.parse(Plan, PRESETS, argv).config


def mistakes(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config.parse(Plan, PRESETS, argv)
    assert not any("\n" in problem for problem in caught.value.problems)
    return list(caught.value.problems)


def written(folder: Path, text: str) -> str:
    path = folder / "given.json"
    path.write_text(text)
    return str(path)


# -- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, field, value", [
    (["--width", "12"], "width", 12),
    (["--width=12"], "width", 12),
    (["--n-width", "12"], "width", 12),
    (["-w", "12"], "width", 12),
    (["--first-interval", "3"], "first_interval", 3),
    (["--rate", "1e-2"], "rate", 0.01),
    (["--level", "-1.5"], "level", -1.5),
    (["--level", "-.5"], "level", -0.5),
    (["--level=-2"], "level", -2.0),
    (["--words", "two words"], "words", "two words"),
    (["--words=a=b"], "words", "a=b"),
    (["--words", "-1"], "words", "-1"),
    (["--watch"], "watch", True),
    (["--use-watch"], "watch", True),
    (["--watch=false"], "watch", False),
    (["--watch=True"], "watch", True),
    (["--no_keep"], "keep", False),
    (["--no-keep"], "keep", False),
    (["--no_k"], "keep", False),
    (["--steps", "5"], "steps", 5),
    (["--width", "4", "--n-width=4"], "width", 4),
    (["--no_keep", "--no-k", "--keep=false"], "keep", False),
    (["--rate", "0.5", "--rate", "5e-1"], "rate", 0.5),
])
def test_a_flag_sets_its_field(argv: list[str], field: str, value: object) -> None:
    plan = parsed("--heads", "1", *argv)
    assert getattr(plan, field) == value
    assert type(getattr(plan, field)) is type(value)


def test_one_alias_sets_every_field_that_has_it() -> None:
    plan = parsed("--interval", "7")
    assert (plan.first_interval, plan.second_interval) == (7, 7)
    for argv in (["--interval", "7", "--second_interval", "0"], ["--second_interval", "0", "--interval", "7"]):
        plan = parsed(*argv)
        assert (plan.first_interval, plan.second_interval) == (7, 0), "its own flag wins"


def test_monitor_interval_sets_both_monitors() -> None:
    cfg = config.parse(LanguageModel.Config, LanguageModel.presets, ["--monitor-interval", "70"]).config
    assert (cfg.gradient_monitor_interval, cfg.weight_monitor_interval) == (70, 70)


@pytest.mark.parametrize("argv, value", [
    (["--resume"], "newest"), (["--resume", "--watch"], "newest"), (["--resume", "-k"], "newest"),
    (["--resume", "run_3"], "run_3"), (["--resume=run_3"], "run_3"), (["--resume", "4711"], "4711"), ([], ""),
])
def test_resume_may_stand_alone(argv: list[str], value: str) -> None:
    assert parsed(*argv).resume == value


@pytest.mark.parametrize("argv, left", [
    ("--lr 1 --resume --yes", "--lr 1 --yes"), ("--resume run_3 --lr -1", "--lr -1"), ("--resume=run_3 -y", "-y"),
    ("--no-resume 3 x --lr=1", "--lr=1"), ("--lr 1", "--lr 1"), ("", "")])
def test_a_command_line_without_a_flag(argv: str, left: str) -> None:
    assert config.without(argv.split(), "resume", "no_resume") == left.split()


# -- what wins ------------------------------------------------------------------------------------------------------


def test_default_then_preset_then_file_then_flag(tmp_path: Path) -> None:
    path = written(tmp_path, '{"rate": 0.75, "n-width": 32}')
    assert parsed() == Plan()
    assert (parsed("--preset", "small").width, parsed("--preset", "small").rate) == (16, 0.25)
    fitted = config.parse(Plan, PRESETS, ["--heads", "2", "--config", path, "--width", "48", "--model_preset=small"])
    assert (fitted.config.width, fitted.config.rate, fitted.config.level) == (48, 0.75, 0.0)
    assert fitted.preset == "small"
    assert fitted.typed == {"heads", "width", "rate"}, "a preset's values are not typed"


def test_what_follows_two_dashes_is_no_flag() -> None:
    words: list[str] = []
    assert config.parse(Plan, PRESETS, ["a", "--width", "4", "--", "-b.wav", "--width"], words=words).config.width == 4
    assert words == ["a", "-b.wav", "--width"]


def test_a_flag_may_differ_from_the_file_and_one_value_may_stand_twice(tmp_path: Path) -> None:
    path = written(tmp_path, '{"width": 4, "n_width": 4, "width": 4, "interval": 3, "second_interval": 9}')
    assert parsed("--config", path, "--n_width", "6").width == 6
    assert parsed("--config", path).second_interval == 9


def test_comments_in_json_are_left_out_and_strings_are_not(tmp_path: Path) -> None:
    path = written(tmp_path, """// a heading
        {
          "words": "http://host//path \\" // no comment",  // a comment with "quotes"
          "width": 4, // "width": 5,
          "steps": null
        } // the end""")
    plan = parsed("--config", path)
    assert plan.words == 'http://host//path " // no comment'
    assert (plan.width, plan.steps) == (4, None)


def test_a_whole_number_in_json_is_a_number(tmp_path: Path) -> None:
    assert parsed("--config", written(tmp_path, '{"level": 3}')).level == 3.0


def test_a_config_survives_json(tmp_path: Path) -> None:
    plan = parsed("--width", "9", "--heads", "3", "--words", 'ü // "', "--no_keep", "--level", "-0.1", "--steps", "3")
    text = json.dumps(config.to_json(plan))
    assert config.from_json(Plan, json.loads(text), "there") == plan
    assert parsed("--config", written(tmp_path, text)) == plan


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_every_mistake_is_reported_at_once_each_in_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, '{"heds": 2, "kind": 7, "watch": 1, "width": true}')
    found = mistakes("--widht", "12", "stray", "--rate", "fast", "--preset", "smal", "--level", "9", "--steps", "0",
                     "--kind", "gren", "--config", path)
    wanted = [
        ("--widht", "did you mean --width?"), ("'stray'", "no flag"), ("--rate", "'fast' is not a number"),
        ("--preset", "'smal'", "did you mean small?", "small, large"), ("--level", "at least -5 and at most 5", "is 9"),
        ("--steps", "at least 1", "is 0"), ("--kind", "'gren'", "red, green", "did you mean green?"),
        ("given.json", "'heds'", "did you mean heads?"), ("given.json", "kind is 7", "not a string"),
        ("given.json", "watch is 1", "true or false"), ("given.json", "width is true", "not a whole number"),
    ]
    for parts in wanted:
        assert [line for line in found if all(part in line for part in parts)], f"nothing says {parts}: {found}"
    assert len(found) == len(wanted)


@pytest.mark.parametrize("argv, parts", [
    (["--width"], ["--width needs a value"]),
    (["--width", "--watch"], ["--width needs a value"]),
    (["--preset"], ["--preset needs a value"]),
    (["--config"], ["--config needs a value"]),
    (["--width", "1.5"], ["'1.5' is not a whole number"]),
    (["--width", ""], ["'' is not a whole number"]),
    (["--width", "1234567"], ["is 1234567"]),
    (["--width", "9" * 400], ["at most 100"]),
    (["--rate", "1.000000001"], ["is 1.000000001"]),
    (["--rate", "nan"], ["above 0 and below 1", "is nan"]),
    (["--rate", "inf"], ["is inf"]),
    (["--level", "nan"], ["is nan"]),
    (["--from_zero", "inf"], ["--from_zero must be a finite number, is inf"]),
    (["--from_zero", "nan"], ["at least 0, is nan"]),
    (["--above_zero", "nan"], ["above 0, is nan"]),
    (["--to_one", "nan"], ["at most 1, is nan"]),
    (["--below_one", "nan"], ["below 1, is nan"]),
    (["--rate", "0"], ["above 0"]),
    (["--rate", "1"], ["below 1"]),
    (["--watch=maybe"], ["'maybe' is neither true nor false"]),
    (["--watch", "true"], ["'true' is no flag"]),
    (["--no_keep=true"], ["--no_keep takes no value, is 'true'"]),
    (["--no_width", "3"], ["there is no flag --no_width"]),
    (["--no_kep"], ["did you mean --no_keep?"]),
    (["--n_widht=3"], ["did you mean --n_width?"]),
    (["--nonsense", "-5"], ["there is no flag --nonsense"]),
    (["--nonsense", "5"], ["there is no flag --nonsense"]),
    (["--"], ["there is no flag"]),
    (["--width", "9"], ["--heads 2 does not divide --width 9"]),
    (["--width", "-9"], ["at least 1", "is -9"]),
    (["--width", "9", "--heads", "three"], ["'three' is not a whole number"]),
    (["--config", "nowhere.json"], ["nowhere.json", "No such file"]),
    (["--config", "."], ["Is a directory"]),
    (["--preset", "small", "--hardware", "large"], ["--preset small and --hardware large contradict each other"]),
    (["--no-keep", "--keep"], ["--no-keep and --keep contradict each other: give one of them"]),
    (["-k", "--no_keep"], ["-k and --no_keep contradict each other"]),
    (["--watch=false", "--use_watch"], ["--watch=false and --use_watch contradict each other"]),
    (["--width", "4", "--words", "x", "--n_width", "6"], ["--width 4 and --n_width 6 contradict each other"]),
    (["--interval", "4", "--interval=5"], ["--interval 4 and --interval=5 contradict each other"]),
    (["--resume", "--resume", "run_3"], ["--resume and --resume run_3 contradict each other"]),
    (["--interval", "three"], ["--interval: 'three' is not a whole number"]),
])
def test_one_mistake_is_one_line(argv: list[str], parts: list[str]) -> None:
    found = mistakes(*argv)
    assert len(found) == 1
    assert all(part in found[0] for part in parts), found[0]


@pytest.mark.parametrize("text, part", [
    ("{", "not JSON"), pytest.param("[" * 100_000, "not JSON", id="deep"),
    ("[1]", "must be an object {...}, is list"), ('{"rate": NaN}', "is nan"),
    ('{"width": 4.0}', "width is 4.0, not a whole number"), ('{"width": null}', "width is null"),
    ('{"words": 4}', "words is 4, not a string"), ('{"width": 9, "heads": "two"}', 'heads is "two"'),
    ('{"kind": "blue"}', "none of red, green"), ('{"resume": true}', "not a string"),
    ('{"width": 4, "n-width": 8}', "given.json: width and n-width contradict each other: give one of them"),
    ('{"width": 4, "width": 8}', "given.json: width is given twice, with different values: leave one out"),
])
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, text: str, part: str) -> None:
    found = mistakes("--config", written(tmp_path, text))
    assert len(found) == 1 and part in found[0], found


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert mistakes("--config", str(tmp_path / "pipe.json"))[0].endswith("is a pipe or a device, not a file")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.json"
    path.write_bytes(b"{\xff\xfe}")
    found = mistakes("--config", str(path))
    assert len(found) == 1 and "binary.json: not JSON" in found[0]


def test_a_run_s_own_config_is_checked_too() -> None:
    with pytest.raises(UserError) as caught:
        config.from_json(Plan, {"width": 0, "colour": "red"}, "run_config.json")
    assert [line.split(":")[0] for line in caught.value.problems][0] == "run_config.json"
    assert len(caught.value.problems) == 2


def test_what_is_unusual_is_only_warned_about() -> None:
    assert config.unusual(parsed()) == []
    assert config.unusual(parsed("--width", "64")) == []
    warned = config.unusual(parsed("--width", "66"))
    assert len(warned) == 1 and all(word in warned[0] for word in ("width 66", "4 to 64"))


# -- the guides' own examples ---------------------------------------------------------------------------------------

THINKER = """{
  "vocab_size": 5000,
  "n_layers": 4,
  "d_model": 256,
  "n_heads": 4,
  "d_ff": 1024,
  "dropout": 0.1,
  "ctx_len": 512,

  "data_path": "data/text/corpus.txt",
  "batch_size": 16,
  "num_epochs": 10,
  "learning_rate": 3e-4,
  "warmup_steps": 1000,
  "max_grad_norm": 1.0,

  "checkpoint_dir": "checkpoints/thinker_tiny",
  "save_every": 1000,
  "eval_every": 500
}"""


def test_the_guides_keys_are_known(tmp_path: Path) -> None:
    given = config.parse(LanguageModel.Config, LanguageModel.presets, ["--config", written(tmp_path, THINKER)])
    wanted = {
        "vocab_size": 5000, "num_layers": 4, "d_model": 256, "num_heads": 4, "d_ff": 1024, "dropout": 0.1,
        "max_seq_len": 512, "dataset": "data/text/corpus.txt", "batch_size": 16, "epochs": 10, "lr": 3e-4,
        "warmup_steps": 1000, "gradient_clip": 1.0, "snapshot_interval": 1000, "eval_interval": 500,
        "result_dir": "checkpoints/thinker_tiny",
    }
    assert {name: getattr(given.config, name) for name in wanted} == wanted
    assert given.typed == set(wanted)


@pytest.mark.parametrize("stage", [stage for stage in discover().values() if hasattr(stage.Config, "d_ff")],
                         ids=lambda stage: stage.name)
@pytest.mark.parametrize("argv, width, d_ff", [
    ([], None, None), (["--n-embd", "384"], 384, 4 * 384), (["--d_model", "384", "--d_ff", "512"], 384, 512),
    (["--d_ff", "640"], None, 640), (["--preset", "small"], None, None),
    (["--preset", "small", "--d_model", "768"], 768, 4 * 768), (["--preset", "small", "--d_ff", "512"], None, 512)])
def test_the_feed_forward_size_follows_a_width_that_was_given(stage: Any, argv: list[str], width: int | None,
                                                              d_ff: int | None) -> None:
    """Else it is the preset's, or the guide's."""
    given = config.parse(stage.Config, stage.presets, argv)
    plain = stage.Config(**(stage.presets["small"] if "small" in argv else {}))
    assert (given.config.d_model, given.config.d_ff) == (width or plain.d_model, d_ff or plain.d_ff)
    typed = {name: getattr(given.config, name) for name in given.typed}
    assert bool(config.following(stage.Config, typed)) == (width is not None and "--d_ff" not in argv)


def test_a_file_may_give_the_width_and_a_stage_another_factor(tmp_path: Path) -> None:
    @dataclass
    class SwiGLU:
        """What shape"""

        d_model: int = opt(256, "hidden size", ge=1)
        d_ff: int = opt(512, "feed-forward size", ge=1, follows=("d_model", 8 / 3))

    given = config.parse(SwiGLU, {}, ["--config", written(tmp_path, '{"d_model": 384}')])
    assert given.config.d_ff == 1024
    line = "d_ff 1024 (2.67 x the d_model given; --d_ff sets another)"
    assert config.following(SwiGLU, {"d_model": 384}) == {"d_ff": (1024, line)}
    assert "(default: 512; 2.67 x d_model where that is given)" in config.help_text(SwiGLU, {}, "")
    with pytest.raises(UserError) as caught:
        config.parse(SwiGLU, {}, ["--d_model", "-3"])
    assert caught.value.problems == ("--d_model must be at least 1, is -3",)


def test_a_key_of_another_model_is_named_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no setting 'rope_theta'"):
        config.parse(LanguageModel.Config, {}, ["--config", written(tmp_path, '{"rope_theta": 10000, "n_layers": 4}')])


@pytest.mark.parametrize("command, wanted", [
    ("--batch-size 4 --grad-accum-steps 16 --n-layer 4 --n-head 4 --n-embd 256 --block-size 256 --epochs 5",
     {"grad_accum_steps": 16, "num_layers": 4, "num_heads": 4, "d_model": 256, "max_seq_len": 256, "epochs": 5}),
    ("--batch-size 32 --n-layer 12 --use-amp --use-wandb", {"amp": True, "use_wandb": True, "num_layers": 12}),
    ("--no-amp --use_compile", {"amp": False, "compile": True}),
    ("--no_compile --hardware mid", {"compile": False, "d_model": 384, "grad_accum_steps": 4}),
    ("--vocab-size 10000 --learning-rate 3e-4 --max-iters 10000 --retrain-tokenizer",
     {"vocab_size": 10000, "lr": 3e-4, "max_steps": 10000, "retrain_tokenizer": True}),
    ("--preset small --epochs 30 --warmup 4000 --lr 6e-4 --snapshot 5000",
     {"d_model": 512, "num_layers": 6, "warmup_steps": 4000, "lr": 6e-4, "snapshot_interval": 5000}),
    ("--model_preset medium --epochs 40 --batch_size 16 --lr 3e-4 --warmup_steps 4000 --gradient_clip 1.0 "
     "--snapshot_interval 2000 --gradient_monitor --gradient_monitor_interval 500 --early_stopping "
     "--early_stop_patience 7 --early_stop_overfit_patience 3 --weight_monitor --weight_monitor_interval 100 "
     "--keep_last_n_snapshots 5 --yes",
     {"d_model": 768, "num_heads": 12, "early_stopping": True, "early_stop_patience": 7, "keep_last_n_snapshots": 5,
      "early_stop_overfit_patience": 3, "weight_monitor_interval": 100, "yes": True}),
    ("--no_delete_snapshots_after_training --no_early_stop_restore_best --resume -y",
     {"delete_snapshots_after_training": False, "early_stop_restore_best": False, "resume": "newest", "yes": True}),
])
def test_the_guides_commands_are_understood(command: str, wanted: dict[str, Any]) -> None:
    cfg = config.parse(LanguageModel.Config, LanguageModel.presets, command.split()).config
    assert {name: getattr(cfg, name) for name in wanted} == wanted


@pytest.mark.parametrize("argv, part", [
    (["--num_layers", "49"], "at most 48"), (["--num_heads", "33"], "at most 32"), (["--lr", "0.02"], "at most 0.01"),
    (["--lr", "nan"], "is nan"), (["--dropout", "0.95"], "at most 0.9"), (["--vocab_size", "255"], "at least 256"),
    (["--vocab_size", "100001"], "at most 100000"), (["--num_heads", "3"], "does not divide --d_model 256"),
    (["--device", "gpu"], "none of auto, cpu, cuda"),
])
def test_the_language_model_s_ranges(argv: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        config.parse(LanguageModel.Config, LanguageModel.presets, argv)
    assert len(caught.value.problems) == 1 and part in caught.value.problems[0]


# -- help, and a machine where nothing is installed -----------------------------------------------------------------


@pytest.mark.parametrize("stage", [LanguageModel, Thinker])
def test_help_names_every_option_alias_and_default(stage: Any) -> None:
    """Under headings that differ, though two groups of the thinker's have one title."""
    page = config.help_text(stage.Config, stage.presets, "usage")
    headings = [line for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(headings) == len(set(headings)) > 5
    for name, (kind, spec, default) in config.fields(stage.Config).items():
        assert f"  --{name}" in page
        assert all(f"-{alias}" in page for alias in spec.aliases)
        assert not (kind is bool and default) or f"--no_{name} switches it off" in " ".join(page.split())
    assert "Model:" in page and "nano, tiny, small, medium" in page and "[TEXT]" in page
    assert max(map(len, page.splitlines())) <= 120


def bare(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run this Python without anything that was installed into it."""
    return subprocess.run([sys.executable, "-S", *argv], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(SOURCE.parent)})


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("some words\n")
    return str(path)


def test_help_and_config_need_nothing_installed(text: str) -> None:
    assert "--num_heads" in bare(str(SCRIPT), "--help").stdout
    printed = json.loads(bare("-P", str(SCRIPT), "--preset", "tiny", "--dataset", text, "--print_config").stdout)
    assert printed["d_ff"] == 1024
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bare("-P", str(SCRIPT), "--num_haeds", "3")
    assert caught.value.returncode == 2
    assert caught.value.stderr == "train_lm.py: there is no flag --num_haeds; did you mean --num_heads?\n"


@pytest.mark.parametrize("argv", [["-c", "from stoker.training import train_lm"], ["-P", str(SCRIPT), "--help"],
                                  ["-P", str(SCRIPT), "--print_config"]])
def test_torch_and_numpy_stay_unloaded(argv: list[str]) -> None:
    told = subprocess.run([sys.executable, "-X", "importtime", *argv], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(SOURCE.parent)}).stderr
    loaded = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "stoker.training.core.options" in loaded
    assert not loaded & {"torch", "numpy"}


def test_a_preset_may_stand_in_the_file(tmp_path: Path) -> None:
    """And a flag wins over it; the file's other values win over the preset's."""
    path = written(tmp_path, '{"preset": "small", "num_layers": 3}')
    parsed = config.parse(LanguageModel.Config, LanguageModel.presets, ["--config", path])
    assert (parsed.preset, parsed.config.d_model, parsed.config.num_layers) == ("small", 512, 3)
    parsed = config.parse(LanguageModel.Config, LanguageModel.presets, ["--config", path, "--preset", "tiny"])
    assert (parsed.preset, parsed.config.d_model, parsed.config.num_layers) == ("tiny", 256, 3)
    with pytest.raises(UserError, match="'smal' is none of nano, .*; did you mean small\\?$"):
        config.parse(LanguageModel.Config, LanguageModel.presets, ["--config", written(tmp_path, '{"preset": "smal"}')])


def test_what_is_printed_is_read_back_the_same(tmp_path: Path, text: str) -> None:
    def printed(*argv: str) -> str:
        return bare("-P", str(SCRIPT), *argv, "--print_config").stdout

    first = printed("--preset", "nano", "--lr", "1e-3", "--dataset", "nowhere//text.txt",
                    "--no_weight_monitor")
    assert "//text" in first, "no comment, though it looks like one"
    assert printed("--config", written(tmp_path, first)) == first
    assert not math.isclose(json.loads(first)["lr"], LanguageModel.presets["nano"]["lr"])


@pytest.mark.parametrize("text, shown", [
    ("a\x1b[2J\n", "a\\x1b[2J\\n"), ("\x00\r\x7f\x9b", "\\x00\\r\\x7f\\x9b"), ("\u202eevil", "\\u202eevil"),
    ("\udcff", "\\udcff"), ("\U000e0001", "\\U000e0001"), ("ü 本\u3000👩\u200d🚀 e\u0301\t\\n", None)])
def test_a_terminal_gets_no_commands(text: str, shown: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.printable(text) == (text if shown is None else shown)
    config.complain([text, "second"])
    assert capsys.readouterr().err.splitlines() == [
        f"{config.program()}: {shown or text}", f"{config.program()}: second"]
