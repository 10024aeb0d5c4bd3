"""What a user does with a model: look at what it makes while it trains and after, and evaluate it."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess

import pytest
import torch

from desk import ENDLESS, ROOT, Desk, until
from in_process import answer
from stoker.inference import generate as script
from stoker.inference import replay
from stoker.model import half_weights
from stoker.training.assembly import eval_only, launch
from stoker.training.train_lm import LanguageModel

SHORT = ["--max_steps", "20", "--eval_interval", "5"]


def generate(desk: Desk, *argv: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """As a user calls it."""
    return subprocess.run([ROOT / "run" / "generate.sh", *argv], env=desk.env, cwd="/", input=stdin,
                          capture_output=True, timeout=120)


def generate_here(desk: Desk, *argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """What the script calls, in this process."""
    return answer("generate.sh", script._main, *argv, stdin=stdin, env={"STOKER_HOME": desk.env["STOKER_HOME"]})


@pytest.fixture(scope="module")
def finished(desk: Desk) -> str:
    ran = desk.train_here(*SHORT, "--run_name", "done")
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def test_its_log_ends_with_a_sample_of_the_best_model(finished: str) -> None:
    lines = [re.sub(r"^\[[^]]*\] ", "", line) for line in finished.splitlines()]
    best = next(i for i, line in enumerate(lines) if line.startswith("Best model saved: "))
    assert lines[best + 1] == "Sample of the best model:" and re.match(r"  \| \[.{8}\]", lines[best + 2])
    assert not any(line.startswith("  -> Test:") for line in lines), "this text has no test split"


def test_a_finished_run_goes_on_with_a_text(desk: Desk, finished: str) -> None:
    ran = generate_here(desk, "done", "abc", "--max_new_tokens", "40", "--seed", "1")
    assert ran.returncode == 0, ran.stderr
    text = ran.stdout.decode(errors="strict")
    assert text.startswith("abc") and text.endswith("\n") and len(text) > len("abc\n")
    note = "; weights in fp16" * half_weights.supported(torch.device("cpu"))
    assert re.fullmatch(rf"{desk.results}/done/models/best, step \d+; seed 1{note}\n", ran.stderr.decode())
    exact = generate_here(desk, "done", "abc", "--max_new_tokens", "40", "--seed", "1", "--precision", "fp32")
    assert re.fullmatch(rf"{desk.results}/done/models/best, step \d+; seed 1\n", exact.stderr.decode())
    again = generate_here(desk, str(desk.results / "done" / "models" / "best"), "abc", "--no_echo", "--max_new_tokens",
                          "40", "--seed", "1")
    assert b"abc" + again.stdout == ran.stdout, "the same seed, from the model folder"


def test_weights_in_fp16_are_for_cpus_that_have_them(desk: Desk, finished: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_weights, "supported", lambda device: False)
    refused = generate_here(desk, "done", "abc", "--precision", "fp16")
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr.decode() == (
        "generate.sh: --precision fp16: only x86 CPUs compute with weights in fp16, and the model is on cpu; leave it "
        "out\n")
    exact = generate_here(desk, "done", "abc", "--max_new_tokens", "3", "--seed", "1")
    assert exact.returncode == 0 and exact.stderr.endswith(b"; seed 1\n")


def test_it_is_the_text_of_transformers(desk: Desk, finished: str) -> None:
    from transformers import GPT2LMHeadModel

    prompt, folder = b"hgfedcb", desk.results / "done" / "models" / "best"
    ran = generate_here(desk, "done", prompt.decode(), "--greedy", "--max_new_tokens", "9", "--no_echo",
                        "--precision", "fp32")
    made = GPT2LMHeadModel.from_pretrained(folder).generate(
        torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=9,
        pad_token_id=256)[0, len(prompt):]
    assert ran.stdout.removesuffix(b"\n") == bytes(i for i in made.tolist() if i != 256)


def test_the_prompt_may_come_from_standard_input_and_be_longer_than_the_context(desk: Desk, finished: str) -> None:
    long = "Größe 東京 🚀 " * 20
    ran = generate_here(desk, "done", "-", "--max_new_tokens", "30", "--num_samples", "2", stdin=f"{long}\n".encode())
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.decode(errors="strict").split("<|endoftext|>\n")
    assert first.startswith(long) and second.startswith(long) and first != second
    empty = generate_here(desk, "done", "", "--max_new_tokens", "3")
    assert empty.returncode == 0, "an empty prompt: a text from nothing"


def test_whoever_reads_may_stop_reading(desk: Desk, finished: str) -> None:
    piped = (f"set -o pipefail; printf 'by a pipe' | {ROOT}/run/generate.sh done - --max_new_tokens 5000 | "
             "head -c 10")
    ran = subprocess.run(["bash", "-c", piped], env=desk.env, capture_output=True, timeout=120)
    assert (ran.returncode, ran.stdout[:9], ran.stderr.count(b"\n")) == (0, b"by a pipe", 1), ran


def test_ctrl_c_ends_it_quietly(desk: Desk, finished: str) -> None:
    endless = [str(ROOT / "run" / "generate.sh"), "done", "x", "--greedy", "--max_new_tokens", "10000000"]
    with subprocess.Popen(endless, env=desk.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read(30)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=30)
    assert process.returncode == 130 and told.count(b"\n") == 2, told
    rest.decode(errors="strict")


def test_a_run_that_trains_shows_what_it_can_by_now(desk: Desk) -> None:
    pid = desk.begun(desk.train(*ENDLESS, "--run_name", "going"))
    first = generate_here(desk, str(pid), "a", "--max_new_tokens", "5")
    assert first.returncode == 0, first.stderr
    assert re.match(rf"{desk.results}/going/snapshots/snapshot_\w+, step \d+; seed", first.stderr.decode())
    step = desk.run("going")["step"]
    until(lambda: desk.run("going")["step"] > step), "it was not disturbed"
    assert desk.call("stop.sh", "going").returncode == 0
    assert generate_here(desk, "going", "a", "--max_new_tokens", "5").returncode == 0


@pytest.mark.parametrize("argv, part", [
    (["nothing", "x"], "there is no run 'nothing'"), (["done", "a", "b"], "put the prompt into quotes"),
    (["done", "x", "--temprature", "1"], "did you mean --temperature?"),
    (["done", "x", "--top_p", "0"], "--top_p must be above 0"),
    (["done", "x", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
    (["done", "x", "--device", "gpu"], "--device: 'gpu' is none of"),
    (["/", "x"], "/ is neither a run, nor a snapshot"),
    (["--greedy"], "which run?"),
    (["done", b"\xff"], "is not UTF-8 text"),
])
def test_a_mistake_is_one_line(desk: Desk, finished: str, argv: list[str], part: str) -> None:
    ran = generate(desk, *argv)
    assert (ran.returncode, ran.stdout) == (2, b"")
    told = ran.stderr.decode()
    assert told.startswith("generate.sh: ") and told.count("\n") == 1 and part in told


def test_so_is_one_that_needs_torch_to_be_seen(desk: Desk, finished: str) -> None:
    ran = generate_here(desk, "done", "x", "--device", "cuda:99")
    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (2, b"", 1)
    assert ran.stderr.startswith(b"generate.sh: --device cuda:99: this machine has"), ran.stderr


def test_on_a_terminal_a_prompt_is_asked_for(desk: Desk, finished: str) -> None:
    ours, theirs = pty.openpty()
    ran = subprocess.run([str(ROOT / "run" / "generate.sh"), "done"], env=desk.env, stdin=theirs, capture_output=True,
                         text=True, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert ran.returncode == 2 and ran.stderr.startswith("generate.sh: no prompt: ") and ran.stderr.count("\n") == 1


# -- evaluate.sh ----------------------------------------------------------------------------------------------------


def test_an_evaluation_prints_the_figures_of_the_journal(desk: Desk, finished: str) -> None:
    rows = [json.loads(line) for line in (desk.results / "done" / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "eval/loss" in row), key=lambda row: row["eval/loss"])
    before = sorted(path for path in desk.folder.rglob("*"))
    ran = desk.call("evaluate.sh", "done")
    assert ran.returncode == 0, ran.stderr
    interval = r"\(95%: [\d.]+-[\d.]+\) "
    assert re.fullmatch(rf"Validation: loss={best['eval/loss']:.3f} {interval}ppl={best['eval/ppl']:.1f} {interval}"
                        r"\([\d,]+ samples, [\d,]+ tok; all rows of the validation split of \S+\)\n", ran.stdout)
    assert f"models/best, step {best['step']}" in ran.stderr
    assert sorted(path for path in desk.folder.rglob("*")) == before, "nothing is left"


def test_an_evaluation_on_another_text(desk: Desk, finished: str) -> None:
    other = desk.folder / "other.txt"
    other.write_text("".join(f"{i} squared is {i * i}\n" for i in range(300)))
    with pytest.MonkeyPatch.context() as here:
        here.setenv("STOKER_HOME", desk.env["STOKER_HOME"])
        there, direct = (eval_only.report(launch.decide(LanguageModel, ["--eval_only", *of, "--dataset", str(other)]))
                         for of in (["--resume", "done"],  # as evaluate.sh says it
                                    ["--init_from", "done", "--batch_size", "4", "--threads", "1"]))
    assert there == direct and there.startswith("Validation: loss=")


@pytest.mark.parametrize("argv, part", [
    (["nothing"], "there is no run 'nothing'"), (["done", "--split", "tset"], "did you mean test?"),
    (["--split", "test"], "which run?"), (["done", "--confusions"], "a model of stage lm writes down no texts"),
    (["done", "--", "--d_model", "32"], "--d_model 32 differs from the 16"),
])
def test_an_evaluation_that_cannot_be_is_refused(desk: Desk, finished: str, argv: list[str], part: str) -> None:
    ran = desk.call("evaluate.sh", *argv)
    told = [line for line in ran.stderr.splitlines() if not line.startswith("[")]
    assert (ran.returncode, ran.stdout, len(told)) == (2, "", 1) and part in told[0], ran.stderr


def test_the_step_of_an_incident_is_done_again(desk: Desk, finished: str) -> None:
    """An incident as a run would have left it: weights that have overflowed."""
    import torch
    from safetensors.torch import load_file

    from stoker.training.core import incident
    from stoker.training.core.incident import Incident

    run = desk.results / "done"
    path = run / "incidents" / "step_00000003"
    kept = next((run / "snapshots").glob("snapshot_*")) / "model.safetensors"
    weights = load_file(kept)
    weights["blocks.0.mlp.up.weight"] *= 1e40
    model = torch.nn.Module()
    model.state_dict = lambda: weights  # type: ignore[assignment, method-assign]
    batch = {"tokens": torch.arange(8)[None], "targets": torch.arange(8)[None]}
    kept_as = Incident(3, "non-finite", "output of blocks.0.mlp.up", "nan", [[4]], [4])
    incident.write(run / "incidents", kept_as, model, [batch])
    ran = answer("replay.sh", replay._main, "done", env={"STOKER_HOME": desk.env["STOKER_HOME"]})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert b"Again  NaN or Inf, first in output of blocks.0.mlp.up: the same" in ran.stdout
    shutil.copy(kept, path / "model.safetensors")
    ran = answer("replay.sh", replay._main, str(path))
    assert ran.returncode == 1 and b"Again  finite" in ran.stdout
    refused = desk.call("replay.sh", str(run / "models"))
    assert refused.returncode == 2 and refused.stderr.startswith("replay.sh: ") and refused.stderr.count("\n") == 1
