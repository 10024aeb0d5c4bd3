"""A training step against its bare matrix products, and against transformers' GPT-2 in a plain loop.

    python benchmarks/training_step.py

Tiny preset, gpt2 vocabulary, batch 8 x 256, fp32, on the CPU; the three in turn, median of five. Ours is the trainer's
own step with its clipping, its AdamW and its check for NaN, deterministic, without monitors. The plain loop has the
same AdamW, fused, and need not be deterministic; it is also run in a process of its own, where memory is as glibc keeps
it by default and not as `device.keep_memory` asks. The products are those of forward and backward of the same shapes,
into memory that is there already, nothing between them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import rig  # noqa: I001  finds the packages of src/
import torch

from stoker import wheels
from stoker.model.cross_entropy import CHUNK_BYTES

wheels.torchaudio()  # before transformers imports them as they are
wheels.torchvision()
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

BATCH = 8
PROMISED = {"of the bare products": 0.70, "times transformers' loop": 1.0, "times that loop by itself": 1.0}


def products(d: int, heads: int, layers: int, d_ff: int, length: int) -> list[rig.Factors]:
    """The factors of every matrix product of a step."""
    tokens, made = BATCH * length, list[rig.Factors]()
    for _ in range(layers):
        for inner, outer in ((d, 3 * d), (d, d), (d, d_ff), (d_ff, d)):
            made += rig.of_layer(tokens, inner, outer)
        made += rig.of_attention(BATCH * heads, length, d // heads)
    chunk, weight = CHUNK_BYTES // 4 // rig.VOCABULARY, torch.randn(d, rig.VOCABULARY)
    for rows in [chunk] * (tokens // chunk) + [tokens % chunk]:
        hidden, logits = torch.randn(rows, d), torch.randn(rows, rig.VOCABULARY)
        made += [(hidden, weight), (logits, weight.T), (hidden.T, logits)]
    return made


def plain_loop(cfg: Any) -> Callable[[], None]:
    """A step of transformers' GPT-2 of the same shape, as anybody would write it."""
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=rig.VOCABULARY, n_positions=cfg.max_seq_len, n_embd=cfg.d_model, n_layer=cfg.num_layers,
        n_head=cfg.num_heads, n_inner=cfg.d_ff, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(rig.VOCABULARY, (BATCH, cfg.max_seq_len))

    def step() -> None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.use_deterministic_algorithms(deterministic)

    return step


def main() -> None:
    with rig.trainer("tiny", batch_size=BATCH, device="cpu", precision="fp32") as trainer:
        cfg: Any = trainer.cfg
        for listeners in trainer.events.listeners.values():
            listeners.clear()
        rig.open_up(trainer)
        factors = products(cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.d_ff, cfg.max_seq_len)
        seconds = rig.median_seconds({"bare matrix products": rig.bare_products(factors),
                                      "stoker": trainer._train_step, "transformers, plain loop": plain_loop(cfg)})
    alone = subprocess.run([sys.executable, __file__, json.dumps(vars(cfg))], check=True, stdout=subprocess.PIPE)
    seconds["the same by itself"] = float(alone.stdout)
    flops = sum(2 * a.numel() * b.shape[-1] for a, b in factors)
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}")
    for name, taken in seconds.items():
        print(f"{name:26s} {taken:6.3f} s   {BATCH * cfg.max_seq_len / taken:7,.0f} tokens/s   "
              f"{flops / taken / 1e9:5.0f} GFLOP/s")
    ratios = {"of the bare products": seconds["bare matrix products"] / seconds["stoker"],
              "times transformers' loop": seconds["transformers, plain loop"] / seconds["stoker"],
              "times that loop by itself": seconds["the same by itself"] / seconds["stoker"]}
    for name, ratio in ratios.items():
        print(f"stoker reaches {ratio:.2f} {name} (aim {PROMISED[name]:.2f})")


if __name__ == "__main__":
    if len(sys.argv) > 1:  # in a process of its own
        loop = plain_loop(SimpleNamespace(**json.loads(sys.argv[1])))
        print(rig.median_seconds({"loop": loop})["loop"])
    else:
        main()
