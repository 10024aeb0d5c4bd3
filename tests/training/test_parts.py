"""Parts of a model: frozen or whole; where their weights come from and do not go."""

import copy
import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import toys
from composed import (
    LORA,
    Composed,
    Config,
    Judged,
    Model,
    Thinker,
    Tied,
    built,
    folder_of,
    last,
    resumed,
    resumed_as_uninterrupted,
    saved,
    thinker,
    trained,
)
from stoker.config import Parsed, UserError
from stoker.daemon.rundir import RunDir
from stoker.monitors.sanity import Sanity
from stoker.monitors.system import System
from stoker.training.assembly import launch
from stoker.training.assembly.job import Job
from stoker.training.core import incident, networks, optim, parts, pretrained, saver
from stoker.training.core.callback import Callback
from stoker.training.core.figures import Batch, Loss, Moment
from stoker.training.core.parts import Lora, Part
from stoker.training.core.snapshots import load_weights, pack
from stoker.training.trainer import Trainer
from toys import StopAt, assert_same, new_run, session, train

# -- frozen ---------------------------------------------------------------------------------------------------------


class ByHand(Composed):
    """The same without parts: the thinker's features are computed by torch functions from the file's tensors."""

    def parts(self) -> Sequence[Part]:
        return []

    def model(self) -> nn.Module:
        model = super().model()
        self.tensors = load_file(Path(self.cfg.thinker_ckpt) / "model.safetensors")
        model.thinker = nn.Identity()
        return model

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        w, x = self.tensors, batch["x"]
        first = F.linear(x, w["layers.0.weight"], w["layers.0.bias"]).tanh()
        second = F.linear(first, w["layers.1.weight"], w["layers.1.bias"])
        features = F.batch_norm(second, w["norm.running_mean"], w["norm.running_var"], w["norm.weight"],
                                w["norm.bias"])
        return Loss({"loss": (model.head(features) - x.flip(1)).square().mean(1).sum()})


def test_a_frozen_part_is_its_source_in_evaluation_mode_and_in_no_snapshot(tmp_path: Path, source: Path) -> None:
    run, other = new_run(tmp_path, Composed), new_run(tmp_path / "by hand", ByHand)
    trainer, ending = train(Composed, run, thinker_ckpt=str(source), ema_decay=0.9)
    by_hand, _ = train(ByHand, other, thinker_ckpt=str(source))
    assert ending.state == "finished"
    assert_same(trainer.model.thinker.state_dict(), thinker())
    assert_same(trainer.model.head.state_dict(), by_hand.model.head.state_dict())  # so no dropout, no statistics
    assert saved(run).keys() == {"head.weight", "head.bias"}
    state = torch.load(last(run) / "state.pt", weights_only=True)
    ema = next(entry for key, entry in state["callbacks"].items() if "EMA" in key)
    assert ema["state"]["average"].keys() == {"head.weight", "head.bias"}
    trainer.model.train()
    assert trainer.model.head.training and not any(module.training for module in trainer.model.thinker.modules())
    assert not any(p.requires_grad for p in trainer.model.thinker.parameters())


def test_a_snapshot_from_before_which_has_a_frozen_part_too_will_do(tmp_path: Path, source: Path) -> None:
    trainer, _ = train(Composed, new_run(tmp_path, Composed), thinker_ckpt=str(source))
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert {"thinker.norm.weight", "head.weight"} <= weights.keys()
    save_file(weights, tmp_path / "model.safetensors")
    trainer.model.head.weight.data.zero_()
    load_weights(tmp_path, trainer.model)
    assert_same(trainer.model.state_dict(), weights)
    weights["thinker.norm.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is of another model: thinker.norm.weight is "):
        load_weights(tmp_path, trainer.model)


def test_it_is_resumed_bit_for_bit(tmp_path: Path, source: Path) -> None:
    _, whole, halves = resumed_as_uninterrupted(Composed, tmp_path, source)
    assert_same(saved(halves), saved(whole))


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("hidden", [1450, pytest.param(5100, marks=pytest.mark.slow)])  # 8 MB, 104 MB
def test_a_frozen_part_costs_no_disk_and_no_copy(tmp_path: Path, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a head of 47 or 163 kB."""
    weights = thinker(hidden)
    frozen = sum(t.nbytes for t in weights.values())
    path, peaks = folder_of(tmp_path / "source", weights), []

    def measured(*given: Any) -> Any:
        tracemalloc.start()
        packed = pack(*given)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return packed

    monkeypatch.setattr(saver, "pack", measured)
    trainer, _ = train(Composed, run := new_run(tmp_path, Composed), hidden=hidden, thinker_ckpt=str(path), max_steps=2,
                       rows=8)
    head = sum(p.nbytes for p in trainer.model.head.parameters())
    assert 8e6 < frozen < 110e6 and 40 * head < frozen
    assert head < disk(last(run)) < 3 * head + 200_000 < frozen / 4  # weights, two moments, the rest
    assert head < max(peaks) < 8 * head + 200_000 < frozen / 4
    sitting = session(Composed, run, resume=True)
    with run.lock():
        sitting.prepare()
    estimate = json.loads(run.estimate.read_text())
    assert estimate["parameters"] * 4 == sum(p.nbytes for p in trainer.model.parameters())
    assert (estimate["parameters"] - estimate["frozen"]) * 4 == head
    assert estimate["frozen_bytes"] == sum(p.nbytes for p in trainer.model.thinker.parameters())


def test_what_a_run_with_frozen_weights_is_expected_to_need() -> None:
    from stoker.training.assembly.estimate import Estimate

    found = Estimate("cpu", 1000, 0, 0, 0, 0, 0, 0, 0, frozen=900, frozen_bytes=1800).memory(1)
    assert found == {"weights": 400 + 1800, "gradients": 400, "optimizer": 800, "activations": 0, "snapshot": 1200}


def test_only_what_is_saved_has_to_be_finite(tmp_path: Path, source: Path) -> None:
    trainer, _ = train(Composed, new_run(tmp_path, Composed), thinker_ckpt=str(source), max_steps=2)
    with torch.no_grad():
        trainer.model.thinker.layers[0].weight[0, 0] = torch.nan
    assert optim.all_finite(trainer.model, trainer.optimizers.values())
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = torch.nan
    assert not optim.all_finite(trainer.model, trainer.optimizers.values())


def plugged(trainer: Trainer, kind: type[Callback]) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def test_monitors_look_at_what_is_saved(tmp_path: Path, source: Path) -> None:
    """The scan for NaN, and the warning of a disk that has no room for a snapshot: weights and two moments."""
    trainer, _ = train(Composed, run := new_run(tmp_path, Composed), thinker_ckpt=str(source), max_steps=2)
    snapshot = 3 * sum(p.nbytes for p in trainer.model.head.parameters()) / 2**20
    for free, warned in ((2.5 * snapshot, False), (1.5 * snapshot, True)):
        trainer.timings["system/disk_free_mb"] = free
        plugged(trainer, System)._warn(trainer)
        assert ("a snapshot takes" in (run.alerts.read_text() if run.alerts.exists() else "")) == warned
    for module, stops in ((trainer.model.thinker.layers[0], False), (trainer.model.head, True)):
        with torch.no_grad():
            module.weight[0, 0] = torch.nan
        trainer.decisions._ending = None
        plugged(trainer, Sanity)._scan(trainer)
        assert (trainer.decisions._ending is not None) == stops


def test_an_incident_holds_what_a_snapshot_holds(tmp_path: Path, source: Path) -> None:
    trainer, _ = train(Composed, new_run(tmp_path, Composed), thinker_ckpt=str(source), max_steps=2)
    batch = {"x": torch.full((2, 8), torch.nan)}
    path = incident.write(tmp_path, incident.Incident(3, "", "batch x", "nan", [[0, 1]], []), trainer.model, [batch])
    assert load_file(path / "model.safetensors").keys() == {"head.weight", "head.bias"}
    assert incident.replay(path, trainer.stage, torch.device("cpu"), "fp32").where == "batch x"


def test_buffers_that_cannot_change_are_not_copied_in_each_step(source: Path) -> None:
    assert len(parts.changing_buffers(Model(8, 16))) == 3
    assert len(parts.changing_buffers(built(LORA, source))) == 3
    assert not parts.changing_buffers(built(Composed, source))


class Codebook(Thinker):
    """Has statistics of its own that are applied once a step."""

    applied = 0
    sums: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.sums = {"rows": torch.tensor(len(x))}
        return super().forward(x)

    def apply_sums(self, sums: dict[str, Tensor], dropped: Tensor) -> None:
        Codebook.applied += 1


class WithCodebook(Composed):
    def model(self) -> nn.Module:
        model = super().model()
        model.thinker = Codebook(self.cfg.width, self.cfg.hidden)
        return model


@pytest.mark.parametrize("how, applied", [({"train": "frozen"}, 0), ({"train": "whole"}, 2)])
def test_sums_of_a_frozen_part_are_not_applied(tmp_path: Path, source: Path, how: dict[str, Any], applied: int,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Codebook, "applied", 0)
    stage = type("WithCodebook", (WithCodebook,), {"how": how})
    train(stage, new_run(tmp_path, stage), thinker_ckpt=str(source), max_steps=2)
    assert Codebook.applied == applied


def test_a_copy_of_a_frozen_network_stays_as_it_is(source: Path) -> None:
    model = built(Composed, source)
    copied = copy.deepcopy(model)
    model.thinker.eval()
    assert copied.train().thinker is not model.thinker and not copied.thinker.dropout.training
    assert copied.thinker.train() is copied.thinker and copied.head.training


def test_a_new_frozen_part_is_in_the_snapshot(tmp_path: Path) -> None:
    """Nothing else has it."""
    trainer, _ = train(Composed, run := new_run(tmp_path, Composed), max_steps=2)
    assert_same({n: t for n, t in saved(run).items() if n.startswith("thinker")},
                {n: t for n, t in trainer.model.state_dict().items() if n.startswith("thinker")})
    assert not trainer.model.thinker.training


# -- the same weights, or none --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": Lora(2)}])
@pytest.mark.parametrize("change, why", [
    ("other", r"part thinker: .*source has other weights than before \(SHA-256 [0-9a-f]{8}\.\.\.\); bring back"),
    ("gone", r"part thinker: .*source is gone; bring back the weights with the SHA-256 [0-9a-f]{8}\.\.\.")])
def test_a_run_is_resumed_with_the_same_content_only(tmp_path: Path, source: Path, change: str, why: str,
                                                     how: dict[str, Any]) -> None:
    stage = trained(**how)
    train(toys.with_callbacks(stage, StopAt(4)), run := new_run(tmp_path, stage), thinker_ckpt=str(source))
    before = sorted(path.name for path in run.snapshots.iterdir())
    if change == "gone":
        shutil.rmtree(source)
    else:
        weights = thinker()
        weights["layers.0.weight"][0, 0] += 1e-3
        folder_of(source, weights)
    sitting = session(stage, run, resume=True)
    with run.lock(), pytest.raises(UserError, match=why) as refusal:
        sitting.prepare()
    assert len(refusal.value.problems) == 1 and "\n" not in str(refusal.value) and not sitting.begun.is_set()
    assert sorted(path.name for path in run.snapshots.iterdir()) == before


def test_the_refusal_ends_in_exit_code_2(tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.logs, "to_console", lambda: None)
    train(toys.with_callbacks(Composed, StopAt(4)), run := new_run(tmp_path, Composed), thinker_ckpt=str(source))
    shutil.rmtree(source)
    values = json.loads(run.config_file.read_text())
    before = run.status()
    code = launch.start(Job(Composed, Parsed(Config(**values), frozenset(values), ""), run))
    assert code == 2 and run.status().state == before.state
    assert "part thinker" in capfd.readouterr().err.splitlines()[-1]


def test_the_same_content_elsewhere_will_do(tmp_path: Path, source: Path) -> None:
    train(toys.with_callbacks(Composed, StopAt(4)), run := new_run(tmp_path, Composed), thinker_ckpt=str(source))
    source.rename(tmp_path / "moved")
    assert resumed(Composed, run, thinker_ckpt=str(tmp_path / "moved")).step == 9


def resume(run: RunDir, *argv: str, stage: type[Composed] = Composed) -> Job:
    return launch.decide(stage, ["--resume", str(run.path), "--yes", *argv])


def test_a_resumed_run_may_name_another_place_of_the_same_content(tmp_path: Path, source: Path) -> None:
    train(toys.with_callbacks(Composed, StopAt(4)), run := new_run(tmp_path, Composed), thinker_ckpt=str(source))
    source.rename(moved := tmp_path / "moved")
    job = resume(run, "--thinker_ckpt", str(moved))
    assert job.cfg.thinker_ckpt == str(moved)
    assert resumed(toys.with_callbacks(Composed, StopAt(6)), run, thinker_ckpt=job.cfg.thinker_ckpt).step == 6
    assert resumed(Composed, run).step == 9, "it is remembered"


def test_other_content_that_is_named_is_refused_though_the_right_one_is_there(tmp_path: Path, source: Path) -> None:
    train(toys.with_callbacks(Composed, StopAt(4)), run := new_run(tmp_path, Composed), thinker_ckpt=str(source))
    other = folder_of(tmp_path / "other", {name: t + 1 for name, t in thinker().items()})
    for named, why in ((other, "other has other weights than before"), (tmp_path / "gone", "gone: not found")):
        options = {"thinker_ckpt": resume(run, "--thinker_ckpt", str(named)).cfg.thinker_ckpt}
        with run.lock(), pytest.raises(UserError, match=f"part thinker: .*{why}") as refusal:
            session(Composed, run, resume=True, **options).prepare()
        assert len(refusal.value.problems) == 1


def test_a_source_that_a_resume_does_not_read_may_not_be_named(tmp_path: Path, source: Path) -> None:
    """Weights that were new, or are trained whole and so in the snapshot."""
    whole = trained(train="whole")
    train(toys.with_callbacks(whole, StopAt(4)), of_whole := new_run(tmp_path / "1", whole), thinker_ckpt=str(source))
    train(toys.with_callbacks(Composed, StopAt(4)), of_new := new_run(tmp_path / "2", Composed))
    shutil.copytree(source, moved := tmp_path / "moved")
    for run, stage in ((of_whole, whole), (of_new, Composed)):
        with pytest.raises(UserError, match="--thinker_ckpt .*moved differs from the .*: that would be another run"):
            resume(run, "--thinker_ckpt", str(moved), stage=stage)
    with pytest.raises(UserError, match="--width 9 differs from the 8"):
        resume(of_new, "--width", "9")


def test_a_part_that_needs_a_source_names_its_option(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="^part thinker needs trained weights: name a run, a snapshot or a model folder "
                                        "with --thinker_ckpt$"):
        launch.decide(LORA, [])
    train(LORA, run := new_run(tmp_path, LORA), thinker_ckpt=str(source))
    with pytest.raises(UserError, match=f"with --thinker_ckpt; --init_from {run.path} was trained with those of "
                                        f"{source}$"):
        launch.decide(LORA, ["--init_from", str(run.path)])


def test_its_hash_stands_in_snapshot_and_receipt(tmp_path: Path, source: Path) -> None:
    train(toys.with_callbacks(Composed, StopAt(4)), run := new_run(tmp_path, Composed), thinker_ckpt=str(source))

    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    noted = json.loads((last(run) / "manifest.json").read_text())["made_by"]["parts"]["thinker"]
    assert (noted["path"], noted["sha256"]) == (str(source), digest)
    source.rename(tmp_path / "moved")
    trainer = resumed(Composed, run, thinker_ckpt=str(tmp_path / "moved"))
    changed = next(c for c in trainer.callbacks if type(c).__name__ == "Repetition").changed
    assert f"parts.thinker.path: {source} -> {tmp_path / 'moved'}" in changed


def test_weights_trained_whole_are_in_the_snapshot_and_need_no_source(tmp_path: Path, source: Path) -> None:
    stage = trained(train="whole")
    expected = train(stage, new_run(tmp_path / "1", stage), thinker_ckpt=str(source))[0]
    train(toys.with_callbacks(stage, StopAt(4)), run := new_run(tmp_path / "2", stage), thinker_ckpt=str(source))
    first = load_file(run.snapshots / "snapshot_step_00000000" / "model.safetensors")
    assert_same({n.removeprefix("thinker."): t for n, t in first.items() if n.startswith("thinker.")}, thinker())
    shutil.rmtree(source)
    found = resumed(stage, run)
    assert_same(found.model.state_dict(), expected.model.state_dict())
    assert not torch.equal(found.model.thinker.layers[0].weight, thinker()["layers.0.weight"])


def test_names_are_looked_at_before_a_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="part thinker: .*nowhere: not found"):
        launch.decide(Composed, ["--thinker_ckpt", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="part thinker needs trained weights"):
        launch.decide(LORA, [])


# -- which weights of a source --------------------------------------------------------------------------------------


def test_a_part_out_of_a_bigger_model(tmp_path: Path) -> None:
    weights = {f"model.text.{name}": t for name, t in thinker().items()} | {"model.talker.weight": torch.ones(3)}
    model = built(trained(train="frozen", prefix="model.text."), folder_of(tmp_path / "big", weights))
    assert_same(model.thinker.state_dict(), thinker())


def test_a_part_out_of_several_files(tmp_path: Path, source: Path) -> None:
    weights = thinker()
    rest = {name: weights.pop(name) for name in list(weights)[:2]}
    folder_of(source, weights)
    save_file(rest, source / "more.safetensors")
    assert_same(built(Composed, source).thinker.state_dict(), thinker())


def test_a_part_out_of_a_snapshot(tmp_path: Path, source: Path) -> None:
    stage = trained(train="whole")
    trainer, _ = train(stage, run := new_run(tmp_path, stage), thinker_ckpt=str(source))
    model = built(trained(train="frozen", prefix="thinker."), last(run))
    assert_same(model.thinker.state_dict(), trainer.model.thinker.state_dict())


@pytest.mark.parametrize("change, why", [
    (lambda w: w.pop("norm.weight"), r"norm.weight is missing there and \(16,\) here"),
    (lambda w: w.update(more=torch.ones(2)), r"more is \(2,\) there and missing here"),
    (lambda w: w.update({"norm.bias": torch.ones(1)}), r"norm.bias is \(1,\) there and \(16,\) here"),
    (lambda w: w["norm.weight"].fill_(torch.inf), "1 of its 9 tensors hold NaN or infinity, the first is norm.weight")])
def test_weights_that_do_not_fit_are_refused(source: Path, change: Any, why: str) -> None:
    weights = thinker()
    change(weights)
    folder_of(source, weights)
    with pytest.raises(UserError, match=f"part thinker: .*{why}"):
        built(Composed, source)


def test_a_source_that_changes_during_a_start_is_refused(source: Path) -> None:
    """Its hash would stand for other weights."""
    made = Composed(Config(thinker_ckpt=str(source)), Path())
    pretrained.resolve_parts(made)
    folder_of(source, {name: t + 1 for name, t in thinker().items()})
    with pytest.raises(UserError, match="source were changed after this start had read them"):
        networks.build(made, "cpu")


def test_a_file_that_is_none_is_refused(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="part thinker: the weights of .* cannot be read"):
        built(Composed, source)


def test_a_language_model_s_folder_is_read_by_its_stage(tmp_path: Path) -> None:
    """Its file has the names and the transposed matrices of GPT-2; the shape comes from there too."""
    from stoker.model.gpt import GPT
    from stoker.model.huggingface import gpt2_config, gpt2_weights

    torch.manual_seed(1)
    gpt = GPT(64, d_model=8, num_heads=2, num_layers=1, d_ff=16, max_seq_len=12, dropout=0.0)
    folder = folder_of(tmp_path / "gpt", gpt2_weights(gpt))
    (folder / "config.json").write_text(json.dumps(gpt2_config(gpt, 0)))
    pretrained.note(folder, "lm", 3, {"tokenizer": "bytes"}, {})

    class Reading(Composed):
        how = {"train": "frozen", "stages": ("lm",), "dtype": "bf16"}

        def model(self) -> nn.Module:
            model = super().model()
            sizes = self.sources["thinker"].options
            model.thinker = GPT(64, dropout=0.0, **{name: sizes[name] for name in
                                                    ("d_model", "num_heads", "num_layers", "d_ff", "max_seq_len")})
            return model

    model = built(Reading, folder)
    assert_same(model.thinker.state_dict(), {name: t.bfloat16() for name, t in gpt.state_dict().items()})
    assert model.head.weight.dtype == torch.float32
    with pytest.raises(UserError, match="is of stage lm, it takes weights of ocr"):
        built(trained(train="frozen", stages=("ocr",)), folder)


class OnMeta(Composed):
    def model(self) -> nn.Module:
        model = super().model()
        with torch.device("meta"):
            model.thinker = Tied()
        return model


@pytest.mark.parametrize("train", ["frozen", "whole"])
def test_a_network_on_the_meta_device_comes_into_being(tmp_path: Path, train: str) -> None:
    weights = {"embedding.weight": torch.rand(6, 4, dtype=torch.float64), "table": torch.rand(2)}
    stage = type("OnMeta", (OnMeta,), {"how": {"train": train}})
    path = folder_of(tmp_path / "tied", weights)
    model = built(stage, path)
    assert model.thinker.head.weight is model.thinker.embedding.weight
    assert_same(model.thinker.head.weight.detach(), weights["embedding.weight"].float())
    assert_same(model.thinker.table, weights["table"])
    assert model.thinker.head.weight.requires_grad == (train == "whole")
    assert isinstance(model.thinker.head.weight, nn.Parameter)
    with open(path / "model.safetensors", "r+b") as file:  # what becomes of the file later does not matter
        file.seek(-8, 2)
        file.write(bytes(8))
    assert not load_file(path / "model.safetensors")["table"].any() and model.thinker.table.all()


def test_the_random_numbers_are_those_of_a_run_without_a_source(source: Path, judge: Path) -> None:
    torch.manual_seed(0)
    built(Judged, source, judge_ckpt=str(judge))
    after = torch.rand(1)
    torch.manual_seed(0)
    Model(8, 16)
    assert torch.equal(after, torch.rand(1))
