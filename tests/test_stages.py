"""What every stage must do: build each preset, overfit a batch, go on bit for bit."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import made_lines
import made_pictures
import made_speech
from stoker import config
from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.training.core.blocks import checkpoint_blocks
from stoker.training.core.callback import Callback
from stoker.training.core.media import Text
from stoker.training.core.snapshots import Snapshots
from stoker.training.core.stage import Stage, discover
from stoker.training.trainer import Trainer
from toys import WITHOUT_MONITORS, StopAt, assert_same, new_run, train

STAGES = discover()
DATA: dict[str, dict[str, Any]] = {
    "audio_enc": dict(d_model=32, num_heads=2, num_layers=2, d_ff=64, dropout=0.1, downsample_time=4, num_mels=20,
                      batch_seconds=4.0, noise=20.0),
    "lm": dict(tokenizer="bytes", d_model=32, num_heads=2, num_layers=2, d_ff=64, max_seq_len=32, dropout=0.1),
    "ocr": dict(stem_width=4, d_model=32, num_heads=2, num_layers=2, decoder_layers=1, d_ff=64, dropout=0.1,
                batch_width=400),
    "talker": dict(d_model=32, num_layers=2, codec_d_model=32, codec_layers=1, latent=8, num_books=2, book_size=16,
                   num_mels=20, dropout=0.1, voices=12, judge="none"),
    "text": dict(tokenizer="bytes", d_model=32, num_heads=4, num_kv_heads=2, num_layers=2, d_ff=64, max_seq_len=32,
                 dropout=0.1, optimizer="muon", embedding_lr_factor=2.0, zero_init=True, shift_windows=True),
    "vision": dict(image_size=16, patch_size=8, d_model=32, num_heads=2, num_layers=2, d_ff=64, dropout=0.1, flip=0.5,
                   text_d_model=16, text_num_heads=2, text_layers=1, embed_dim=16),
    "vocoder": dict(d_model=32, num_layers=2, num_mels=20, segment_seconds=0.2, discriminators=True,
                    discriminator_width=4, discriminator_start=0.3),
}
# The loss that falls where a batch is overfitted, and the share of it that is left: a vocoder's is a sum of distances.
LOSSES = {"talker": ("train/talker/base_loss", 0.1), "vocoder": ("train/generator/mel", 0.4)}
# The same rows in each epoch: what is changed in them is not learned by heart.
STILL: dict[str, dict[str, Any]] = {"audio_enc": dict(speed=0.0, gain=0.0, noise=0.0, mask_bands=0, mask_time=0.0),
                                    "ocr": dict.fromkeys(("stretch", "slant", "shift", "weight", "contrast", "blur",
                                                          "noise", "invert"), 0.0),
                                    "vision": dict(crop=0.0, flip=0.0, colour=0.0, label_smoothing=0.0)}
OPTIONS: dict[str, Any] = dict(batch_size=2, grad_accum_steps=2, max_steps=12, log_interval=5, eval_interval=6,
                               max_samples=30, gradient_monitor_interval=3, weight_monitor_interval=3)


def data_of(stage: str, folder: Path) -> dict[str, Any]:
    """Options that point a stage at small data made here."""
    made = {"audio_enc": made_speech.write, "lm": text_of, "text": text_of, "ocr": made_lines.write,
            "vision": made_pictures.write, "talker": made_speech.write, "vocoder": made_speech.write}[stage](folder)
    return DATA[stage] | {"dataset": str(made)}


def text_of(folder: Path) -> Path:
    chosen = random.Random(0)
    words = ["stoker", "keeps", "the", "fire", "burning", "all", "night", "long", "while", "you", "sleep"]
    text = "\n".join(" ".join(chosen.choices(words, k=8)) for _ in range(300))
    (folder / "text.txt").write_text(text)
    return folder / "text.txt"


def stage_with(stage: type[Stage], *callbacks: Callback) -> type[Stage]:
    return type(stage.__name__, (stage,), {"callbacks": lambda self: [*stage.callbacks(self), *callbacks]})


def test_there_are_stages() -> None:
    assert {"lm", "text", "audio_enc", "ocr", "vision"} <= set(STAGES) and set(DATA) == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_every_preset_is_a_valid_config(name: str) -> None:
    stage = STAGES[name]
    assert {"nano", "tiny", "small", "medium"} <= set(stage.presets)
    for preset in stage.presets:
        parsed = config.parse(stage.Config, stage.presets, ["--preset", preset])
        written = json.dumps(config.to_json(parsed.config))
        assert config.from_json(stage.Config, json.loads(written), "") == parsed.config


@pytest.mark.parametrize("name", STAGES)
def test_resumed_is_uninterrupted(tmp_path: Path, name: str) -> None:
    """With dropout, accumulation and loader workers; step 6 is an evaluation that the stop abandons."""
    options, whole = OPTIONS | data_of(name, tmp_path), new_run(tmp_path, STAGES[name])
    train(stage_with(STAGES[name], StopAt(-1)), whole, **options)
    for at, workers in ((5, 0), (6, 1)):
        run = new_run(tmp_path, STAGES[name])
        trainer, ending = train(stage_with(STAGES[name], StopAt(at)), run, **options | {"num_workers": workers})
        assert (ending.state, trainer.step) == ("stopped", at)
        train(stage_with(STAGES[name], StopAt(-1)), run, resume=True)
        a, b = (Snapshots(r.snapshots, {}).found()[-1] for r in (whole, run))
        assert_same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))
        assert_same(*(torch.load(p / "state.pt", weights_only=True) for p in (a, b)))
        assert list(Journal(whole.metrics).rows()) == list(Journal(run.metrics).rows())


@pytest.mark.parametrize("name", STAGES)
def test_one_batch_is_overfitted(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_save", lambda trainer: None)  # each step is an epoch, with a snapshot at its end
    options = OPTIONS | data_of(name, tmp_path) | STILL.get(name, {}) | dict(
        max_samples=2, grad_accum_steps=1, max_steps=50, lr=1e-2, log_interval=10, eval_interval=50,
        threads=1) | WITHOUT_MONITORS | ({"dropout": 0.0} if "dropout" in DATA[name] else {})
    run = new_run(tmp_path, STAGES[name])
    train(STAGES[name], run, **options)
    loss, left = LOSSES.get(name, ("train/loss", 0.1))
    losses = [row[loss] for row in Journal(run.metrics).rows() if loss in row]
    assert losses[-1] < left * losses[0]


# -- the language model -------------------------------------------------------------------------------------------


def test_the_tokenizers_named_are_those_there_are() -> None:
    from stoker.data.text.tokenizers import KINDS
    from stoker.training.stages.text import TOKENIZERS

    assert set(TOKENIZERS) == set(KINDS)


def test_perplexity_is_exp_of_the_loss_whatever_its_size(tmp_path: Path) -> None:
    stage = STAGES["lm"](None, tmp_path)
    assert stage.derive({"train/loss": 4.234, "lr": 1.0}) == {"train/ppl": pytest.approx(69.0, abs=0.05)}
    assert stage.derive({"eval/loss": 30.0})["eval/ppl"] == pytest.approx(math.exp(30))
    assert stage.derive({"eval/loss": 1000.0})["eval/ppl"] == math.inf


def test_max_samples_is_how_many_windows_are_trained_on(tmp_path: Path) -> None:
    options = OPTIONS | data_of("lm", tmp_path)
    trainer, _ = train(STAGES["lm"], new_run(tmp_path, STAGES["lm"]), **options | {"max_samples": 7, "max_steps": 1})
    assert trainer.order.size == 7
    everything, _ = train(STAGES["lm"], new_run(tmp_path, STAGES["lm"]), **options | {"max_samples": 0, "max_steps": 1})
    assert everything.order.size > 100


def test_a_text_too_short_for_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("\n".join(f"line {i}" for i in range(8)))
    with pytest.raises(UserError, match="one window of --max_seq_len 32 needs 33"):
        train(STAGES["lm"], new_run(tmp_path, STAGES["lm"]), **DATA["lm"] | {"dataset": str(tmp_path / "short.txt")})


def test_a_text_that_changed_is_refused_on_resume(tmp_path: Path) -> None:
    options = OPTIONS | data_of("lm", tmp_path)
    run = new_run(tmp_path, STAGES["lm"])
    train(stage_with(STAGES["lm"], StopAt(5)), run, **options)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text().replace("fire", "hire", 1))
    with pytest.raises(UserError, match="the data are not those of the interrupted run"):
        train(STAGES["lm"], run, resume=True)


def test_a_run_keeps_its_own_tokenizer(tmp_path: Path, own_home: Path) -> None:
    """The cache may be deleted, or hold another one by now."""
    options = OPTIONS | data_of("lm", tmp_path) | {"tokenizer": "bpe", "vocab_size": 280}
    run = new_run(tmp_path, STAGES["lm"])
    train(stage_with(STAGES["lm"], StopAt(5)), run, **options)
    shutil.rmtree(own_home / "tokenizers")
    trainer, ending = train(stage_with(STAGES["lm"], StopAt(-1)), run, resume=True)
    assert ending.state == "finished" and not (own_home / "tokenizers").exists()


def test_the_model_folder_has_the_trained_weights_and_the_tokenizer(tmp_path: Path) -> None:
    from stoker.model.gpt import GPT

    stage = STAGES["lm"](replace(STAGES["lm"].Config(), **OPTIONS | data_of("lm", tmp_path)), tmp_path)
    stage.prepare()
    model = stage.model()
    assert isinstance(model, GPT)
    (tmp_path / "model").mkdir()
    stage.export(model, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors",
                                                                      "tokenizer.json", "tokenizer_config.json"]


def test_samples_are_the_same_however_the_blocks_are_run(tmp_path: Path) -> None:
    """Nothing is compiled for them, and nothing drawn that the run would draw."""
    def compiler(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    stage = STAGES["lm"](replace(STAGES["lm"].Config(), **OPTIONS | data_of("lm", tmp_path)), tmp_path)
    stage.prepare()
    model = stage.model().eval()
    before, plain = torch.get_rng_state(), stage.samples(model)
    assert torch.equal(torch.get_rng_state(), before)
    checkpoint_blocks(stage.blocks(model))
    for block in stage.blocks(model):
        block.compile(backend=compiler)
    assert stage.samples(model) == plain and list(plain) == ["text/0", "text/1"]
    prompt = bytes(stage.dataset("validation")[0][:16].tolist()).decode()
    text = plain["text/0"]
    assert isinstance(text, Text) and text.content.startswith(f"[{prompt}]") and len(text.content) > 40
