"""The page of figures of a GPU: here of a CPU, with tiny models, so that nothing of it rots unseen."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stoker.daemon.rundir import PROJECT
from stoker.training.assembly.estimate import CPU_ATTENTION

sys.path.insert(0, str(PROJECT / "benchmarks"))
import gpu
import gpu_determinism
import gpu_page
import gpu_safety
import gpu_speed
import plain_gpt
import rig
from gpu_page import NOT_ON_A_CPU, Asked, Failed, Page, Section

sys.path.remove(str(PROJECT / "benchmarks"))

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn: this process has threads


def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    ran = subprocess.run([PROJECT / "benchmarks/gpu.sh", "--device", "cpu", "--quick", "--output", page],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *printed, last = ran.stdout.splitlines()
    assert last == str(page) and page.with_suffix(".log").exists()
    written = [line for line in page.read_text().splitlines() if line]
    assert written == [line for line in printed[:-1] if line], "what is printed is what is written"
    assert [line[3:] for line in written if line.startswith("## ")] == [section.title for section in gpu.SECTIONS]
    text = page.read_text()
    assert text.count(NOT_ON_A_CPU) == 4, "CUDA graphs of two stages, the data sheet, the alerts"
    assert text.count("not measured with --quick") == 3 and text.count("resumed: the same bits") == 1
    assert text.count("deterministic algorithms only: the same bits") == 3 and text.count(", skipped the row") == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written if line.startswith("| nano")]
    eager = [row for row in rows if row[1] == "eager"]
    assert len(eager) == 3 and all(row[6] == row[8] == "-" for row in eager), "no figure of a GPU"
    assert all(float(row[2].replace(",", "")) > 0 and row[5].endswith("%") for row in eager)


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu.machine, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as refused:
        gpu.main()
    assert refused.value.code == 2 and "--device cpu tries this script out" in capsys.readouterr().err


# -- sections -------------------------------------------------------------------------------------------------------


def fine(asked: Asked) -> Iterator[str]:
    yield "a figure"


def wrong(asked: Asked) -> Iterator[str]:
    yield "before it"
    raise Failed("other bits")


def broken(asked: Asked) -> Iterator[str]:
    yield "before it"
    raise RuntimeError("first line\nsecond line")


def crashed(asked: Asked) -> Iterator[str]:
    yield "before it"
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(asked: Asked) -> Iterator[str]:
    child = subprocess.Popen(["sleep", "1000"])
    yield f"child {child.pid}"
    time.sleep(1000)


@forks
def test_a_section_that_fails_loses_no_other(tmp_path: Path) -> None:
    limits = {fine: 30.0, wrong: 30.0, broken: 30.0, crashed: 30.0, hanging: 2.0 / gpu_page.SLOWER}
    sections = [Section(measure.__name__, measure, seconds) for measure, seconds in limits.items()]
    page = Page(tmp_path / "page.md")
    (tmp_path / "work").mkdir()
    failed = page.write([*sections, Section("fine again", fine, 30)], Asked("cpu", True, tmp_path / "work"), "Title")
    assert failed == ["wrong", "broken", "crashed", "hanging"]
    lines = page.path.read_text().splitlines()
    assert lines[0] == "# Title" and lines.count("a figure") == 2 and lines.count("before it") == 3
    assert [line.split("; details")[0] for line in lines if line.startswith("FAILED")] == [
        "FAILED: wrong: other bits", "FAILED: broken: RuntimeError: first line",
        f"FAILED: crashed: the process ended with {-signal.SIGKILL}", "FAILED: hanging: not done after 2 s"]
    assert "second line" in page.log.read_text()
    child = next(line.split()[1] for line in lines if line.startswith("child"))
    until = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "what a section started ends with it"


@forks
@pytest.mark.parametrize("sections, code", [([fine, wrong], 1), ([fine], 0)])
def test_the_exit_code_says_that_a_section_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: list[Any],
                                                  code: int, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "SECTIONS", [Section(measure.__name__, measure, 30) for measure in sections])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--output", str(tmp_path / "page.md")])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # main sets it
    assert gpu.main() == code
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "1 of 2 sections failed: wrong" if code else "all 1 sections done", str(tmp_path / "page.md")]


def test_where_cuda_was_started_too_early_a_section_gets_a_new_process(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []

    def run(self: Page, section: Section, asked: Asked, context: Any) -> tuple[list[str], int]:
        ways.append(context.get_start_method())
        return [], gpu_page.CUDA_STARTED if ways[-1] == "fork" else 0

    monkeypatch.setattr(Page, "_run", run)
    assert Page(tmp_path / "page.md").write([Section("one", fine, 1)], Asked("cuda", False, tmp_path), "") == []
    assert ways == ["fork", "spawn"]


# -- what is counted and compared -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", [
    (rig.Random, {}), (rig.RandomThinker, {"tie_embeddings": True}), (rig.RandomThinker, {"tie_embeddings": False})])
def test_the_operations_of_a_token_are_those_that_torch_counts(kind: type[Any], options: dict[str, Any]) -> None:
    stage = type("Few", (kind,), {"vocabulary": 300})
    cfg = stage.Config(d_model=32, num_heads=4, num_layers=3, d_ff=96, max_seq_len=16, dropout=0.0, **options)
    made = stage(cfg, Path())
    made.prepare()
    model = made.model()
    tokens = torch.randint(300, (2, 16))
    # in bf16, since the counter does not know addmm_, which the head's gradient needs in fp32
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens).backward()
    # torch's own count of attention has its backward pass at five products, the formula at four
    attention = 12 * 3 * 32 * 16
    assert gpu_speed.model_flops(model, cfg) - attention + attention * 14 / 12 == counter.get_total_flops() / 32


@pytest.mark.parametrize("name, expected", [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("NVIDIA A10", 125), ("Tesla T4", 65), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA H200", 989.4),
    ("NVIDIA A10G", None), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)])
def test_only_a_gpu_that_is_known_has_a_data_sheet(name: str, expected: float | None) -> None:
    assert gpu_speed.data_sheet_flops(name) == (expected and expected * 1e12)


def test_the_plain_model_is_the_language_model() -> None:
    """With the same weights it has the same loss."""
    from stoker.model.gpt import GPT

    torch.manual_seed(0)
    ours = GPT(300, d_model=32, num_heads=4, num_layers=2, d_ff=96, max_seq_len=16)
    plain = plain_gpt.PlainGPT(300, 16, 32, 4, 2, 96)
    names = {"tokens": "token_embedding", "positions": "position_embedding", "norm.": "final_norm.",
             "head": "token_embedding", "qkv": "attention.qkv", "out.": "attention.out.", "up.": "mlp.up.",
             "down.": "mlp.down."}

    def named(name: str) -> str:
        for old, new in names.items():
            if old in name and (old != "norm." or name.startswith(old)):
                return name.replace(old, new)
        return name

    known = ours.state_dict()
    plain.load_state_dict({name: known[named(name)] for name in plain.state_dict()})
    tokens, targets = torch.randint(300, (2, 3, 16))
    torch.testing.assert_close(plain(tokens, targets), ours(tokens, targets) / targets.numel())


def speed(loss: float, norm: float) -> gpu_speed.Speed:
    return gpu_speed.Speed(1e3, 1e-3, 1e9, 0.0, {"train/loss": loss, "grad_norm": norm})


@pytest.mark.parametrize("way, fails", [("compiled", True), ("compiled, CUDA graphs", False)])
def test_wrong_results_are_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, fails: bool) -> None:
    """What the product does must be right; that CUDA graphs, which it does not use, are not is only reported."""
    monkeypatch.setattr(gpu_speed, "_not_measured", lambda asked, way: "")
    monkeypatch.setattr(gpu_speed, "ours", lambda asked, stage, preset, done: speed(6.0, 1.0 if done != way else 0.25))
    lines, problem = [], ""
    try:
        lines += gpu_speed.training(rig.Random, Asked("cpu", True, tmp_path))
    except Failed as error:
        problem = str(error)
    assert problem == (f"nano {way}: grad_norm 0.25 instead of 1" if fails else "")
    if not fails:
        assert f"  {way}: grad_norm 0.25 instead of 1" in lines


def test_operators_without_a_deterministic_form_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(device: torch.device) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([time.perf_counter_ns()]),)

    def failing(*given: Any) -> dict[str, Any]:
        raise RuntimeError("grid_sampler_2d_backward does not have a deterministic implementation, but you set it")

    asked = Asked("cpu", True, tmp_path)
    monkeypatch.setattr(gpu_determinism, "OPERATORS", {"clock": differs, "cat": lambda device: (torch.zeros(2),),
                                                       "unpool": gpu_determinism._max_unpool})
    monkeypatch.setattr(gpu_determinism, "_bits_of_steps", failing)
    lines, problem = [], ""
    try:
        lines += gpu_determinism.operators(asked)
    except Failed as error:
        problem = str(error)
    assert problem == "DIFFERENT BITS with the deterministic form in 5 tries; lm; text; text with experts"
    refused = gpu_determinism._twice(asked, rig.Random, {})
    assert refused == "REFUSED: grid_sampler_2d_backward has no deterministic form"
    assert gpu_determinism._tried(gpu_determinism._max_unpool, torch.device("cpu")) == (
        "no deterministic form, so torch refuses; the same bits with the usual one in 5 tries")


def test_the_alerts_of_a_gpu_fire_on_injected_readings() -> None:
    few = type("Few", (rig.Random,), {"vocabulary": 300})
    with rig.trainer("nano", few, device="cpu", batch_size=2, d_model=32, max_seq_len=16, threads=1) as trainer:
        rig.open_up(trainer)
        trainer._train_step()
        trainer.device = torch.device("cuda")
        with pytest.raises(Failed, match="expected"):
            list(gpu_safety.fired(trainer, gpu_safety.INJECTED[:1]))
        lines = list(gpu_safety.fired(trainer, gpu_safety.INJECTED))
        assert [line.split("`")[1] for line in lines] == ["gpu idle", "gpu hot"]
        trainer.device = torch.device("cpu")
