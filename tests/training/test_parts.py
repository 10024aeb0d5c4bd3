"""Parts of a model: frozen, by adapters, whole, for evaluation alone; where their weights come from and do not go."""

import copy
import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import toys
from stoker.config import Parsed, UserError, opt
from stoker.daemon.rundir import RunDir
from stoker.monitors.sanity import Sanity
from stoker.monitors.system import System
from stoker.training.assembly import eval_only, launch
from stoker.training.assembly.job import Job
from stoker.training.core import adapters, incident, networks, optim, parts, pretrained, saver
from stoker.training.core.callback import Callback
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.parts import Lora, Part
from stoker.training.core.snapshots import Snapshots, pack
from stoker.training.core.stage import Stage
from stoker.training.trainer import Trainer
from toys import Layer, StopAt, Toy, assert_same, new_run, session, train


@dataclass
class Config(toys.Config):
    """Toys with a part"""

    hidden: int = opt(16, "size of the thinker")
    thinker_ckpt: str = opt("", "the thinker's weights", path=())
    judge_ckpt: str = opt("", "the judge's weights", path=())


class Thinker(nn.Module):
    """Two layers with dropout between them and batch norm after them: both differ between training and evaluation."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, hidden), Layer(hidden, hidden)])
        self.norm, self.dropout = nn.BatchNorm1d(hidden), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers[1](self.dropout(self.layers[0](x).tanh())))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.thinker, self.head = Thinker(width, hidden), Layer(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.thinker(x))  # type: ignore[no-any-return]


class Composed(Toy):
    """A head on a thinker."""

    name = "composed"
    Config = Config
    how: dict[str, Any] = {"train": "frozen"}

    def parts(self) -> Sequence[Part]:
        return [Part("thinker", self.cfg.thinker_ckpt, **self.how)]

    def model(self) -> nn.Module:
        return Model(self.cfg.width, self.cfg.hidden)

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        error = (model(batch["x"]) - batch["x"].flip(1)).square().mean(1)
        return Loss({"loss": error.sum()})

    def export(self, model: nn.Module, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in parts.exported(self.parts(), model).items()},
                  folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    def load(self, model: nn.Module, folder: Path) -> None:
        from stoker.model import weights

        weights.load(model, folder, but=parts.referenced(self.parts(), model))

    @classmethod
    def taken_from(cls, pretrained: Any) -> dict[str, Any]:
        return {"hidden": pretrained.options["hidden"], "width": pretrained.options["width"]}


def trained(**how: Any) -> type[Composed]:
    return type("Composed", (Composed,), {"how": how})


LORA = trained(train=Lora(rank=2, alpha=6.0))


class Judged(Composed):
    """Scored by a network outside of the model."""

    name = "judged"

    def parts(self) -> Sequence[Part]:
        cfg = self.cfg
        judge = Part("judge", cfg.judge_ckpt, use="evaluation", build=lambda: Layer(cfg.width, 1))
        return [*super().parts(), judge] if cfg.judge_ckpt else super().parts()

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        figures = super().score(model, batch)
        if judge := self.judges.get("judge"):
            figures["opinion"] = Ratio(judge(batch["x"]).sum(), len(batch["x"]))
        return figures


def folder_of(path: Path, weights: dict[str, Tensor]) -> Path:
    """A model folder of another program."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def thinker(hidden: int = 16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    found = Thinker(8, hidden).state_dict()
    return {name: torch.rand(t.shape, generator=draw) if t.is_floating_point() else t + 7 for name, t in found.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "source", thinker())


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "judge", {"weight": torch.arange(8.0)[None], "bias": torch.tensor([0.5])})


def resumed(stage: type[Stage], run: RunDir, **options: Any) -> Trainer:
    return train(stage, run, resume=True, **options)[0]


def last(run: RunDir) -> Path:
    return Snapshots(run.snapshots, {}).found()[-1]


def saved(run: RunDir) -> dict[str, Tensor]:
    return load_file(last(run) / "model.safetensors")


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


def test_it_is_resumed_bit_for_bit(tmp_path: Path, source: Path) -> None:
    whole, halves = new_run(tmp_path / "1", Composed), new_run(tmp_path / "2", Composed)
    expected = train(Composed, whole, thinker_ckpt=str(source))[0]
    train(toys.with_callbacks(Composed, StopAt(5)), halves, thinker_ckpt=str(source))
    found = resumed(Composed, halves)
    assert_same(found.model.state_dict(), expected.model.state_dict())
    assert (halves.metrics).read_text() == whole.metrics.read_text()
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

    def clear_sums(self) -> None:
        pass

    def apply_sums(self, dropped: Tensor) -> None:
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
    with pytest.raises(UserError, match="part thinker: .*nowhere is gone, or was never there"):
        launch.decide(Composed, ["--thinker_ckpt", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="part thinker needs trained weights"):
        launch.decide(LORA, [])


# -- which weights of a source --------------------------------------------------------------------------------------


def built(stage: type[Composed], source: Path | str, **options: Any) -> Any:
    made = stage(Config(**{"thinker_ckpt": str(source), **options}), Path())
    pretrained.resolve_parts(made)
    return networks.build(made, "cpu")


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
        how = {"train": "frozen", "stage": "lm", "dtype": "bf16"}

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
        built(trained(train="frozen", stage="ocr"), folder)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.zeros(2))


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


# -- adapters -------------------------------------------------------------------------------------------------------


def test_adapters_are_trained_beside_a_frozen_base(tmp_path: Path, source: Path) -> None:
    whole, halves = new_run(tmp_path / "1", LORA), new_run(tmp_path / "2", LORA)
    expected = train(LORA, whole, thinker_ckpt=str(source))[0]
    train(toys.with_callbacks(LORA, StopAt(5)), halves, thinker_ckpt=str(source))
    found = resumed(LORA, halves)
    assert_same(found.model.state_dict(), expected.model.state_dict())
    assert halves.metrics.read_text() == whole.metrics.read_text()
    lora = {f"thinker.layers.{i}.lora_{kind}" for i in (0, 1) for kind in "ab"}
    statistics = {f"thinker.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert saved(whole).keys() == lora | statistics | {"head.weight", "head.bias"}
    base = {name: t for name, t in expected.model.thinker.state_dict().items() if "lora" not in name}
    assert base.keys() == thinker().keys()  # as they were called before
    assert_same({n: t for n, t in base.items() if "norm" not in n or n.endswith(("weight", "bias"))},
                {n: t for n, t in thinker().items() if "norm" not in n or n.endswith(("weight", "bias"))})
    assert all(saved(whole)[name].abs().sum() > 0 for name in lora)


def test_the_first_forward_is_that_of_the_base(source: Path) -> None:
    model, base = built(LORA, source), Thinker(8, 16)
    base.load_state_dict(thinker())
    x = torch.randn(5, 8)
    assert torch.equal(model.thinker.eval()(x), base.eval()(x))


def test_what_an_adapter_computes_and_what_is_merged(source: Path) -> None:
    """Against W x + alpha / rank * B A x (Hu et al. 2021, section 4.1), in float64 by numpy."""
    model = built(LORA, source)
    layer = model.thinker.layers[1]
    for index in (0, 1):
        nn.init.normal_(model.thinker.layers[index].lora_b)
    x = torch.randn(5, 16)
    w, bias, a, b = (t.detach().double().numpy() for t in (layer.weight, layer.bias, layer.lora_a, layer.lora_b))
    expected = x.double().numpy() @ (w + 6.0 / 2 * b @ a).T + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    model.eval()
    x, before = torch.randn(5, 8), model.state_dict()
    unmerged, held = model(x), {name: t.clone() for name, t in before.items()}
    stage = LORA(Config(thinker_ckpt=str(source)), Path())
    with networks.merged(stage, model):
        assert model.state_dict().keys() == Model(8, 16).state_dict().keys()
        plain = Model(8, 16).eval()
        plain.load_state_dict(model.state_dict())
        assert not any(isinstance(module, adapters.Adapted) for module in model.modules())
    torch.testing.assert_close(plain(x), unmerged, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(x), built(Composed, source).eval()(x), atol=1e-2)
    assert_same(model.state_dict(), held)
    assert torch.equal(model(x), unmerged) and model.thinker.layers[0].lora_a.requires_grad


def test_a_base_of_bf16_has_adapters_of_fp32(source: Path) -> None:
    class Narrow(Composed):
        how = {"train": Lora(2, layers=("layers.0",)), "dtype": "bf16"}

    model = built(Narrow, source)
    first = model.thinker.layers[0]
    assert (first.weight.dtype, first.lora_a.dtype) == (torch.bfloat16, torch.float32)
    first(torch.randn(3, 8, dtype=torch.bfloat16)).sum().backward()
    assert first.lora_b.grad.abs().sum() > 0 and first.weight.grad is None
    assert not hasattr(model.thinker.layers[1], "lora_a")


def test_where_adapters_cannot_work_they_are_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="part thinker: no linear layer fits nothing.*"):
        built(trained(train=Lora(layers=("nothing.*",))), source)
    with pytest.raises(UserError, match="head shares its weight with another layer"):
        adapters.add(Tied(), Lora(), "thinker")
    with pytest.raises(UserError, match="torch uses the weight of out_proj without calling the layer"):
        adapters.add(nn.MultiheadAttention(4, 2), Lora(), "thinker")
    with pytest.raises(ValueError, match="export it as a copy"):
        Part("thinker", export="reference")


def test_a_layer_used_twice_gets_one_adapter() -> None:
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, layer)
    adapters.add(network, Lora(2), "part")
    assert len(list(network.parameters())) == 4 and network[0] is network[1]


def test_a_compiled_layer_has_its_adapter(source: Path) -> None:
    network = nn.Sequential(Layer(8, 8))
    adapters.add(network, Lora(2), "part")
    nn.init.normal_(network[0].lora_b)
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(network, backend="eager")(x), network(x))


# -- judges ---------------------------------------------------------------------------------------------------------


def test_a_judge_is_for_evaluation_alone(tmp_path: Path, source: Path, judge: Path) -> None:
    run, other = new_run(tmp_path / "1", Judged), new_run(tmp_path / "2", Judged)
    trainer, _ = train(Judged, run, thinker_ckpt=str(source), judge_ckpt=str(judge))
    without, _ = train(Judged, other, thinker_ckpt=str(source))
    assert_same(saved(run), saved(other))
    assert_same(trainer.model.state_dict(), without.model.state_dict())
    rows = torch.stack([toys.Points(7, 8, 1000)[i] for i in range(7)]).double()
    expected = float((rows @ torch.arange(8.0).double() + 0.5).mean())
    found = [json.loads(line).get("eval/opinion") for line in run.metrics.read_text().splitlines()]
    assert [value for value in found if value] == pytest.approx([expected] * len([v for v in found if v]), rel=1e-5)
    assert not any(p.requires_grad for p in trainer.stage.judges["judge"].parameters())
    assert not trainer.stage.judges["judge"].training


def test_weights_alone_are_evaluated_with_their_parts_and_the_judge(tmp_path: Path, source: Path, judge: Path) -> None:
    run = new_run(tmp_path, Judged)
    trainer, _ = train(Judged, run, thinker_ckpt=str(source), judge_ckpt=str(judge))
    weights = pretrained.find(str(last(run)))
    [done] = eval_only.evaluated(Job(Judged, Parsed(trainer.cfg, frozenset(), ""), evaluated=weights))
    journal = json.loads(run.metrics.read_text().splitlines()[-1])
    assert done.metrics == {name: journal[name] for name in done.metrics} and "eval/opinion" in done.metrics


def test_another_judge_is_refused(tmp_path: Path, source: Path, judge: Path) -> None:
    stage = toys.with_callbacks(Judged, StopAt(4))
    train(stage, run := new_run(tmp_path, Judged), thinker_ckpt=str(source), judge_ckpt=str(judge))
    folder_of(judge, {"weight": torch.ones(1, 8), "bias": torch.tensor([0.5])})
    with run.lock(), pytest.raises(UserError, match="part judge: .* has other weights than before"):
        session(Judged, run, resume=True).prepare()


# -- model folders --------------------------------------------------------------------------------------------------


def finished(stage: type[Stage], run: RunDir, **options: Any) -> None:
    sitting = session(stage, run, **options)
    with run.lock():
        assert sitting.train().state == "finished"


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": Lora(2)}, {"train": "whole"}])
def test_a_model_folder_with_a_copy_needs_no_source(tmp_path: Path, source: Path, how: dict[str, Any]) -> None:
    stage = trained(**how)
    finished(stage, run := new_run(tmp_path, stage), thinker_ckpt=str(source), eval_interval=3)
    snapshot_of = pretrained.opened(pretrained.find(str(last(run))), stage, "cpu")[1]
    shutil.rmtree(source)
    made, model = pretrained.opened(pretrained.find(str(run.models / "final")), stage, "cpu")
    assert not any("lora" in name for name in model.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), snapshot_of(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": Lora(2)}])
def test_a_model_folder_with_a_reference(tmp_path: Path, source: Path, how: dict[str, Any]) -> None:
    stage = trained(**how, export="reference")
    finished(stage, run := new_run(tmp_path, stage), thinker_ckpt=str(source))
    final = run.models / "final"
    noted = json.loads((final / "stoker.json").read_text())["parts"]["thinker"]
    assert (noted["path"], len(noted["sha256"])) == (str(source), 64)
    assert not any(name.startswith("thinker.layers.0.w") for name in load_file(final / "model.safetensors"))
    x = torch.randn(5, 8)
    expected = pretrained.opened(pretrained.find(str(last(run))), stage, "cpu")[1](x)
    assert torch.equal(pretrained.opened(pretrained.find(str(final)), stage, "cpu")[1](x), expected)
    weights = thinker()
    weights["norm.bias"] += 1
    folder_of(source, weights)
    with pytest.raises(UserError, match="part thinker: .* has other weights than before"):
        pretrained.opened(pretrained.find(str(final)), stage, "cpu")


def test_weights_trained_beside_another_part_do_not_begin_a_run(tmp_path: Path, source: Path) -> None:
    finished(LORA, run := new_run(tmp_path / "1", LORA), thinker_ckpt=str(source))
    more = train(LORA, new_run(tmp_path / "2", LORA), snapshot=last(run), thinker_ckpt=str(source), max_steps=1)[0]
    assert more.step == 1
    weights = thinker()
    weights["norm.bias"] += 1
    other = folder_of(tmp_path / "other", weights)
    with pytest.raises(UserError, match="was trained with other weights of part thinker than"):
        train(LORA, new_run(tmp_path / "3", LORA), snapshot=last(run), thinker_ckpt=str(other))
    whole = trained(train="whole")
    with pytest.raises(UserError, match="was trained with other weights of part thinker than"):
        train(whole, new_run(tmp_path / "5", whole), snapshot=last(run), thinker_ckpt=str(other))
    with pytest.raises(UserError, match="holds part thinker with its adapters merged"):
        train(LORA, new_run(tmp_path / "4", LORA), init_from=str(run.models / "final"), thinker_ckpt=str(source))
