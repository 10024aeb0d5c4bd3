"""Parts that are networks of transformers: what they compute, compared with the library's own loading of the folder."""

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toys
from composed import Composed, Config, last, resumed, resumed_as_uninterrupted, saved
from stoker import wheels
from stoker.config import UserError
from stoker.model.gpt import GPT
from stoker.model.huggingface import NAMES, gpt2_options
from stoker.training.core import from_transformers, networks, pretrained
from stoker.training.core.figures import Batch, Loss, Moment
from stoker.training.core.parts import Lora, Part
from toys import Layer, StopAt, assert_same, new_run, train

LORA = Lora(rank=2, alpha=6.0, layers=("*.q_proj", "*.up_proj"))


def library() -> Any:
    wheels.torchvision(), wheels.torchaudio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        import transformers

        return transformers


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with tied embeddings, dropout, and tables of angles that are in no file."""
    folder, lib = tmp_path_factory.mktemp("models") / "qwen3", library()
    torch.manual_seed(0)
    config = lib.Qwen3Config(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4,
                             num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.5,
                             tie_word_embeddings=True)
    lib.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, reference: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "qwen3"))


def by_the_library(folder: Path, kind: str = "AutoModelForCausalLM", **how: Any) -> Any:
    return getattr(library(), kind).from_pretrained(folder, **how).eval()


class Reading(nn.Module):
    def __init__(self, thinker: nn.Module, width: int):
        super().__init__()
        self.thinker, self.head = thinker, Layer(48, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 5).long().remainder(48)
        return self.head(self.thinker(tokens).logits.float().mean(1))  # type: ignore[no-any-return]


class Transformed(Composed):
    """A head on the logits of a language model of transformers."""

    name = "transformed"
    section = ""

    def model(self) -> nn.Module:
        source = self.sources["thinker"]
        described = source.options["config"][self.section] if self.section else None
        return Reading(from_transformers.build("AutoModelForCausalLM", source, described), self.cfg.width)

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        return Loss({"loss": (model(batch["x"]) - batch["x"]).square().mean(1).sum()})

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return []


def trained(**how: Any) -> type[Transformed]:
    return type("Transformed", (Transformed,), {"how": how})


def thinker_of(stage: type[Composed], folder: Path) -> Any:
    made = stage(Config(thinker_ckpt=str(folder)), Path())
    pretrained.resolve_parts(made)
    model: Any = networks.build(made, "cpu")
    return model.thinker


@pytest.mark.parametrize("dtype, theirs", [("", torch.float32), ("bf16", torch.bfloat16)])
def test_it_computes_what_the_library_computes(folder: Path, dtype: str, theirs: torch.dtype) -> None:
    """In training mode too, where the library's own would drop half of its attention."""
    thinker = thinker_of(trained(train="frozen", dtype=dtype), folder).train()
    expected = by_the_library(folder, dtype=theirs)
    tokens = torch.randint(48, (3, 11))
    assert_same(thinker(tokens).logits, expected(tokens).logits.detach())
    assert_same({n: t for n, t in thinker.named_buffers()}, {n: t for n, t in expected.named_buffers()})
    assert thinker.lm_head.weight is thinker.model.embed_tokens.weight and thinker.dtype == theirs
    assert not torch.equal(expected.train()(tokens).logits, thinker(tokens).logits)


@pytest.mark.parametrize("how", [{"train": "frozen"}, {"train": LORA}, {"train": "whole"}])
def test_it_is_trained_and_resumed_bit_for_bit(tmp_path: Path, folder: Path, how: dict[str, Any]) -> None:
    trainer, run, _ = resumed_as_uninterrupted(trained(**how), tmp_path, folder)
    head, names = {"head.weight", "head.bias"}, {name for name, _ in by_the_library(folder).named_parameters()}
    found = {name.removeprefix("thinker.") for name in saved(run).keys() - head}
    if how["train"] == LORA:
        assert found == {f"model.layers.{i}.{layer}.lora_{kind}" for i in (0, 1) for kind in "ab"
                         for layer in ("self_attn.q_proj", "mlp.up_proj")}
    else:
        assert found - {"lm_head.weight"} == (names if how["train"] == "whole" else set())
    unchanged = [torch.equal(t, trainer.model.thinker.state_dict()[name])
                 for name, t in by_the_library(folder).state_dict().items()]
    assert all(unchanged) == (how["train"] != "whole")


def test_weights_trained_whole_need_no_source(tmp_path: Path, folder: Path) -> None:
    """Not even for the shape of the network."""
    stage = trained(train="whole")
    expected = train(stage, new_run(tmp_path / "1", stage), thinker_ckpt=str(folder))[0]
    train(toys.with_callbacks(stage, StopAt(4)), run := new_run(tmp_path / "2", stage), thinker_ckpt=str(folder))
    shutil.rmtree(folder)
    assert_same(resumed(stage, run).model.state_dict(), expected.model.state_dict())


def test_adapters_are_low_rank_changes_of_its_weights(folder: Path) -> None:
    """Against the library's network with W + alpha / rank * B A in place of W (Hu et al. 2021, section 4.1)."""
    thinker, expected = thinker_of(trained(train=LORA), folder).eval(), by_the_library(folder)
    with torch.no_grad():
        for i in (0, 1):
            for name in (f"model.layers.{i}.self_attn.q_proj", f"model.layers.{i}.mlp.up_proj"):
                layer = thinker.get_submodule(name)
                layer.lora_b.normal_()
                expected.get_submodule(name).weight += 6.0 / 2 * layer.lora_b @ layer.lora_a
    tokens = torch.randint(48, (3, 11))
    torch.testing.assert_close(thinker(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in thinker.parameters() if p.requires_grad) == 2 * 2 * (16 + 16 + 16 + 24)


def test_a_part_of_a_bigger_checkpoint(tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = {f"thinker.{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    bigger = Path(shutil.copytree(folder, tmp_path / "omni"))
    save_file(weights | {"talker.weight": torch.ones(3)}, bigger / "model.safetensors")
    (bigger / "config.json").write_text(json.dumps({"model_type": "omni", "thinker_config": config}))
    stage = type("Omni", (trained(train="frozen", prefix="thinker."),), {"section": "thinker_config"})
    assert_same(thinker_of(stage, bigger).state_dict(), by_the_library(folder).state_dict())


def test_weights_are_held_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the network is that into which the file was read, and none of it is the file's."""
    lib, places = library(), set[int]()
    kind = lib.Qwen3ForCausalLM
    loads = kind.from_pretrained

    def noted(*args: Any, state_dict: dict[str, Tensor], **how: Any) -> Any:
        places.update(t.data_ptr() for t in state_dict.values())
        return loads(*args, state_dict=state_dict, **how)

    monkeypatch.setattr(kind, "from_pretrained", noted)
    thinker = thinker_of(trained(train="frozen"), folder)
    before = {name: t.clone() for name, t in thinker.state_dict().items()}
    assert {t.data_ptr() for t in thinker.state_dict().values()} == places and len(places) > 10
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert_same(thinker.state_dict(), before)


@pytest.mark.parametrize("change, why", [
    (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing there, and so are 1 in all"),
    (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \(3,\) there and \(16,\) here"),
    (lambda w: w["model.norm.weight"].fill_(torch.nan), "tensors hold NaN or infinity, the first is model.norm.we")])
def test_weights_that_do_not_fit_are_refused(folder: Path, change: Any, why: str) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"^part thinker: .*{why}"):
        thinker_of(trained(train="frozen"), folder)


def test_tensors_that_are_not_used_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"value_head.weight": torch.ones(3)}, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        thinker_of(trained(train="frozen"), folder)
    assert any("1 tensors are not used, the first is value_head.weight" in line for line in caplog.messages)


def test_a_network_that_the_library_does_not_know(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.json").write_text('{"model_type": "nobody_knows"}')
    with pytest.raises(UserError, match="transformers 5.* cannot build an AutoModelForCausalLM .*nobody_knows") as bad:
        thinker_of(trained(train="frozen"), folder)
    assert "\n" not in str(bad.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="the package transformers is not installed; install it"):
        thinker_of(trained(train="frozen"), folder)


def test_a_judge_of_transformers(tmp_path: Path, folder: Path) -> None:
    class Judged(Composed):
        def parts(self) -> Sequence[Part]:
            judge = Part("judge", self.cfg.judge_ckpt, use="evaluation", build=lambda: from_transformers.build(
                "AutoModel", self.sources["judge"]))
            return [*super().parts(), judge]

    train(Judged, run := new_run(tmp_path, Judged), judge_ckpt=str(folder), max_steps=2)
    made = Judged(Config(judge_ckpt=str(folder)), Path())
    pretrained.resolve_parts(made)
    networks.build(made, "cpu")
    tokens = torch.randint(48, (3, 11))
    assert_same(made.judges["judge"](tokens).last_hidden_state,
                by_the_library(folder, "AutoModel")(tokens).last_hidden_state.detach())
    noted = json.loads((last(run) / "manifest.json").read_text())["made_by"]["parts"]["judge"]
    assert noted["options"]["config"] == json.loads((folder / "config.json").read_text())


class Renamed(Composed):
    """Our own GPT on the meta device, filled from GPT-2's file by the table of names."""

    def parts(self) -> Sequence[Part]:
        return [Part("thinker", self.cfg.thinker_ckpt, prefix="transformer.", train="frozen", names=NAMES.to_ours)]

    def model(self) -> nn.Module:
        model = super().model()
        with torch.device("meta"):
            model.thinker = GPT(48, **gpt2_options(self.sources["thinker"].folder))
        return model


def test_a_network_of_ours_is_filled_by_a_table_of_names(tmp_path: Path) -> None:
    lib = library()
    torch.manual_seed(0)
    config = lib.GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                            eos_token_id=0)
    theirs = lib.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "gpt2")
    thinker, tokens = thinker_of(Renamed, tmp_path / "gpt2"), torch.randint(48, (3, 11))
    torch.testing.assert_close(thinker(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    save_file(weights | {"transformer.h.0.more": torch.ones(2)}, tmp_path / "gpt2" / "model.safetensors")
    with pytest.raises(UserError, match=r"^part thinker: h.0.more is \(2,\) there and has no counterpart here"):
        thinker_of(Renamed, tmp_path / "gpt2")
