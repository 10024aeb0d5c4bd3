"""The thinker's stage: its options, its samples, what it exports."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stoker import config
from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.data.text import chat
from stoker.data.text.tokenizers import open_tokenizer
from stoker.data.text.tokens import Lines, tokenize
from stoker.monitors.experts import ExpertLoad
from stoker.training.core import pretrained
from stoker.training.core.snapshots import Snapshots
from stoker.training.core.stage import discover, reader
from stoker.training.core.step import Step, losses
from stoker.training.train_text import LEARNS_FAST, Config, Thinker
from test_config import THINKER, written
from test_stages import DATA, OPTIONS, data_of, stage_with, text_of
from toys import StopAt, assert_same, new_run, session, train

LINES = ["one two three", "", "four five", "one two three", "six"] * 3 + [f"line {each} of many" for each in range(60)]


def prepared(folder: Path, **options: Any) -> Thinker:
    (folder / "lines.txt").write_text("\n".join(LINES))
    stage = Thinker(Config(**DATA["text"] | {"dataset": str(folder / "lines.txt")} | options), folder)
    stage.prepare()
    return stage


def test_the_guides_file_is_taken_as_it_is(tmp_path: Path) -> None:
    more = '"dropout": 0.1, "rope_theta": 20000, "use_gqa": false, "use_swiglu": true,'
    text = THINKER.replace('"dropout": 0.1,', more)
    given = config.parse(Config, Thinker.presets, ["--config", written(tmp_path, text)])
    wanted = {"vocab_size": 5000, "num_layers": 4, "d_model": 256, "num_heads": 4, "d_ff": 1024, "rope_theta": 20000.0,
              "max_seq_len": 512, "use_gqa": False, "use_swiglu": True, "result_dir": "checkpoints/thinker_tiny"}
    assert {name: getattr(given.config, name) for name in wanted} == wanted


@pytest.mark.parametrize("options, message", [
    (["--no_use_swiglu"], "--no_use_swiglu: this model has gated feed-forward layers only"),
    (["--tokenizer", "bpe", "--vocab_size", "320"], "--vocab_size 320: 256 bytes, the end of a text and 64 special"),
    (["--num_heads", "4", "--num_kv_heads", "3"], "--num_kv_heads 3 does not divide --num_heads 4: take a divisor")])
def test_what_the_model_cannot_be_is_refused(options: list[str], message: str) -> None:
    with pytest.raises((UserError, SystemExit)) as caught:
        config.parse(Config, Thinker.presets, options)
    assert message in str(caught.value.__dict__) + str(caught.value)


@pytest.mark.parametrize("options, line", [
    (dict(num_experts=16), "--num_experts 16 is not used without --use_moe"),
    (dict(num_kv_heads=1, use_gqa=False),
     "--num_kv_heads 1 is not used without grouped-query attention (--no_use_gqa)"),
    (dict(num_experts=16, use_moe=True), None), (dict(num_kv_heads=1), None), (dict(num_experts=8), None)])
def test_an_option_that_is_not_used_is_named(options: dict[str, Any], line: str | None) -> None:
    cfg, lines = Thinker.resolve_defaults(Config(dataset="pydocs", tokenizer="bytes", **options), options.keys())
    assert lines == [line] * (line is not None)


def test_the_guides_tiny_has_the_guides_size(tmp_path: Path) -> None:
    stage = Thinker(Config(**Thinker.presets["tiny"]), tmp_path)
    stage.tokenizer = open_tokenizer("bytes", 0, [])
    stage.tokenizer.vocab_size = 32000
    assert sum(p.numel() for p in stage.model().parameters()) == pytest.approx(20.3e6, abs=0.05e6)


def test_nano_and_tiny_begin_with_blocks_that_add_nothing(tmp_path: Path) -> None:
    for preset in ("nano", "tiny"):
        stage = prepared(tmp_path, **{name: Thinker.presets[preset][name] for name in LEARNS_FAST})
        assert not any(block.attention.out.weight.any() for block in stage.model().blocks)


def test_windows_are_shifted_from_the_second_epoch_on(tmp_path: Path) -> None:
    for shifted in (True, False):
        stage = prepared(tmp_path, shift_windows=shifted, batch_size=4)
        order, rows = stage.order(), stage.dataset("train")
        firsts = [{tuple(rows[item].tolist()) for step in range(order.steps_per_epoch)
                   for part in order.items(epoch * order.steps_per_epoch + step) for item in part} for epoch in (0, 1)]
        assert (firsts[0] == firsts[1]) is not shifted
        assert stage.dataset("validation").seed is None
    options: dict[str, Any] = dict(dataset="pydocs", tokenizer="bytes", shift_windows=True, pack=False)
    with pytest.raises(UserError, match="--shift_windows shifts windows, and with --no_pack there are none: leave one"):
        Thinker.resolve_defaults(Config(**options), {"shift_windows", "pack"})
    Thinker.resolve_defaults(Config(**options), {"pack"})  # as presets have it


@pytest.mark.parametrize("name", ["lm", "text"])
def test_lines_are_samples_in_every_epoch(name: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    options = DATA[name] | {"dataset": str(tmp_path / "lines.txt"), "pack": False, "max_steps": 25}
    trainer, _ = train(discover()[name], new_run(tmp_path, discover()[name]), **options)
    assert trainer.step == 25 > 2 * trainer.steps_per_epoch


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_and_the_head_learn_at_a_multiple_of_the_rate(tied: bool, tmp_path: Path) -> None:
    """AdamW's first update moves each number by the learning rate, whatever its gradient."""
    stage = prepared(tmp_path, embedding_lr_factor=3.0, tie_embeddings=tied, lr=1e-3, weight_decay=0.0, warmup_steps=0,
                     precision="fp32", optimizer="adamw", zero_init=False)
    model = stage.model()
    assert all(block.attention.out.weight.count_nonzero() for block in model.blocks)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    step = Step(stage, model, stage.cfg, 9, torch.device("cpu"), lambda *a: None, lambda *a: None)
    step.run(0, [stage.collate([stage.dataset("train")[0]])])
    for name, weight in model.state_dict().items():
        moved = 3e-3 if name in ("token_embedding.weight", "head") else 1e-3
        assert float((weight - before[name]).abs().max()) == pytest.approx(moved, rel=0.02), name


# -- special tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size", [("bytes", 257 + 64), ("bpe", 400)])
def test_64_tokens_are_kept_for_later_stages(tmp_path: Path, kind: str, size: int) -> None:
    """Other text gives the same ids as without them, also where it spells one out; the file is reopened alike."""
    texts = ["the fire of <|image|> burns all night, the fire burns, the fire of the night"] * 30
    plain = open_tokenizer(kind, size - 64, texts)
    special = open_tokenizer(kind, size, texts, special=chat.SPECIAL_TOKENS)
    assert special.vocab_size == plain.vocab_size + 64 <= size and len(set(chat.SPECIAL_TOKENS)) == 64
    for one, other in zip(plain.encode_batch(texts), special.encode_batch(texts)):
        np.testing.assert_array_equal(one, other)
    assert special.end_of_text == plain.end_of_text
    special.save(tmp_path, chat.TEMPLATE)
    again = open_tokenizer(str(tmp_path / "tokenizer.json"), 0, [], special=chat.SPECIAL_TOKENS)
    assert (again.vocab_size, again.fingerprint) == (special.vocab_size, special.fingerprint)

    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(tmp_path)
    said = library.apply_chat_template([{"role": "user", "content": "burns?"}], tokenize=False,
                                       add_generation_prompt=True)
    assert said == "<|im_start|>user\nburns?<|im_end|>\n<|im_start|>assistant\n"
    ids = library(said)["input_ids"]
    assert ids.count(special.vocab_size - 64) == 2 and special.decode(ids) == said


# -- one sample a line ----------------------------------------------------------------------------------------------


def test_each_line_is_a_sample(tmp_path: Path) -> None:
    stage = prepared(tmp_path, pack=False)
    rows: Any = stage.dataset("train")
    end = stage.tokenizer.end_of_text
    texts = [bytes(row[1:-1].tolist()).decode() for row in rows]
    assert all(row[0] == row[-1] == end for row in rows) and set(texts) <= set(LINES) and "" not in texts
    valid = {bytes(row[1:-1].tolist()).decode() for row in stage.dataset("validation")}  # type: ignore[attr-defined]
    assert not valid & set(texts) and len(texts) + len(list(stage.dataset("validation"))) == 72  # type: ignore


def test_a_long_line_is_cut_at_the_context() -> None:
    tokenizer = open_tokenizer("bytes", 0, [])
    rows = Lines(tokenize(["abcdefgh", "ij"], tokenizer, "text"), 4, tokenizer.end_of_text)
    assert [row.tolist() for row in rows] == [[256, *b"abcd"], [256, *b"ij", 256]]
    assert rows.lengths().tolist() == [4, 3] and len(Lines(rows.tokens, 4, 256, max_samples=1)) == 1


def test_padding_adds_nothing_to_the_loss(tmp_path: Path) -> None:
    """Of a batch of lines it is the sum of the losses of each line alone, and its gradient the sum of theirs."""
    stage = prepared(tmp_path, pack=False, dropout=0.0)
    torch.manual_seed(0)
    model, rows = stage.model(), [stage.dataset("train")[n] for n in (0, 3, 20)]  # type: ignore[index]
    assert len({len(row) for row in rows}) > 1

    def losses(*batches: list[Any]) -> tuple[float, int, torch.Tensor]:
        model.zero_grad()
        found = [(model(**batch), stage.counts(batch, "")["loss"]) for batch in map(stage.collate, batches)]
        sum(loss for loss, _ in found).backward()
        return (sum(loss.item() for loss, _ in found), sum(int(count) for _, count in found),
                torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]

    (together, count, grad), (alone, same, other) = losses(rows), losses(*([row] for row in rows))
    assert stage.size(stage.collate(rows))["tok"] == count
    assert count == same == sum(len(row) - 1 for row in rows) and together == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_lines_are_trained_on_and_evaluated(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    options = OPTIONS | DATA["text"] | {"dataset": str(tmp_path / "lines.txt"), "pack": False, "max_samples": 0}
    trainer, ending = train(Thinker, new_run(tmp_path, Thinker), **options)
    assert ending.state == "finished" and trainer.order.size + 4 >= 72 - 8


# -- documents ------------------------------------------------------------------------------------------------------


def test_documents_are_numbered_where_they_do_not_see_each_other(tmp_path: Path) -> None:
    stage = prepared(tmp_path, cross_document=False)
    end = stage.tokenizer.end_of_text
    batch = stage.collate([torch.tensor([5, 6, end, 7, end, end, 8, 9, 10])])
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]
    assert "documents" not in prepared(tmp_path).collate([torch.tensor([5, 6, end])])


# -- out and in -----------------------------------------------------------------------------------------------------


def from_elsewhere(folder: Path, rows: int) -> Any:
    """A Qwen3 of transformers, saved in the folder with a tokenizer for bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                        max_position_embeddings=64, tie_word_embeddings=False)).eval()
    made.save_pretrained(folder)
    open_tokenizer("bytes", 0, []).save(folder)
    return made


def test_a_model_from_elsewhere_is_taken_up(tmp_path: Path) -> None:
    """With its own tokenizer, of which the embedding has more rows than tokens, or none left for special ones."""
    for rows in (257, 400):
        folder = tmp_path / str(rows)
        made = from_elsewhere(folder, rows)
        found = pretrained.find(str(folder))
        assert reader(found, ("lm", "text")) is Thinker
        text_of(tmp_path)
        options = OPTIONS | dict(Thinker.options_from(found), dataset=str(tmp_path / "text.txt"), dropout=0.0)
        stage = Thinker(Config(**options), tmp_path / "run")
        stage.prepare()
        model = stage.model()
        stage.load(model, folder)
        tokens = torch.randint(256, (2, 16))
        torch.testing.assert_close(model(tokens), made(tokens).logits, rtol=1e-4, atol=1e-4)
        assert stage.tokenizer.vocab_size == (257 if rows == 257 else 257 + 64)


def test_a_model_from_elsewhere_reads_captions(tmp_path: Path) -> None:
    made = from_elsewhere(tmp_path / "qwen3", 257)
    options = data_of("vision", tmp_path) | {"text_model": str(tmp_path / "qwen3"), "max_steps": 1}
    trainer, _ = train(discover()["vision"], new_run(tmp_path, discover()["vision"]), **options)
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(trainer.model.text.language_model.hidden(tokens), made.model(tokens).last_hidden_state,
                               rtol=1e-4, atol=1e-4)


def test_what_is_exported_is_a_model_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = prepared(tmp_path, dropout=0.0)
    model = stage.model().eval()
    folder = tmp_path / "model"
    folder.mkdir()
    stage.export(model, folder)
    theirs, library = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and library.chat_template == chat.TEMPLATE
    tokens = torch.tensor([library("the fire burns")["input_ids"]])
    assert tokens[0].tolist() == stage.tokenizer.encode_batch(["the fire burns"])[0].tolist()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["model_type"] in discover()["text"].model_types


@pytest.mark.parametrize("name, value, data", [("text", 10.0, ""), ("lm", 100.0, "WikiText")])
def test_a_finished_run_says_whether_its_perplexity_is_what_the_guides_promise(
        name: str, value: float, data: str, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    caplog.set_level("INFO")
    stage = discover()[name]
    for preset in ("tiny", "small", "medium"):
        goal = stage(stage.Config(**stage.presets[preset]), tmp_path).goal()
        assert goal == ("eval/ppl", {"small": 60.0, "medium": 40.0}.get(preset, value) if data else value, data)
    assert name == "text" or stage(stage.Config(**stage.presets["nano"]), tmp_path).goal() is None
    of_bytes = stage.Config(**stage.presets["tiny"] | {"tokenizer": "bytes"})
    assert stage(of_bytes, tmp_path).goal() is None, "bytes are easier to predict than parts of words"
    monkeypatch.setattr(stage, "goal", lambda self: goal)
    run, options = new_run(tmp_path, stage), data_of(name, tmp_path) | {"max_steps": 2, "eval_interval": 1}
    with run.lock():
        assert session(stage, run, **options).train().state == "finished"
    best = min(row["eval/loss"] for row in Journal(run.metrics).rows() if "eval/loss" in row)
    [line] = [message for message in caplog.messages if "the goal" in message]
    assert line == (f"ppl={math.exp(best):.1f} on validation data of {options['dataset']}; the goal, ppl below "
                    f"{goal.value:.1f}{data and ' on WikiText'}, is not reached")


# -- mixture of experts ---------------------------------------------------------------------------------------------

MOE: dict[str, Any] = dict(use_moe=True, num_experts=4, experts_per_token=2, cross_document=False)


def test_a_mixture_goes_on_bit_for_bit_and_its_load_is_watched(tmp_path: Path) -> None:
    options = OPTIONS | DATA["text"] | {"dataset": str(text_of(tmp_path))} | MOE
    whole, run = new_run(tmp_path, Thinker), new_run(tmp_path, Thinker)
    train(stage_with(Thinker, StopAt(-1)), whole, **options)
    train(stage_with(Thinker, StopAt(5)), run, **options)
    train(stage_with(Thinker, StopAt(-1)), run, resume=True)
    a, b = (Snapshots(each.snapshots, {}).found()[-1] for each in (whole, run))
    assert_same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))
    rows = list(Journal(whole.metrics).rows())
    assert rows == list(Journal(run.metrics).rows())
    for row in rows:
        assert row["train/loss"] == pytest.approx(row["train/ce"] + 0.01 * row["train/balance"], rel=1e-6)
        assert row["train/ppl"] == pytest.approx(math.exp(row["train/ce"]))
        assert 0 <= row["experts/least_load"] <= 1 <= row["experts/most_load"] <= 2 and row["train/balance"] > 1.9


def test_the_balance_is_in_the_loss_by_its_weight(tmp_path: Path) -> None:
    stage = prepared(tmp_path, **MOE, balance_weight=0.5, dropout=0.0)
    model, batch = stage.model(), stage.collate([stage.dataset("train")[0]])  # type: ignore[index]
    (ratio,) = losses(stage, model, batch, torch.device("cpu"), "fp32")
    alone, tokens = model(**batch), batch["tokens"].numel()
    expected = alone / tokens + 0.5 * model.balance() / tokens
    torch.testing.assert_close(ratio.total / ratio.count, expected)


def test_dead_experts_are_named_once(tmp_path: Path) -> None:
    loads = {"layer 0": torch.tensor([5.0, 0.0, 3.0, 4.0]), "layer 1": torch.tensor([3.0, 3.0, 3.0, 3.0])}
    watch, metrics = ExpertLoad(tmp_path / "alerts.jsonl", lambda model: loads), dict[str, float]()
    trainer: Any = SimpleNamespace(model=None, step=0)
    for trainer.step in range(1, 6):
        watch.on_log(trainer, metrics)
    alerts = list(Journal(tmp_path / "alerts.jsonl").rows())
    assert [(row["step"], row["kind"]) for row in alerts] == [(3, "dead experts")]
    assert "layer 0 expert 1. Raise" in alerts[0]["message"]
    assert metrics == {"experts/least_load": 0.0, "experts/most_load": pytest.approx(5 / 3)}
