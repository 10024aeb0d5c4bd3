"""A training step against its bare matrix products, and against transformers' GPT-2 in a plain loop.

    python benchmarks/training_step.py

Tiny preset, gpt2 vocabulary, batch 8 x 256, fp32, on the CPU; the three in turn, median of five. Ours is the trainer's
own step with its clipping, its fused AdamW and its check for NaN, without monitors. The products are those of forward
and backward of the same shapes, nothing between them.
"""

import os

import rig  # noqa: I001  finds the packages of src/
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.cross_entropy import CHUNK_NUMBERS

BATCH = 8
PROMISED = {"of the bare products": 0.70, "times transformers' loop": 1.0}


def products(d: int, heads: int, layers: int, d_ff: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors of every matrix product of a step: forward, gradient of the input, gradient of the weight."""
    tokens, made = BATCH * length, []

    def layer(rows: int, inner: int, outer: int) -> None:
        x, w, y = torch.randn(rows, inner), torch.randn(inner, outer), torch.randn(rows, outer)
        made.extend([(x, w), (y, w.T), (x.T, y)])

    for _ in range(layers):
        for inner, outer in ((d, 3 * d), (d, d), (d, d_ff), (d_ff, d)):
            layer(tokens, inner, outer)
        q, p = torch.randn(BATCH * heads, length, d // heads), torch.randn(BATCH * heads, length, length)
        made.extend([(q, q.mT), (p, q), (p, q), (p.mT, q), (q, q.mT), (p.mT, q)])
    chunk = CHUNK_NUMBERS // rig.VOCABULARY
    weight = torch.randn(d, rig.VOCABULARY)
    hidden, logits = torch.randn(chunk, d), torch.randn(chunk, rig.VOCABULARY)
    made.extend([(hidden, weight), (logits, weight.T), (hidden.T, logits)] * (tokens // chunk))
    return made


def main() -> None:
    with rig.trainer("tiny", batch_size=BATCH, device="cpu", precision="fp32") as trainer:
        cfg = trainer.cfg
        for listeners in trainer._listeners.values():
            listeners.clear()
        rig.open_up(trainer)
        theirs = GPT2LMHeadModel(GPT2Config(
            vocab_size=rig.VOCABULARY, n_positions=cfg.max_seq_len, n_embd=cfg.d_model, n_layer=cfg.num_layers,
            n_head=cfg.num_heads, n_inner=cfg.d_ff, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
        tokens = torch.randint(rig.VOCABULARY, (BATCH, cfg.max_seq_len))
        factors = products(cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.d_ff, cfg.max_seq_len)

        def plain_loop() -> None:
            theirs(input_ids=tokens, labels=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds = rig.median_seconds({"bare matrix products": lambda: [a @ b for a, b in factors],
                                      "stoker": trainer._train_step, "transformers, plain loop": plain_loop})
    flops = sum(2 * a.numel() * b.shape[-1] for a, b in factors)
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}")
    for name, taken in seconds.items():
        print(f"{name:26s} {taken:6.3f} s   {BATCH * cfg.max_seq_len / taken:7,.0f} tokens/s   "
              f"{flops / taken / 1e9:5.0f} GFLOP/s")
    ratios = {"of the bare products": seconds["bare matrix products"] / seconds["stoker"],
              "times transformers' loop": seconds["transformers, plain loop"] / seconds["stoker"]}
    for name, ratio in ratios.items():
        print(f"stoker reaches {ratio:.2f} {name} (aim {PROMISED[name]:.2f})")


if __name__ == "__main__":
    main()
