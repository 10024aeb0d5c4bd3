"""Trained weights by name; runs that begin with them; figures of them alone."""

import hashlib
import json
import math
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from desk import TINY, unless_typed
from stoker.config import UserError
from stoker.daemon import rundir
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir, Status
from stoker.inference import generate
from stoker.training.assembly import eval_only, launch
from stoker.training.assembly.session import Session
from stoker.training.core import manifest, pretrained
from stoker.training.core.callback import Callback
from stoker.training.core.evaluation import evaluate
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.signals import Signals
from stoker.training.train_audio_enc import AudioEncoder
from stoker.training.train_lm import LanguageModel
from stoker.training.trainer import Ending, Trainer
from toys import Regression, StopAt, assert_same, new_run, with_callbacks
from toys import session as toy_session

STEPS = ["--max_steps", "6", "--eval_interval", "2", "--snapshot_interval", "2", "--keep_last_n_snapshots", "0",
         "--no_delete_snapshots_after_training"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return text_in(tmp_path)


def text_in(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(200)))
    return path


def lm(*callbacks: Callback) -> type[LanguageModel]:
    return type("LM", (LanguageModel,), {"callbacks": lambda self: list(callbacks)})


def trained(*argv: str, stage: type[LanguageModel] = LanguageModel) -> tuple[RunDir, Ending]:
    """A run in this process, as a script would make it or go on with it."""
    job = launch.decide(stage, [*argv, "--result_dir", "runs"])
    typed = {name: getattr(job.cfg, name) for name in job.parsed.typed}
    status = Status("lm", "train_lm.py", job.cfg.dataset, job.parsed.preset, typed=typed)
    run = job.run or rundir.create(Path("runs"), job.cfg.run_name or "run", status)
    with run.lock():
        ending = Session(job, run, Signals(lambda name: 0), threading.Event()).train()
    run.write_status(replace(run.status(), state=ending.state))
    return run, ending


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, of which each test gets a copy."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        here.setenv("STOKER_HOME", str(folder / "home"))
        argv = [*unless_typed(TINY, STEPS), *STEPS, "--run_name", "source"]
        return trained("--dataset", str(text_in(folder)), *argv)[0].path


@pytest.fixture
def source(once: Path, text: Path, own_home: Path) -> RunDir:
    path = Path(shutil.copytree(once, "runs/source")).resolve()
    (own_home / "runs").mkdir()
    (own_home / "runs" / "source").symlink_to(path)
    return RunDir(path)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# -- which weights are meant ----------------------------------------------------------------------------------------


def test_a_run_s_weights_are_the_best_then_the_last_then_the_newest(source: RunDir) -> None:
    journal = {row["step"]: row["eval/loss"] for row in Journal(source.metrics).rows() if "eval/loss" in row}
    best = pretrained.find("source")
    assert (best.folder, best.step, best.stage) == (source.models / "best", min(journal, key=journal.__getitem__), "lm")
    shutil.rmtree(source.models / "best")
    assert (pretrained.find("sour").folder, pretrained.find("source").step) == (source.models / "final", 6)
    shutil.rmtree(source.models / "final")
    newest = manifest.found(source.snapshots)[-1]
    assert (pretrained.find(str(source.path)).folder, pretrained.find("source").step) == (newest, 6)
    (newest / "model.safetensors").write_bytes(b"broken")
    assert pretrained.find("source").step == 4
    shutil.rmtree(source.snapshots)
    source.snapshots.mkdir()
    with pytest.raises(UserError, match="run source has no weights yet"):
        pretrained.find("source")


def test_snapshots_and_model_folders_are_found_by_path(source: RunDir, tmp_path: Path) -> None:
    folder = source.snapshots / "snapshot_step_00000002"
    found = pretrained.find("runs/source/snapshots/snapshot_step_2.pt")
    assert (found.folder, found.step, found.is_snapshot, found.options["d_model"]) == (folder, 2, True, 16)
    for named in ("runs/source/models/final", "runs/source/models/final/model.safetensors"):
        found = pretrained.find(named)
        assert (found.folder, found.step, found.is_snapshot) == (source.models / "final", 6, False)
    assert found.identity["sha256"] == hashlib.sha256((found.folder / "model.safetensors").read_bytes()).hexdigest()
    shutil.move(source.models / "final", tmp_path / "elsewhere")
    assert pretrained.find("elsewhere").options["d_model"] == 16


@pytest.mark.parametrize("named, why", [
    ("nothing", "there is no run 'nothing'"), ("no/where", "no/where: not found"),
    ("empty", "nor a snapshot, nor a model"), ("pickled", r"has no \*.safetensors"),
])
def test_what_is_none_is_refused(text: Path, named: str, why: str) -> None:
    Path("empty").mkdir()
    Path("pickled").mkdir()
    Path("pickled/config.json").write_text("{}")
    Path("pickled/pytorch_model.bin").touch()
    with pytest.raises(UserError, match=why):
        pretrained.find(named)


# -- a run that begins with them ------------------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_the_shape_and_the_tokenizer(source: RunDir, caplog: Any) -> None:
    """Told in one line with the SHA-256; it goes on when the source is gone, with nothing new in its receipt."""
    caplog.set_level("INFO")
    begins = ["--dataset", "text.txt", "--init_from", "source", "--batch_size", "4", "--threads", "1", *STEPS,
              "--run_name", "second"]
    first = source.models / "best"
    identity = {"path": str(first), "sha256": hashlib.sha256((first / "model.safetensors").read_bytes()).hexdigest()}
    run, ending = trained(*begins, stage=lm(StopAt(3)))
    assert ending.state == "stopped"
    written = json.loads(run.config_file.read_text())
    assert (written["d_model"], written["max_seq_len"], written["tokenizer"]) == (16, 16, "bytes")
    assert any(message.endswith(f"SHA-256 {identity['sha256']}") and str(first) in message
               for message in caplog.messages)
    stage = LanguageModel(LanguageModel.Config(**written), run.path)
    stage.reopen()
    model = stage.model()
    stage.load(model, first)
    begun = weights_of(run.snapshots / "snapshot_step_00000000")
    assert_same(begun, {name: tensor for name, tensor in model.state_dict().items() if name in begun})
    assert manifest.read(run.snapshots / "snapshot_step_00000000")["made_by"]["begun_with"] == identity

    source.remove()
    caplog.clear()
    run, ending = trained("--resume", "second", "--yes", stage=lm(StopAt(-1)))
    assert ending.state == "finished" and any("same configuration" in message for message in caplog.messages)
    assert manifest.read(manifest.found(run.snapshots)[-1])["made_by"]["begun_with"] == identity


def test_a_snapshot_of_a_run_with_its_own_tokenizer_will_do(text: Path) -> None:
    Path("text.txt").write_text("".join(f"the {i}th line of the text, which is number {i}\n" for i in range(400)))
    argv = [*STEPS, "--tokenizer", "bpe", "--vocab_size", "270", "--run_name", "own"]
    run, _ = trained("--dataset", "text.txt", *unless_typed(TINY, argv), *argv)
    again = ["--dataset", "text.txt", "--threads", "1", *STEPS, "--init_from"]
    for weights in (run.snapshots / "snapshot_step_00000004", run.models / "best"):
        other, ending = trained(*again, str(weights), "--tokenizer", "bpe")
        assert ending.state == "finished"
        assert (other.path / "tokenizer.json").read_text() == (run.path / "tokenizer.json").read_text()
    with pytest.raises(UserError, match="--tokenizer bytes differs from the bpe of .*: leave it out"):
        launch.decide(LanguageModel, [*again, "own", "--tokenizer", "bytes"])
    preset = type("Mine", (LanguageModel,), {"presets": {"mine": {"tokenizer": "bpe", "vocab_size": 300}}})
    for weights in (run.models / "best", other.models / "best"):  # the latter names the former's tokenizer
        job = launch.decide(preset, [*again, str(weights), "--preset", "mine"])
        assert job.cfg.tokenizer == str(weights / "tokenizer.json"), "a preset's kind is for new weights"


@pytest.mark.parametrize("argv, why", [
    (["--d_model", "32"], "--d_model 32 differs from the 16 of .*models/best, step"),
    (["--max_seq_len", "8"], "--max_seq_len 8 differs from the 16"),
    (["--preset", "nano"], "--preset nano: num_heads 4 differs from the 2 of .*: leave the preset out, or "
     "type --num_heads 2 as well"),
    (["--tokenizer", "bpe"], "--tokenizer bpe differs from the bytes"),
    (["--checkpoint_file", "runs/source/snapshots/snapshot_step_00000002"], "give one of them"),
    (["--resume"], "give one of them"), (["--split", "test"], "is for --eval_only"),
])
def test_what_contradicts_the_weights_is_refused(source: RunDir, argv: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        launch.decide(LanguageModel, ["--dataset", "text.txt", "--init_from", "source", *argv])


def test_what_agrees_with_the_weights_may_be_typed(source: RunDir) -> None:
    job = launch.decide(LanguageModel, ["--dataset", "text.txt", "--init_from", "source", "--d_model", "16",
                                        "--tokenizer", "bytes"])
    assert (job.cfg.d_model, job.cfg.num_layers, job.cfg.init_from) == (16, 1, "source")


def test_alone_it_means_the_newest_finished_run(source: RunDir) -> None:
    begins = ["--dataset", "text.txt", "--init_from"]
    assert launch.decide(LanguageModel, begins).cfg.d_model == 16
    source.write_status(replace(source.status(), state="stopped"))
    with pytest.raises(UserError, match="no finished run of lm"):
        launch.decide(LanguageModel, begins)


def test_weights_of_another_stage_are_refused(source: RunDir) -> None:
    stage = type("Other", (LanguageModel,), {"name": "other"})
    with pytest.raises(UserError, match="is of stage lm, but this is a run of stage other: name weights of other"):
        launch.decide(stage, ["--dataset", "text.txt", "--init_from", "source"])


# -- a model folder that was damaged or edited ----------------------------------------------------------------------


def use(folder: Path) -> None:
    """As every program does that uses trained weights."""
    pretrained.opened(pretrained.find(str(folder)), LanguageModel, "cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                                  "stoker.json"])
def test_a_flipped_bit_of_a_model_folder_is_refused(source: RunDir, file: str) -> None:
    """Wherever it is, in one line that names the file."""
    folder = source.models / "best"
    use(folder)
    content = (folder / file).read_bytes()
    for number in range(40):
        flipped = bytearray(content)
        flipped[number * (len(content) - 1) // 39] ^= 1 << number % 8
        (folder / file).write_bytes(flipped)
        with pytest.raises(UserError, match=f"is not as it was written: {file} .* delete stoker.json") as refusal:
            use(folder)
        assert len(refusal.value.problems) == 1 and "\n" not in refusal.value.problems[0]


def test_every_reader_refuses_damaged_weights(source: RunDir) -> None:
    path = source.models / "best" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match="not as it was written: model.safetensors"):
        eval_only.evaluated(launch.decide(LanguageModel, ["--eval_only", "--resume", "source"]))
    with pytest.raises(UserError, match="not as it was written: model.safetensors"):
        trained("--dataset", "text.txt", "--init_from", "source", "--threads", "1", *STEPS, "--run_name", "second")
    with pytest.raises(UserError, match="not as it was written: model.safetensors"):
        generate._generate(generate.Config(), "source", "1 times")


def gone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def added(folder: Path) -> None:
    """Of several files with weights, the last one would win."""
    shutil.copy(folder / "model.safetensors", folder / "zz.safetensors")


def piped(folder: Path) -> None:
    (folder / "stoker.json").unlink()
    os.mkfifo(folder / "stoker.json")


@pytest.mark.parametrize("edit, why", [(gone, "tokenizer.json is missing"), (piped, "stoker.json is something else"),
                                       (added, "zz.safetensors was not there when it was written")])
def test_a_model_folder_with_other_files_is_refused(source: RunDir, edit: Any, why: str) -> None:
    edit(source.models / "best")
    with pytest.raises(UserError, match=f"is not as it was written: {why}"):
        use(source.models / "best")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["ours", "another program's", "of a snapshot"])
def test_weights_that_are_not_finite_are_refused(source: RunDir, bad: float, whose: str) -> None:
    """Also where every digest is right."""
    folder = source.models / "best" if whose != "of a snapshot" else source.snapshots / "snapshot_step_00000002"
    weights = weights_of(folder)
    name = sorted(weights)[3]
    weights[name].view(-1)[-1] = bad
    save_file(weights, folder / "model.safetensors", {"aliases": "{}"})
    if whose == "ours":
        known = json.loads((folder / "stoker.json").read_text())
        pretrained.note(folder, "lm", known["step"], known["options"], {})
    elif whose == "another program's":
        (folder / "stoker.json").unlink()
    else:
        entries = {file: entry for file, entry in manifest.entries(folder).items() if file != "manifest.json"}
        manifest.write(folder, 2, entries, manifest.read(folder)["made_by"])
    with pytest.raises(UserError, match=r"cannot be used: 1 of its \d+ tensors hold NaN or infinity, the first is"):
        use(folder)


@pytest.mark.parametrize("name", ["num_heads", "d_ff", "max_seq_len"])
def test_a_stoker_json_of_another_model_than_config_json_is_refused(source: RunDir, name: str) -> None:
    """No shape of a tensor shows the number of heads."""
    folder = source.models / "best"
    known = json.loads((folder / "stoker.json").read_text())
    was = known["options"][name]
    pretrained.note(folder, "lm", 6, known["options"] | {name: 2 * was}, {})
    with pytest.raises(UserError, match=f"{name} is {2 * was} in stoker.json and {was} in config.json"):
        use(folder)


def test_the_same_of_a_stage_whose_config_json_has_our_names(tmp_path: Path) -> None:
    options = vars(AudioEncoder.Config(d_model=24, num_heads=2))
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 24, "num_heads": 3, "vocab_size": 28}))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    pretrained.note(tmp_path, "audio_enc", 1, options, {})
    with pytest.raises(UserError, match="num_heads is 2 in stoker.json and 3 in config.json"):
        pretrained.config_for(pretrained.find(str(tmp_path)), AudioEncoder)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 24, "num_heads": 2, "vocab_size": 28}))
    pretrained.note(tmp_path, "audio_enc", 1, options, {})
    assert pretrained.config_for(pretrained.find(str(tmp_path)), AudioEncoder).num_heads == 2


def test_a_folder_that_was_changed_on_purpose_is_read_without_stoker_json(source: RunDir) -> None:
    """As fine-tuning by another program changes it, which writes into the same folder."""
    folder = source.models / "best"
    weights = weights_of(folder)
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="delete stoker.json, and the folder is read as another program's"):
        use(folder)
    (folder / "stoker.json").unlink()
    found = pretrained.find(str(folder))
    _, model = pretrained.opened(found, LanguageModel, "cpu")
    assert (found.stage, found.step) == ("", -1)
    torch.testing.assert_close(model.final_norm.bias, weights["transformer.ln_f.bias"])


def test_a_folder_of_an_earlier_version_is_read_with_a_warning(source: RunDir, caplog: Any) -> None:
    """Its stoker.json has no digests."""
    path = source.models / "best" / "stoker.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({name: known[name] for name in ("stage", "step", "options", "scores")}))
    use(path.parent)
    assert f"{path} was written by an earlier version, without digests" in caplog.text
    path.write_text(json.dumps({name: known[name] for name in ("stage", "step", "options", "scores", "files")}))
    with pytest.raises(UserError, match="stoker.json cannot be read"):
        use(path.parent)


# -- figures of them alone ------------------------------------------------------------------------------------------


def test_an_evaluation_gives_the_figures_of_the_journal_to_the_last_bit(source: RunDir) -> None:
    """Of the best weights and of a snapshot, with the run's options or with the same typed; nothing is left."""
    before = sorted(Path("runs").iterdir())
    journal = {row["step"]: {name: value for name, value in row.items() if name.startswith("eval/")}
               for row in Journal(source.metrics).rows()}
    step = pretrained.find("source").step
    typed = ["--dataset", "text.txt", "--batch_size", "4", "--threads", "1"]
    for argv, at in [(["--resume", "source"], step), (["--init_from", "source", *typed], step),
                     (["--resume", "runs/source/snapshots/snapshot_step_00000002"], 2),
                     (["--checkpoint_file", "runs/source/snapshots/snapshot_step_2.pt"], 2),
                     (["--checkpoint_file", "runs/source/snapshots/snapshot_step_00000002", *typed], 2)]:
        job = launch.decide(LanguageModel, ["--eval_only", *argv])
        [done] = eval_only.evaluated(job)
        assert done.metrics == journal[at] and done.size["tok"] == 16 * done.size["samples"] > 0
    assert sorted(Path("runs").iterdir()) == before


def test_all_rows_of_another_text_are_evaluated(source: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """The mean over both splits by their sizes, whatever --max_samples of the run; and of the run's own, a warning."""
    def found(split: str, *argv: str) -> tuple[float, int, str]:
        job = launch.decide(LanguageModel, ["--eval_only", "--resume", "source", "--split", split, *argv])
        [done] = eval_only.evaluated(job)
        return done.metrics["eval/loss"], done.size["tok"], eval_only.report(job)

    Path("other.txt").write_text("".join(f"{i} and {i} is {2 * i}\n" for i in range(300)))
    other = ("--dataset", "other.txt", "--max_samples", "3")
    (valid, size, line), (loss, tokens, all_line) = (found(split, *other) for split in ("validation", "all"))
    assert line.endswith("/other.txt)") and "; all rows of the validation split of /" in line
    in_all = re.fullmatch(r"All: loss=.*; all rows of /.*/other.txt: (\d+) train, (\d+) validation\)", all_line)
    assert in_all and 16 * int(in_all[2]) == size and 16 * (int(in_all[1]) + int(in_all[2])) == tokens > 10 * size
    whole = launch.decide(LanguageModel, ["--eval_only", "--resume", "source", *other[:2]])
    stage = LanguageModel(replace(whole.cfg, precision="fp32"), Path())
    stage.prepare()
    model = stage.model()
    assert whole.evaluated
    whole.evaluated.load(stage, model)
    train = evaluate(stage, model, stage.dataset("train"), stage.cfg, torch.device("cpu"), lambda: False)
    assert train and loss == pytest.approx(
        (train.metrics["eval/loss"] * train.size["tok"] + valid * size) / tokens, rel=1e-5)
    assert not any("was trained on" in message for message in caplog.messages)
    found("all")
    assert any("was trained on some of the rows of" in message for message in caplog.messages)
    line = found("validation", "--eval_max_rows", "2")[2]
    assert re.search(r"\(2 samples, 32 tok; 2 of \d+ rows of the validation split of ", line)


def test_an_evaluation_is_refused_without_weights_or_data(source: RunDir) -> None:
    with pytest.raises(UserError, match="--eval_only: of which weights"):
        launch.decide(LanguageModel, ["--eval_only", "--dataset", "text.txt"])
    with pytest.raises(UserError, match="no such file"):
        launch.decide(LanguageModel, ["--eval_only", "--init_from", "source", "--dataset", "nowhere.txt"])
    with pytest.raises(UserError, match=r"--split test: the data have none \(.*text.txt gives train, validation\)"):
        eval_only.evaluated(launch.decide(LanguageModel, ["--eval_only", "--resume", "source", "--split", "test"]))


class WithTest(Regression):
    """The rows of the test split are those of the validation split."""

    def splits(self) -> tuple[str, ...]:
        return "train", "validation", "test"


def test_a_finished_run_logs_the_test_score_of_its_best_weights(tmp_path: Path, caplog: Any) -> None:
    """The last ones are not: they are spoilt after the best evaluation."""
    @torch.no_grad()
    def spoil(trainer: Trainer) -> None:
        if trainer.step == 8:
            next(trainer.model.parameters()).add_(1)

    callback = type("Spoil", (Callback,), {"on_step_end": lambda self, trainer: spoil(trainer)})()
    caplog.set_level("INFO")
    run = new_run(tmp_path, WithTest)
    with run.lock():
        toy_session(with_callbacks(WithTest, callback), run).train()
    told = [message for message in caplog.messages if message.startswith("  -> ") and "Saved" not in message]
    scores = [message.removeprefix("  -> Validation: ") for message in told[:-1]]
    best = min(row["eval/loss"] for row in Journal(run.metrics).rows() if "eval/loss" in row)
    assert told[-1].startswith(f"  -> Test: loss={best:.3f} ") and told[-1].removeprefix("  -> Test: ") in scores[:-1]
    assert any("Best model saved" in message for message in caplog.messages[:caplog.messages.index(told[-1])])


@pytest.mark.parametrize("target, best, line", [
    (1e6, ("eval/loss", "min"), r"loss=[\d.]+ on validation data of toy; the goal, loss below 1e\+06, is reached"),
    (1e-6, ("eval/loss", "min"), r".*; the goal, loss below 1e-06, is not reached"),
    (1e-6, ("eval/loss", "max"), r".*; the goal, loss above 1e-06, is reached"),
    (1e-6, ("again/loss", "max"), r"loss=[\d.]+ on .*; the goal, loss above 1e-06, is reached"),
    (None, ("eval/loss", "min"), None)])
def test_a_finished_run_says_whether_the_target_of_its_stage_was_met(
        tmp_path: Path, caplog: Any, target: float | None, best: tuple[str, str], line: str | None) -> None:
    caplog.set_level("INFO")

    def evaluations(self: Regression) -> list[Evaluation]:
        usual = Regression.evaluations(self)[0]
        return [usual, replace(usual, name="again")]

    aiming = type("Aiming", (Regression,), {"target": target, "best": best, "evaluations": evaluations})
    run = new_run(tmp_path, aiming)
    with run.lock():
        toy_session(aiming, run).train()
    told = [message for message in caplog.messages if "the goal" in message]
    assert len(told) == (line is not None) and (line is None or re.fullmatch(line, told[0]))
