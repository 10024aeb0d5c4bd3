"""How much faster the stages train in bf16 than in fp32 on this CPU, and where the time goes.

    python benchmarks/precision.py [--stage lm ...] [--preset nano] [--rounds 8] [--dropout 0.1]

Both train in one process, the trainer's own step in turn, on the same rows, without monitors. Printed are the medians
of a step, the median of the rounds' ratios, and for each precision the shares of a step that torch's operators take:
matrix products and convolutions, attention where torch computes it, dropout's random numbers, softmax, copies (with
changes of type), and the optimizer with clipping. Data are made here; `lm` and `text` read random tokens.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from typing import Any

import neighbours  # noqa: I001  finds the packages of src/
import rig
from torch.profiler import profile

KINDS = ("fp32", "bf16")
GROUPS = {"products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution",
                       "aten::convolution_backward", "aten::mkldnn_linear", "aten::addmm_"),
          "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                        "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
          "random": ("aten::random_", "aten::bernoulli_", "aten::native_dropout"),
          "softmax": ("aten::_softmax", "aten::_softmax_backward_data", "aten::_log_softmax"),
          "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
          "optimizer": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach_norm", "aten::_foreach_mul_",
                        "aten::_foreach_div_")}
PROFILED = 3  # steps


def shares(trainer: Any) -> str:
    with profile() as seen:
        for _ in range(PROFILED):
            trainer._train_step()
    took: dict[str, float] = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    whole = sum(took.values())
    found = {group: sum(took.get(name, 0.0) for name in names) / whole for group, names in GROUPS.items()}
    found["all else"] = 1 - sum(found.values())
    return ", ".join(f"{group} {share:.0%}" for group, share in found.items() if share >= 0.005)


def report(stage: str, preset: str, rounds: int, options: dict[str, Any]) -> None:
    kind, data = neighbours.rig_stage(stage, preset)
    with ExitStack() as stack:
        trainers = {}
        for precision in KINDS:
            trainers[precision] = stack.enter_context(rig.trainer(preset, kind, device="cpu", precision=precision,
                                                                  epochs=100_000, **data, **options))
            rig.open_up(trainers[precision], monitors=False)
        taken: dict[str, list[float]] = {precision: [] for precision in KINDS}
        for number in range(rounds + 2):
            for precision, trainer in trainers.items():
                trainer.step = number
                start = time.perf_counter()
                trainer._train_step()
                taken[precision].append(time.perf_counter() - start)
        fp32, bf16 = (taken[precision][2:] for precision in KINDS)
        print(f"{stage:10s} {preset}: fp32 {statistics.median(fp32):.3f} s, bf16 {statistics.median(bf16):.3f} s a "
              f"step: {statistics.median(a / b for a, b in zip(fp32, bf16)):.2f} times as fast", flush=True)
        for precision, trainer in trainers.items():
            print(f"{'':10s} {precision}: {shares(trainer)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=neighbours.STAGES, action="append")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    asked = parser.parse_args()
    for stage in asked.stage or neighbours.STAGES:
        report(stage, asked.preset, asked.rounds, {"dropout": asked.dropout})


if __name__ == "__main__":
    main()
