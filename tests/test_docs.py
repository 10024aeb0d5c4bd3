"""Every command in the documents is one that works: it is parsed here as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from stoker import config
from stoker.daemon.rundir import PROJECT
from stoker.training.assembly import pages
from stoker.training.core.options import Options
from stoker.training.core.stage import discover

WRAPPER_ONLY = {"--foreground", "--"}
PAGES = {"--help", "--info", "--explain", "--print_config"}

# The commands of the guide for language models, as people know them.
GUIDE = """
./run/run_train_lm.sh --preset tiny --dataset wikitext
./run/run_train_lm.sh --preset small --warmup 4000 --lr 6e-4
./run/run_train_lm.sh --preset medium --warmup 4000 --batch_size 16
./run/run_train_lm.sh --snapshot 5000 --monitor_interval 5000 --sanity_check_interval 1000
./run/run_train_lm.sh --preset small --dataset wikitext-103 --epochs 30 --warmup 4000 --lr 6e-4 --snapshot 5000
python src/training/train_lm.py --dataset wikitext-103 --model_preset small --epochs 30 --batch_size 32 --lr 6e-4 \
--warmup_steps 4000 --gradient_clip 1.0 --weight_decay 0.1 --snapshot_interval 5000 --gradient_monitor \
--gradient_monitor_interval 1000 --early_stopping --early_stop_patience 5 --weight_monitor --weight_monitor_interval 100
python src/training/train_lm.py --model_preset medium --epochs 40 --gradient_monitor --early_stop_overfit_patience 3 \
--no_early_stop_restore_best --keep_last_n_snapshots 5 --no_delete_snapshots_after_training --max_samples 10 -y
python src/training/train_lm.py --batch-size 4 --grad-accum-steps 16 --n-layer 4 --n-head 4 --n-embd 256
python src/training/train_lm.py --batch-size 32 --grad-accum-steps 2 --n-layer 12 --n-head 12 --n-embd 768 \
--block-size 1024 --epochs 20 --use-amp --use-wandb
python src/training/train_lm.py --info
python src/training/train_lm.py --explain
python src/training/train_lm.py --vocab-size 10000 --learning-rate 3e-4 --max-iters 10000 --retrain-tokenizer
python src/training/train_lm.py --resume --yes
python src/training/train_lm.py --checkpoint_file result/lm_wikitext-103/snapshots/snapshot_epoch_10.pt
""".replace("\\\n", "").strip().splitlines()


def documents() -> list[Path]:
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Lines of the documents' bash blocks, and what stands between backticks and begins like a command."""
    found = []
    for path in documents():
        text = path.read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            found += [line.split("#")[0].strip() for line in block.splitlines() if line.split("#")[0].strip()]
        found += re.findall(r"`(\./(?:run|benchmarks)/[^`]+|(?:\.venv/bin/)?python (?:src|benchmarks)[^`]+)`", text)
        found += [_script_of(words) for words in re.findall(r"`stoker ([^`]+)`", text)]
    return found


def _script_of(words: str) -> str:
    """What `stoker` does in a checkout, as a script of run/."""
    name, _, rest = words.partition(" ")
    if name.endswith(".py") or name.startswith("-"):
        return f"./run/start.sh {words}"
    wrapper = f"run_train_{name}" if (PROJECT / f"run/run_train_{name}.sh").exists() else name
    return f"./run/{wrapper}.sh {rest}"


def test_the_documents_have_commands() -> None:
    assert "./run/run_train_lm.sh --preset nano --dataset pydocs" in commands() and len(commands()) > 10


@pytest.mark.parametrize("command", [*dict.fromkeys(commands()), *GUIDE])
def test_command(command: str) -> None:
    program, *words = shlex.split(command)
    if program.endswith("python"):
        program, *words = words
    path = PROJECT / program
    assert path.is_file(), f"{program} does not exist"
    if path.suffix == ".py" and path.parent.name == "benchmarks":
        usage = path.read_text().split('"""')[1]
        own, options = (words[:words.index("--")], words[words.index("--") + 1:]) if "--" in words else (words, [])
        data = {word for word in own if not word.startswith("-")}
        assert all(word in usage for word in own if word.startswith("-"))
        assert not data or "DATA" in usage or all(word in usage for word in data)
        if options:
            script = re.search(r"OPTIONS of (\w+)\.py", usage)
            assert script
            pages.parse(next(s for s in discover().values() if s.__module__ == f"stoker.training.{script[1]}"), options)
    elif path.name == "start.sh":  # what the example of extend.md has
        assert words == ["--help"] or words[0] == "my_stage.py"
        config.parse(Options, {}, [word for word in words[1:] if word not in WRAPPER_ONLY | PAGES | {"--dataset",
                                                                                                  "series.txt"}])
    elif path.name.startswith(("run_train_", "run_sft_", "train_", "sft_")):
        script = path.name.removeprefix("run_").removesuffix(".sh").removesuffix(".py")
        stage = next(s for s in discover().values() if s.__module__ == f"stoker.training.{script}")
        assert pages.asked(stage, words) or not PAGES & set(words)
        pages.parse(stage, [word for word in words if word not in WRAPPER_ONLY | PAGES])
    else:
        header = path.read_text().split("\n\n")[0]
        for word in words:
            if word.startswith("-"):
                assert re.search(rf"(^|[\s\[|]){re.escape(word)}\b", header, re.MULTILINE), f"{word} is not in {header}"


def test_what_can_happen_is_proved_by_tests_there_are() -> None:
    table = (PROJECT / "docs/operations.md").read_text().split("## What can happen")[1].split("\n## ")[0]
    rows = [row.strip("|").split(" | ") for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 25
    for row in rows:
        file, _, names = row[4].strip().partition(": ")
        for name in names.split(", "):
            assert f"def test_{name}(" in (PROJECT / "tests" / file).read_text(), (file, name)


def test_the_tree_of_the_readme_is_the_real_one() -> None:
    tree = (PROJECT / "README.md").read_text().split("## The tree")[1]
    for line in re.findall(r"^    ( *)(\S+)", tree, re.MULTILINE):
        indent, name = line
        assert any((PROJECT / place / name).exists() for place in (("src", "run") if indent else (".",))), name
    rooms = {p.name for p in (PROJECT / "src").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert all(f"      {room}/" in tree for room in rooms)


def test_the_stages_of_the_readme_are_those_there_are() -> None:
    table = (PROJECT / "README.md").read_text().split("## Stages")[1].split("##")[0]
    named = set(re.findall(r"`run/run_(\w+)\.sh`", table))
    assert named == {stage.__module__.removeprefix("stoker.training.") for stage in discover().values()}


def test_every_wrapper_says_what_it_does() -> None:
    for path in (PROJECT / "run").glob("*.sh"):
        if path.name != "lib.sh":
            first, second, *_ = path.read_text().splitlines()
            assert first == "#!/usr/bin/env bash" and second.startswith("# ") and path.stat().st_mode & 0o111, path


def test_options_of_the_wrapper_are_options_of_the_trainer() -> None:
    stage = discover()["lm"]
    known = config.names(stage.Config).keys() | {"preset", "config", "foreground", "help", "OPTIONS"} | {
        flag.strip("-") for flag in PAGES}
    header = (PROJECT / "run" / "run_train_lm.sh").read_text().split("\n\n")[0]
    named = re.findall(r"^#   --(\w+)", header, re.MULTILINE)
    assert len(named) > 10 and set(named) <= known


def test_the_table_of_augmentations_has_the_numbers_of_the_code() -> None:
    from stoker.training.train_audio_enc import AUGMENTS

    table = (PROJECT / "docs/train_audio_enc.md").read_text().split("### Augmentation")[1].split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| `--")]
    found: dict[str, dict[str, float]] = {"mild": {}, "strong": {}}
    for options, mild, strong, _ in rows:
        for name, *values in zip(re.findall(r"--(\w+)", options), mild.split(", "), strong.split(", ")):
            found["mild"][name], found["strong"][name] = map(float, values)
    assert found == {word: {name: AUGMENTS[word].get(name, 0) for name in AUGMENTS["strong"]} for word in found}
