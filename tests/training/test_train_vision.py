"""The vision encoder's stage: what a batch holds, figures of the whole set, contrast, weights out and in again."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import made_pictures
from stoker import config
from stoker.config import Parsed, UserError
from stoker.data.pairs import NO_CLASS, Register
from stoker.data.pictures.resized import Frame, opened
from stoker.data.pictures.views import Augmentation
from stoker.model.contrastive import views
from stoker.model.conv_trunk import Whitening
from stoker.training.assembly import eval_only, launch
from stoker.training.assembly.job import Job
from stoker.training.core import optim, pretrained
from stoker.training.core.evaluation import Evaluations, evaluate
from stoker.training.core.figures import Moment
from stoker.training.core.media import Picture, Text
from stoker.training.core.stage import discover
from stoker.training.core.step import losses
from stoker.training.train_vision import LANGUAGE_MODEL, Config, Vision, caption_lines
from test_stages import data_of, stage_with
from toys import StopAt, assert_same, new_run, session, train

SMALL: dict[str, Any] = dict(image_size=16, patch_size=8, d_model=32, num_heads=2, num_layers=1, d_ff=64, dropout=0.0,
                             text_d_model=16, text_num_heads=2, text_layers=1, embed_dim=16, batch_size=8)


def prepared(folder: Path, **options: Any) -> Any:
    values = SMALL | options
    if "dataset" not in values:
        values["dataset"] = str(made_pictures.write(folder / "data"))
    stage = Vision(replace(Config(), **values), folder)
    stage.prepare()
    return stage


def captioned(folder: Path) -> Path:
    """30 pictures with 10 captions; two of the captions are of the same picture, which has two files."""
    folder.mkdir()
    rows = ["image,text,split"]
    for row in range(30):
        made_pictures.make_picture(folder / f"{row}.png", seed=min(row, 28), height=16, width=16)
        rows.append(f"{row}.png,caption {row % 10},{'validation' if row >= 20 else 'train'}")
    (folder / "data.csv").write_text("\n".join(rows))
    return folder / "data.csv"


# -- rows -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_is_seen_and_said(tmp_path: Path) -> None:
    stage = prepared(tmp_path, dataset=str(captioned(tmp_path / "data")))
    rows = stage.dataset("train")
    pairs = [rows[row] for row in (0, 13, 3, 10, 7)]
    batch = stage.collate(pairs)
    read = [stage.tokenizer.decode(ids[:length]) for ids, length in zip(batch["tokens"].tolist(), batch["lengths"])]
    assert sorted(read) == ["caption 0", "caption 3", "caption 7"]
    assert [read[place] for place in batch["caption"]] == [f"caption {row % 10}" for row in (0, 13, 3, 10, 7)]
    assert batch["pixels"].shape == (5, 3, 16, 16) and batch["pixels"].dtype == torch.uint8
    assert len(set(batch["numbers"][:, 0].tolist())) == 5 and set(batch["numbers"][:, 2].tolist()) == {-1}
    assert stage.size(batch) == {"images": 5}


def test_the_same_picture_and_the_same_class_have_one_number_in_all_the_data(tmp_path: Path) -> None:
    stage = prepared(tmp_path, dataset=str(captioned(tmp_path / "data")))
    numbers = stage.register.rows["validation"]
    assert numbers[-1, 0] == numbers[-2, 0] and len(numbers[:, 0].unique()) == 9
    labelled = prepared(tmp_path / "labelled")
    assert labelled.register.labels == sorted(made_pictures.COLOURS)
    for split, rows in labelled.pictures.items():
        names = [labelled.register.labels[number] for number in labelled.register.rows[split][:, 2]]
        assert names == [each.label for each in rows]
    assert labelled.register.caption_of() == {name: f"a photo of {name}" for name in made_pictures.COLOURS}


def test_pictures_are_changed_by_epoch_in_training_only(tmp_path: Path) -> None:
    stage = prepared(tmp_path, crop=0.3, colour=0.3)
    rows, order = stage.dataset("train"), stage.order()
    first, later = (order.items(step)[0][0] for step in (0, 3 * order.steps_per_epoch))
    assert first < len(rows) <= later
    row = first % len(rows)
    assert not torch.equal(rows[row].pixels, rows[row + len(rows)].pixels)
    judged = stage.dataset("validation")
    assert torch.equal(judged[0].pixels, judged[len(judged)].pixels)


def test_training_rows_are_changed_as_the_options_say(tmp_path: Path) -> None:
    stage = prepared(tmp_path, crop=0.3, flip=0.2, colour=0.4, seed=5)
    views = stage.dataset("train").views
    assert (views.augmentation, views.seed) == (Augmentation(crop=0.3, flip=0.2, colour=0.4), 5)


def test_max_samples_is_how_many_are_trained_on(tmp_path: Path) -> None:
    few, everything = prepared(tmp_path, max_samples=1), prepared(tmp_path / "other", valid_share=0.25)
    assert len(few.dataset("train")) == few.order().size == 1 < len(few.dataset("validation"))
    assert len(everything.dataset("validation")) == 10 and everything.order().size == 30


def test_pictures_fit_as_asked(tmp_path: Path) -> None:
    wide = made_pictures.make_picture(tmp_path / "data" / "0.png", 0, height=10, width=40)
    made_pictures.make_picture(tmp_path / "data" / "1.png", 1, height=10, width=40)
    (tmp_path / "data" / "a.csv").write_text("image,text,split\n0.png,a,validation\n" + "".join(
        f"{row}.png,text {row},train\n" for row in (1, 2)))
    made_pictures.make_picture(tmp_path / "data" / "2.png", 2, height=10, width=40)
    for fit in ("crop", "pad", "stretch"):
        stage = prepared(tmp_path, dataset=str(tmp_path / "data" / "a.csv"), fit=fit)
        assert torch.equal(stage.dataset("validation")[0].pixels, Frame(16, 16, fit)(opened(str(wide))))


def test_groups_are_held_out_by_their_names(tmp_path: Path) -> None:
    stage = prepared(tmp_path, group_by=r"(\d)\d*\.png$", held_out="2, 3")
    groups = {split: {each.group for each in rows} for split, rows in stage.pictures.items()}
    assert groups == {"train": set("1456789") | {"0"}, "validation": {"2", "3"}}


def test_a_run_that_goes_on_keeps_its_pieces(tmp_path: Path) -> None:
    """Though the file that they were taken from is gone, and the language model."""
    first = prepared(tmp_path, tokenizer="chars")
    first.begin()
    gone = str(tmp_path / "gone.json")
    assert prepared(tmp_path, tokenizer=gone).tokenizer.fingerprint == first.tokenizer.fingerprint
    cfg = replace(Config(), dataset=first.cfg.dataset, tokenizer=gone, text_model=str(tmp_path / "gone"))
    assert Vision.check(cfg, resumed=True) == []
    assert [problem.partition(":")[0] for problem in Vision.check(cfg, resumed=False)] == ["--tokenizer"]


def test_options_of_a_tower_of_its_own_are_refused_beside_a_language_model() -> None:
    cfg = replace(Config(), text_model="some")
    assert Vision.resolve_defaults(cfg, {"dataset", "lr"}) == (cfg, []) == Vision.resolve_defaults(cfg, set())
    assert Vision.resolve_defaults(Config(), {"tokenizer", "text_layers"}) == (Config(), [])
    with pytest.raises(UserError, match="--vocab_size, --text_layers: of the text tower, which --text_model replaces"):
        Vision.resolve_defaults(cfg, {"vocab_size", "text_layers", "lr"})


def test_a_language_model_reads_as_much_as_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = prepared(tmp_path, tokenizer="chars")
    stage.sources[LANGUAGE_MODEL] = SimpleNamespace(options={"max_seq_len": 8})
    with caplog.at_level("WARNING"):
        found = stage.captions(["a photo of red", "a photo"])
    assert [stage.tokenizer.decode(ids.tolist()) for ids in found] == ["a photo ", "a photo"]
    assert "1 captions have more than the 8 tokens" in caplog.text


def test_the_caption_of_a_class_is_that_of_most_of_its_pictures() -> None:
    rows = torch.tensor([[0, 0, 0], [1, 1, 0], [2, 1, 0], [3, 2, 1], [4, 3, NO_CLASS]])
    register = Register(["a cat", "cats", "a dog", "a house"], ["cat", "dog"],
                        {"train": rows, "validation": torch.tensor([[5, 0, 0]] * 3)})
    assert register.caption_of() == {"cat": "cats", "dog": "a dog"}


def test_a_caption_is_read_up_to_its_limit_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = captioned(tmp_path / "data")
    data.write_text(re.sub(r"caption (\d)", r"caption \1 " + "and so on " * 9, data.read_text()))
    with caplog.at_level("INFO"):
        stage = prepared(tmp_path, dataset=str(data), max_text_length=12)
    assert stage.register.captions[3] == "caption 3 an" and "30 captions are longer than 12 characters" in caplog.text
    with pytest.raises(UserError, match="all training pictures have the same caption"):
        prepared(tmp_path, dataset=str(data), max_text_length=8)


@pytest.mark.parametrize("accum, part", [(1, "micro-batch of 8"), (4, "The 4 micro-batches of a step are not")])
def test_it_says_what_is_contrasted(tmp_path: Path, caplog: pytest.LogCaptureFixture, accum: int, part: str) -> None:
    with caplog.at_level("INFO"):
        prepared(tmp_path, grad_accum_steps=accum, loss="softmax")
    assert part in caplog.text and not Vision.divisible


@pytest.mark.parametrize("argv, part", [
    (["--patch_size", "12", "--stem", "patch"], "--patch_size 12 does not divide --image_size 64"),
    (["--patch_size", "24"], "--patch_size 24: strided convolutions make patches of 2, 4, 8"),
    (["--patch_size", "24", "--backbone", "conv", "--stem", "patch"], "--patch_size 24: strided convolutions make"),
    (["--num_layers", "0"], "--num_layers 0: only --backbone conv sees without a transformer"),
    (["--num_heads", "3"], "--num_heads 3 does not divide --d_model 128"),
    (["--text_num_heads", "3"], "--text_num_heads 3 does not divide --text_d_model 128"),
    (["--template", "a photo"], "--template 'a photo' has no {} in it"),
    (["--dataset", "nowhere.csv"], "--dataset nowhere.csv: there is no such file"),
    (["--tokenizer", "words"], "--tokenizer: 'words' is none of chars, bpe"),
    (["--loss", "hinge"], "--loss: 'hinge' is none of"),
    (["--flip", "2"], "--flip must be"),
])
def test_a_mistake_is_reported_before_anything_is_read(argv: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        config.parse(Config, Vision.presets, argv, lambda cfg: Vision.check(cfg, resumed=False))
    assert any(part in problem for problem in caught.value.problems), caught.value.problems


def test_all_rows_are_evaluated_as_they_are(tmp_path: Path) -> None:
    """Those of the training split too, in the frame itself, whatever is changed, held out or left out in training."""
    path = str(made_pictures.write(tmp_path / "data"))
    plain = prepared(tmp_path, dataset=path, crop=0.0, flip=0.0, colour=0.0, valid_share=0.3)
    cfg = replace(plain.cfg, crop=0.5, flip=1.0, colour=0.5, max_samples=2, held_out="nobody")
    stage = Vision(Vision.all_rows(cfg), tmp_path)
    stage.prepare()
    rows = Evaluations(stage, stage.cfg).rows(stage.evaluations()[0], "all")
    assert rows and len(rows.dataset) == rows.total == 40
    expected = [pair for split in ("train", "validation") for pair in plain.dataset(split)]
    assert all(torch.equal(*pair) for row in range(40) for pair in zip(rows.dataset[row], expected[row]))


# -- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_figures_are_of_the_whole_set_whatever_the_batches(tmp_path: Path, loss: str) -> None:
    """All but the loss, which is of batches as large as in training; each is what one batch of all gives."""
    stage = prepared(tmp_path, dataset=str(captioned(tmp_path / "data")), loss=loss)
    torch.manual_seed(0)
    model = stage.model()
    found = {}
    for size in (1, 4, 10):
        stage.cfg = replace(stage.cfg, batch_size=size, precision="fp32")
        done = evaluate(stage, model, stage.dataset("validation"), stage.cfg, torch.device("cpu"), lambda: False)
        assert done and done.size == {"images": 10}
        found[size] = done.metrics
    for size in (1, 4):
        assert {name: value for name, value in found[size].items() if name != "eval/loss"} == pytest.approx(
            {name: value for name, value in found[10].items() if name != "eval/loss"})
    rows = stage.dataset("validation")
    with torch.no_grad():
        whole = next(losses(stage, model.eval(), stage.collate([rows[row] for row in range(10)]), torch.device("cpu"),
                            "fp32"))
    assert found[10]["eval/loss"] == pytest.approx(float(whole.total) / whole.count, rel=1e-5)
    assert {"eval/acc", "eval/text_recall_5", "eval/image_recall_1", "eval/shuffled_acc"} < found[10].keys()


def test_the_loss_of_an_evaluation_does_not_depend_on_the_order_of_the_data(tmp_path: Path) -> None:
    """Pictures of one class, one after another, would have nothing to be told from."""
    stage = prepared(tmp_path, batch_size=4, grad_accum_steps=1, loss="softmax")
    seen = torch.nn.functional.normalize(torch.randn(400, 16), dim=1)
    numbers = torch.stack([torch.arange(400), torch.arange(400) // 100, torch.full((400,), -1)], 1)
    gathered = {"seen": seen, "read": seen[numbers[:, 1]], "numbers": numbers,
                "terms": torch.tensor([10.0, 0.0]).expand(400, 2)}
    assert stage.judge(gathered)["loss"].total > 1


def test_a_run_learns_and_its_best_is_by_accuracy(tmp_path: Path) -> None:
    run = new_run(tmp_path, Vision)
    trainer, ending = train(Vision, run, **SMALL | dict(
        dataset=str(made_pictures.write(tmp_path / "data", 200)), max_steps=60, grad_accum_steps=1, lr=5e-3,
        eval_interval=60, crop=0.0, colour=0.0))
    assert ending.state == "finished" and trainer.best >= 0.9
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()][-1]
    assert metrics["eval/label_acc"] == metrics["eval/acc"] and metrics["train/acc"] > 0.8


@pytest.mark.parametrize("name, of", [("lm", "model folder"), ("lm", "snapshot"), ("text", "snapshot")])
def test_a_frozen_language_model_reads_the_captions_and_stays(tmp_path: Path, name: str, of: str) -> None:
    """A run goes on, and a model folder works, when the language model's own run is gone. No snapshot has its weights.
    Its tokenizer, which is trained, goes along."""
    values = data_of(name, tmp_path) | dict(max_steps=2, tokenizer="bpe" if name == "lm" else "bytes", vocab_size=280)
    lm = session(discover()[name], new_run(tmp_path, discover()[name]), **values)
    with lm.run.lock():
        assert lm.train().state == "finished"
    named = pretrained.of_run(lm.run) if of == "model folder" else pretrained.find(
        str(max(lm.run.snapshots.glob("snapshot_*"))))
    data, run = str(captioned(tmp_path / "pictures")), new_run(tmp_path, Vision)
    sitting = session(Vision, run, **SMALL | dict(dataset=data, text_model=str(named.folder), max_steps=4))
    with run.lock():
        assert sitting.train().state == "finished"
    held = safetensors.torch.load_file(max(run.snapshots.glob("snapshot_*")) / "model.safetensors")
    assert "text.head.weight" in held and not [name for name in held if "language_model" in name]
    theirs = pretrained.opened(named, discover()[name], "cpu")[1].state_dict()
    lm.run.remove()
    stage, model = pretrained.opened(pretrained.of_run(run), Vision, "cpu")
    assert all(torch.equal(weight, theirs[each]) for each, weight in model.text.language_model.state_dict().items())
    assert not (run.models / "best" / "model.safetensors").read_bytes().count(b"language_model")
    batch = stage.tokens(stage.captions(["caption 1", "caption 2"]))
    assert model.captions(batch["tokens"], batch["lengths"]).shape == (2, 16)
    weights = pretrained.of_run(run)
    [done] = eval_only.evaluated(Job(Vision, Parsed(sitting.job.cfg, frozenset(), ""), evaluated=weights))
    assert done.metrics["eval/acc"] == weights.scores["eval/acc"]
    more = session(Vision, run, resume=True, max_steps=6)
    with run.lock():
        trainer, snapshot = more.prepare()
        assert trainer.fit(snapshot).state == "finished"
    moved = Path(shutil.copytree(run.models / "best", tmp_path / "moved"))
    run.remove()
    job = launch.decide(Vision, ["--init_from", str(moved), "--dataset", data])
    assert job.cfg.text_model == str(moved / "parts" / LANGUAGE_MODEL) and job.cfg.d_model == 32
    again = new_run(tmp_path / "again", Vision)
    begun, _ = train(Vision, again, **{**vars(job.cfg), "init_from": str(moved), "max_steps": 1, "device": "cpu",
                                       "batch_size": 8})
    assert torch.equal(begun.model.text.language_model.token_embedding.weight, theirs["token_embedding.weight"])


def test_a_language_model_that_is_none_is_refused_before_a_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="part text.language_model: there is no run 'nowhere'"):
        launch.decide(Vision, ["--text_model", "nowhere"])
    run = new_run(tmp_path, Vision)
    sitting = session(Vision, run, **SMALL | dict(dataset=str(captioned(tmp_path / "pictures")), max_steps=1))
    with run.lock():
        sitting.train()
    with pytest.raises(UserError, match="text.language_model: .* is of stage vision, it takes weights of lm or text"):
        launch.decide(Vision, ["--text_model", str(run.path)])


# -- classes and convolutions ---------------------------------------------------------------------------------------

CONV: dict[str, Any] = SMALL | dict(backbone="conv", num_layers=0, optimizer="muon", tta=True, flip=0.5, shift=0.2)


def test_with_classes_a_picture_is_compared_with_the_captions_of_all(tmp_path: Path) -> None:
    """Though two of four are in the batch; against the definition of label smoothing (Szegedy et al. 2016)."""
    stage = prepared(tmp_path, label_smoothing=0.2)
    rows = stage.dataset("train")
    batch = stage.collate([rows[row] for row in range(len(rows)) if rows[row].numbers[2] in (0, 2)][:5])
    captions = [stage.tokenizer.decode(ids[:n]) for ids, n in zip(batch["tokens"].tolist(), batch["lengths"])]
    assert sorted(captions) == [f"a photo of {name}" for name in sorted(made_pictures.COLOURS)]
    labels = [stage.register.labels[number] for number in batch["numbers"][:, 2]]
    assert [captions[place] for place in batch["caption"]] == [f"a photo of {name}" for name in labels]
    torch.manual_seed(0)
    model = stage.model().eval()
    found = stage.loss(model, batch, Moment("main"))
    seen, read = model.pictures(batch["pixels"]), model.captions(batch["tokens"], batch["lengths"])
    logs = (model.log_scale.exp() * seen @ read.T).detach().double().log_softmax(1)
    own = [captions.index(f"a photo of {name}") for name in labels]
    expected = -torch.stack([0.8 * logs[row, place] + 0.2 * logs[row].mean() for row, place in enumerate(own)]).sum()
    assert found.terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(found.figures["acc"].total) == sum(int(logs[row].argmax()) == place for row, place in enumerate(own))


def test_the_loss_is_by_classes_where_captions_are_classes(tmp_path: Path) -> None:
    assert prepared(tmp_path).loss_name == "classes" and prepared(tmp_path, loss="softmax").loss_name == "softmax"
    data = str(captioned(tmp_path / "captioned"))
    assert prepared(tmp_path / "other", dataset=data).loss_name == "softmax"
    with pytest.raises(UserError, match="--loss classes: the captions of --dataset .* are not classes"):
        prepared(tmp_path / "other", dataset=data, loss="classes")


def test_captions_are_classes_where_each_has_one_and_no_other_has_it() -> None:
    def register(captions: int, labels: int, *rows: tuple[int, int]) -> bool:
        numbers = torch.tensor([(number, *row) for number, row in enumerate(rows)])
        return Register(["a"] * captions, ["b"] * labels, {"train": numbers, "validation": numbers[:1]}
                        ).captions_are_classes()

    assert register(2, 2, (0, 0), (1, 1), (0, 0))
    assert not register(2, 2, (0, 0), (1, 1), (1, 0)), "a class with two captions"
    assert not register(1, 2, (0, 0), (0, 1)), "a caption of two classes"
    assert not register(2, 1, (0, 0), (1, NO_CLASS)), "a caption without a class"


@pytest.mark.parametrize("tta", [False, True])
def test_with_classes_figures_are_of_the_whole_set_whatever_the_batches(tmp_path: Path, tta: bool) -> None:
    """Against one batch of all; with test-time augmentation, against the mean over the views."""
    stage = prepared(tmp_path, **CONV | {"tta": tta, "label_smoothing": 0.1, "valid_share": 0.4})
    torch.manual_seed(0)
    model, rows = stage.model().eval(), stage.dataset("validation")
    whole = stage.collate([rows[row] for row in range(len(rows))])
    with torch.no_grad():
        seen, read = model.pictures(whole["pixels"]), model.captions(whole["tokens"], whole["lengths"])
        if tta:
            seen = torch.nn.functional.normalize(sum(map(model.pictures, views(whole["pixels"]))), dim=1)
        logits = model.logits(seen, read)
        expected = torch.nn.functional.cross_entropy(logits, whole["caption"], label_smoothing=0.1)
    for size in (1, 4):
        stage.cfg = replace(stage.cfg, batch_size=size, precision="fp32")
        done = evaluate(stage, model, rows, stage.cfg, torch.device("cpu"), lambda: False)
        assert done and done.metrics["eval/loss"] == pytest.approx(float(expected), rel=1e-5)
        assert done.metrics["eval/acc"] == pytest.approx(float((logits.argmax(1) == whole["caption"]).float().mean()))


def test_a_convolutional_run_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """Weights, filters, running statistics and the optimizer, with accumulation and blocks computed again."""
    options = CONV | dict(dataset=str(made_pictures.write(tmp_path / "data")), grad_accum_steps=2, max_steps=6,
                          batch_size=4, eval_interval=3, gradient_checkpointing=True, ema_decay=0.9)
    runs = [new_run(tmp_path, Vision), new_run(tmp_path / "other", Vision)]
    train(stage_with(Vision, StopAt(-1)), runs[0], **options)
    trainer, _ = train(stage_with(Vision, StopAt(4)), runs[1], **options)
    assert trainer.step == 4
    train(stage_with(Vision, StopAt(-1)), runs[1], resume=True)
    held = [max(run.snapshots.glob("snapshot_*")) for run in runs]
    weights = [safetensors.torch.load_file(each / "model.safetensors") for each in held]
    assert_same(*weights)
    assert_same(*(torch.load(each / "state.pt", weights_only=True) for each in held))
    assert weights[0]["vision.stem.blocks.0.norm1.mean"].any() and weights[0]["vision.stem.whitening.weight"].any()


def test_the_blocks_of_the_backbone_learn_nine_times_as_fast(tmp_path: Path) -> None:
    """By Muon their convolutions, and nothing else where there is no transformer."""
    stage = prepared(tmp_path, **CONV)
    model = stage.model()
    optimizer = optim.build(stage.phases()[0], model, stage.cfg, stage.blocks(model))
    optim.set_rate(optimizer, 0.01)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group, fast = groups[id(parameter)], name.startswith("vision.stem.blocks.")
        assert group["lr"] == pytest.approx(0.09 if fast else 0.01), name
        assert bool(group.get("matrix")) == (fast and "convolution" in name), name


def test_checkpointed_blocks_compute_the_same(tmp_path: Path) -> None:
    options = CONV | dict(dataset=str(made_pictures.write(tmp_path / "data")), max_steps=3)
    ends = [train(Vision, new_run(tmp_path / str(on), Vision), **options | {"gradient_checkpointing": on})[0]
            for on in (False, True)]
    assert_same(*(end.model.state_dict() for end in ends))


def test_a_new_convolutional_model_is_whitened_by_the_first_pictures(tmp_path: Path) -> None:
    stage = prepared(tmp_path, **CONV)
    model, rows = stage.model(), stage.dataset("train")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [stage.collate([rows[row] for row in range(start, start + 8)]) for start in (0, 8, 16)]
    stage.initialize(model, iter(batches))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"vision.stem.whitening.weight", "vision.stem.whitening.bias"}
    expected = Whitening(1)
    expected.fit(torch.cat([batch["pixels"] for batch in batches]))
    assert torch.equal(model.vision.stem.whitening.weight, expected.weight)
    plain = prepared(tmp_path / "vit")
    plain.initialize(plain.model(), iter([]))


def test_a_model_from_before_there_were_backbones_is_a_vit(tmp_path: Path) -> None:
    stage = prepared(tmp_path, loss="softmax")
    stage.export(stage.model(), tmp_path)
    options = config.to_json(stage.cfg)
    del options["backbone"]
    pretrained.note(tmp_path, stage.name, 3, options, {})
    assert pretrained.opened(pretrained.find(str(tmp_path)), Vision, "cpu")[0].cfg.backbone == "vit"


# -- what is seen ---------------------------------------------------------------------------------------------------


def test_samples_show_pictures_with_captions_and_who_is_taken_for_whom(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    with torch.no_grad():
        made = stage.samples(stage.model().eval())
    assert {"picture/captions", "picture/attention", "picture/confusion"} < made.keys()
    shown = [media for name, media in made.items() if name.startswith("picture/")]
    assert all(isinstance(media, Picture) and media.pixels.std() > 5 for media in shown)
    text = made["text/captions"]
    assert isinstance(text, Text) and text.content.startswith("caption: a photo of ")
    other = prepared(tmp_path / "other", dataset=str(captioned(tmp_path / "captioned")))
    with torch.no_grad():
        assert "picture/confusion" not in other.samples(other.model().eval())


def test_below_a_picture_stands_what_is_right_and_what_is_not() -> None:
    assert caption_lines("a cat", ["a dog", "a cat"]) == "caption: a cat\n- a dog\n= a cat"


# -- out, and in again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer, loss, backbone", [
    ("bpe", "softmax", "vit"), ("chars", "sigmoid", "vit"), ("bpe", "auto", "conv"), ("chars", "classes", "conv")])
def test_a_model_folder_sees_what_the_run_saw(tmp_path: Path, tokenizer: str, loss: str, backbone: str) -> None:
    stage = prepared(tmp_path, tokenizer=tokenizer, loss=loss, vocab_size=280, backbone=backbone)
    torch.manual_seed(0)
    model, folder = stage.model().eval(), tmp_path / "model"
    folder.mkdir()
    stage.export(model, folder)
    pretrained.note(folder, stage.name, 3, config.to_json(stage.cfg), {"eval/acc": 0.75})
    again, loaded = pretrained.opened(pretrained.find(str(folder)), Vision, "cpu")
    rows = stage.dataset("validation")
    batch = stage.collate([rows[row] for row in range(len(rows))])
    with torch.no_grad():
        assert all(torch.equal(*both) for both in zip(stage._vectors(model, batch), again._vectors(loaded, batch)))
        assert torch.equal(model.terms(), loaded.terms())
    assert json.loads((folder / "config.json").read_text())["labels"]["red"] == "a photo of red"


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stage, other = prepared(tmp_path), prepared(tmp_path, d_ff=128)
    stage.export(stage.model(), tmp_path)
    with pytest.raises(UserError, match=r"vision.blocks.0.mlp.up.weight is \(64, 32\) there and \(128, 32\) here"):
        other.load(other.model(), tmp_path)
    with pytest.raises(UserError, match="is of another program"):
        Vision.options_from(pretrained.find(str(tmp_path)))


def test_other_pictures_are_other_data(tmp_path: Path) -> None:
    one, same = prepared(tmp_path / "one"), prepared(tmp_path / "two")
    assert one.made_from() == same.made_from()
    path = Path(same.pictures["train"][0].path)
    pixels = np.array(Image.open(path))
    Image.fromarray(255 - pixels).save(path)
    assert prepared(tmp_path / "two", dataset=same.cfg.dataset).made_from()["pictures"] != one.made_from()["pictures"]


def test_other_captions_are_other_data(tmp_path: Path) -> None:
    one = prepared(tmp_path)
    table = Path(one.cfg.dataset)
    table.write_text(table.read_text().replace("\n8.png,red", "\n8.png,blue"))
    assert prepared(tmp_path, dataset=one.cfg.dataset).made_from()["pictures"] != one.made_from()["pictures"]
