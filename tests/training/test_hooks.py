"""Every module is called, never its `forward`: what hangs on its hooks (DDP, FSDP2, an examination) sees all of it."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stoker
from stoker.model.decoding import Sampling, generate
from stoker.model.gpt import GPT
from stoker.model.reader import TextDecoder
from stoker.training.core.blocks import compile_blocks
from stoker.training.core.callback import ACT, Callback
from stoker.training.trainer import Trainer
from test_stages import OPTIONS, STAGES, data_of, stage_with
from toys import new_run, train

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # on importing the compiler
HANDMADE = re.compile(r"\.forward\b(?!_)")
ALLOWED = {"training/core/adapters.py": 1, "training/core/blocks.py": 2}  # super().forward; what a block computes


def test_no_forward_is_called_by_hand() -> None:
    root = Path(stoker.__file__).parent
    found = {str(path.relative_to(root)): len(HANDMADE.findall(path.read_text())) for path in root.rglob("*.py")}
    assert {path: count for path, count in found.items() if count} == ALLOWED


@dataclass
class Hooks(Callback):
    """Notes which modules are called in training and in evaluations."""

    order = ACT
    seen: dict[str, set[str]] = field(default_factory=lambda: {"training": set(), "evaluation": set()})
    all: set[str] = field(default_factory=set)

    def on_build(self, trainer: Trainer) -> None:
        for name, module in trainer.model.named_modules():
            if type(module).forward is not nn.Module.forward:  # a list of modules is not called
                self.all.add(name)
                module.register_forward_hook(partial(self._note, name))

    def _note(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        self.seen["training" if torch.is_grad_enabled() else "evaluation"].add(name)


# Where phases begin later, two steps see all of them. A talker speaks frame by frame; discriminators are for training;
# a front end, which has no weights, may be asked for the level too.
LATER = {"talker": {"max_steps": 2, "codec_share": 0.5}, "vocoder": {"max_steps": 2, "discriminator_start": 0.5}}
NOT_CALLED = {("talker", "evaluation"): r"talker(\.blocks|\.dropout)?", ("vocoder", "training"): "mel",
              ("vocoder", "evaluation"): r"mel|discriminators.*"}


@pytest.mark.parametrize("name", STAGES)
def test_the_hooks_of_every_module_are_called(tmp_path: Path, name: str) -> None:
    hooks = Hooks()
    options = OPTIONS | data_of(name, tmp_path) | {"max_steps": 1, "samples": False} | LATER.get(name, {})
    assert train(stage_with(STAGES[name], hooks), new_run(tmp_path, STAGES[name]), **options)[1].state == "finished"
    for mode, seen in hooks.seen.items():
        left_out = NOT_CALLED.get((name, mode), "")
        assert seen >= {module for module in hooks.all if not re.fullmatch(left_out, module)} != set()


def compilations(blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A place for every graph that is compiled of these blocks from now on."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partial_compile(nn.Module.compile, backend))
    compile_blocks(list(blocks))
    return graphs


def partial_compile(compile: Any, backend: Any) -> Any:
    return lambda module, **options: compile(module, backend=backend, **options)


def counted(blocks: nn.ModuleList) -> Counter[int]:
    calls: Counter[int] = Counter()
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *given, number=number: calls.update([number]))
    return calls


def test_reading_on_from_a_cache_calls_the_hooks_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for each length of the cache would take longer to compile than all text to write."""
    model = GPT(64, d_model=32, num_heads=2, num_layers=2, d_ff=64, max_seq_len=16).eval()
    prompt = torch.randint(64, (1, 3))
    plain = list(generate(model, prompt, Sampling(temperature=0), max_new_tokens=6))
    calls, graphs = counted(model.blocks), compilations(model.blocks, monkeypatch)
    assert list(generate(model, prompt, Sampling(temperature=0), max_new_tokens=6)) == plain
    assert calls == {0: 6, 1: 6} and not graphs
    with torch.no_grad():
        model(prompt)
    assert graphs and calls == {0: 7, 1: 7}


def test_a_text_about_a_line_is_read_on_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TextDecoder(9, d_model=32, num_heads=2, num_layers=2, d_ff=64).eval()
    states, tokens = torch.randn(2, 5, 32), torch.randint(9, (2, 4))
    with torch.no_grad():
        whole = decoder(tokens, decoder.memory(states, torch.tensor([5, 3])))
        calls, graphs = counted(decoder.blocks), compilations(decoder.blocks, monkeypatch)
        memory = decoder.memory(states, torch.tensor([5, 3]), capacity=4)
        parts = [decoder(part, memory) for part in tokens.split(1, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        assert calls == {0: 4, 1: 4} and not graphs
        decoder(tokens, decoder.memory(states, torch.tensor([5, 3])))
    assert graphs and calls == {0: 5, 1: 5}
