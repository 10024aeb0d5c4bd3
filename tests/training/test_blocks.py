"""What compiling, checkpointing and precision do to a model, beside giving the same mathematics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.model.gpt import GPT
from stoker.training.core import blocks, optim
from stoker.training.core import device as devices
from stoker.training.core.figures import Batch, Loss, Moment
from toys import Buffers, Regression, StopAt, assert_same, new_run, session, train, with_callbacks

# what torch imports to compile warns of torch's own age
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def gpt(dropout: float = 0.2) -> GPT:
    torch.manual_seed(0)
    return GPT(64, d_model=32, num_heads=2, num_layers=3, d_ff=64, max_seq_len=16, dropout=dropout)


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(64, (4, 16))
    model(tokens, tokens.roll(-1, 1)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept(model: GPT) -> int:
    """Bytes that autograd keeps for the backward pass, those of the weights left out."""
    weights, found = {p.data_ptr() for p in model.parameters()}, 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal found
        found += tensor.nbytes if tensor.data_ptr() not in weights else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients(model)
    return found


def test_checkpointing_keeps_less_and_changes_no_bit() -> None:
    """With dropout: the same numbers are drawn the second time."""
    plain, saving = gpt(), gpt()
    blocks.checkpoint_blocks(list(saving.blocks))
    assert_same(gradients(plain), gradients(saving))
    assert plain.state_dict().keys() == saving.state_dict().keys()
    assert kept(saving) < 0.5 * kept(plain)


def test_without_blocks_there_is_nothing_to_checkpoint(tmp_path: Path) -> None:
    class Whole(Regression):
        def blocks(self, model: nn.Module) -> list[nn.Module]:
            return []

    with pytest.raises(UserError, match="no repeated blocks"):
        train(Whole, new_run(tmp_path, Whole), gradient_checkpointing=True)


def test_compiled_blocks_are_graphs_and_give_the_same(tmp_path: Path) -> None:
    plain, compiled = gpt(dropout=0.0), gpt(dropout=0.0)
    blocks.compile_blocks(list(compiled.blocks))
    counters.clear()
    theirs, ours = gradients(plain), gradients(compiled)
    assert counters["stats"]["unique_graphs"] == 1  # one for all three blocks
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)


def test_a_compiled_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    trainer, _ = train(with_callbacks(Buffers, StopAt(-1)), whole, compile=True)
    train(with_callbacks(Buffers, StopAt(5)), run, compile=True)
    torch._dynamo.reset()  # as in a new process
    counters.clear()
    resumed, _ = train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    assert trainer.cfg.compile and resumed.cfg.compile and counters["stats"]["unique_graphs"]
    assert_same(trainer.model.state_dict(), resumed.model.state_dict())
    assert list(Journal(whole.metrics).rows()) == list(Journal(run.metrics).rows())


def test_without_a_compiler_a_run_trains_uncompiled_and_says_so(tmp_path: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "force_disable_caches": True}):
        trainer, ending = train(Regression, new_run(tmp_path, Regression), compile=True)
    assert ending.state == "finished" and trainer.cfg.compile is False
    assert any(line.startswith("torch.compile does not work here") and line.endswith(", so it is not used")
               for line in caplog.messages)


class Seen(Regression):
    """Notes the type that its layers compute in."""

    kinds: set[torch.dtype] = set()

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        self.kinds.add(model[0](batch["x"]).dtype)
        return super().loss(model, batch, moment)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_what_the_layers_compute_in(tmp_path: Path, precision: str) -> None:
    stage = type("Seen", (Seen,), {"kinds": set()})
    trainer, _ = train(stage, run := new_run(tmp_path, stage), precision=precision, max_steps=30)
    assert stage.kinds == {devices.DTYPES[precision]}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    losses = [row["train/loss"] for row in Journal(run.metrics).rows()]
    assert losses[-1] < 0.9 * losses[0]
    assert any("health/loss_scale" in row for row in Journal(run.metrics).rows()) == (precision == "fp16")


def test_no_amp_is_fp32_where_auto_would_be_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "resolve_precision", lambda device, asked: "bf16" if asked == "auto" else asked)
    for amp, expected in ((True, "bf16"), (False, "fp32")):
        sitting = session(Regression, new_run(tmp_path, Regression), amp=amp)
        with sitting.run.lock():
            assert sitting.prepare()[0].cfg.precision == expected


def test_an_overflow_halves_the_scale_and_is_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = optim.LossScale.__init__
    monkeypatch.setattr(optim.LossScale, "__init__", lambda self, device: start(self, device, 2.0**22))
    run = new_run(tmp_path, Regression)
    train(Regression, run, precision="fp16", log_interval=1, max_steps=12, eval_interval=100)
    rows = list(Journal(run.metrics).rows())
    scales = [row["health/loss_scale"] for row in rows]
    assert scales[0] == 2.0**22 and scales[1] == 2.0**21 and scales[-1] == scales[-2] < 2.0**20
    assert all(row["health/dropped_share"] == 0 for row in rows)
    assert [row["health/overflow_share"] for row in rows] == [1.0 * (a < b) for a, b in zip(scales[1:], scales)] + [0]
    kinds = {row["kind"] for row in Journal(run.alerts).rows()}
    assert not kinds - {"slow", "waiting"}, "which come of whatever else this machine computes"
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_the_scale_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, run = new_run(tmp_path, Buffers), new_run(tmp_path, Buffers)
    trainer, _ = train(with_callbacks(Buffers, StopAt(-1)), whole, precision="fp16")
    train(with_callbacks(Buffers, StopAt(5)), run, precision="fp16")
    resumed, _ = train(with_callbacks(Buffers, StopAt(-1)), run, resume=True)
    assert_same(trainer.state_dict()["loss_scales"], resumed.state_dict()["loss_scales"])
    assert_same(trainer.model.state_dict(), resumed.model.state_dict())
    assert resumed.loss_scales["main"].value < 2.0**16  # it had moved
