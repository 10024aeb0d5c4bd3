"""The reader's stage: rates against jiwer, what a batch holds, padding and order, weights out and in again."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import pytest
import torch

import made_lines
from stoker import config
from stoker.config import Parsed, UserError
from stoker.data.pictures.views import View
from stoker.model import ctc
from stoker.training.core import pretrained
from stoker.training.core.evaluation import Evaluations
from stoker.training.core.figures import Moment
from stoker.training.core.media import Picture, Text
from stoker.training.core.step import losses
from stoker.training.train_ocr import OCR, Augmentation, Config

SMALL: dict[str, Any] = dict(stem_width=4, d_model=32, num_heads=2, num_layers=1, decoder_layers=1, d_ff=64,
                             batch_size=4)


def prepared(folder: Path, **options: Any) -> Any:
    if "dataset" not in options:
        options["dataset"] = str(made_lines.write(folder, lines=60))
    stage = OCR(replace(Config(), **SMALL | options), folder)
    stage.prepare()
    return stage


def views(stage: Any, split: str = "validation") -> list[View]:
    rows = stage.dataset(split)
    return [rows[row] for row in range(len(rows))]


def scribbling(stage: Any) -> Any:
    """A model that reads something, and something else of each line."""
    torch.manual_seed(0)
    model = stage.model().eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return model


def totals(stage: Any, model: Any, *batches: list[View]) -> dict[str, list[float]]:
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for batch in batches:
            for name, ratio in stage.score(model, stage.collate(batch)).items():
                before = sums.get(name, [0.0, 0.0])
                sums[name] = [old + float(torch.as_tensor(new).sum()) for old, new in zip(before, ratio)]
    return sums


def test_all_rows_are_evaluated_as_they_are(tmp_path: Path) -> None:
    """Those of the training split too, whatever is changed, held out or left out in training."""
    path = str(made_lines.write(tmp_path / "data", lines=60))
    plain = prepared(tmp_path, dataset=path, **{name: 0.0 for name in vars(Augmentation())})
    stage = OCR(OCR.all_rows(replace(Config(), **SMALL, dataset=path, max_samples=2, held_out="nobody")), tmp_path)
    stage.prepare()
    rows = Evaluations(stage, stage.cfg).rows(stage.evaluations()[0], "all")
    expected = views(plain, "train") + views(plain)
    assert rows and len(rows.dataset) == rows.total == len(expected) == 60
    assert all(torch.equal(rows.dataset[row].pixels, expected[row].pixels) for row in range(60))


# -- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_case", [False, True])
def test_rates_are_those_of_jiwer_on_the_whole_set(tmp_path: Path, ignore_case: bool,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lines read wrongly in all ways that there are, over uneven batches."""
    stage = prepared(tmp_path, ignore_case=ignore_case, valid_share=0.3)
    rows = views(stage)
    wrong = [lambda text: text, str.upper, lambda text: text[1:], lambda text: f" {text} x", lambda text: "",
             lambda text: text.replace(" ", ""), lambda text: text.replace(" ", "  ")]
    read = {row.text: wrong[number % len(wrong)](row.text) for number, row in enumerate(rows)}
    batches = [rows[:5], rows[5:]]
    queue = iter(batches)
    monkeypatch.setattr(stage, "texts", lambda written: [read[row.text] for row in next(queue)])
    model = scribbling(stage)
    with torch.no_grad():
        heads = [[stage.tokenizer.decode(ids) for ids in ctc.greedy(seen.logits, seen.lengths, blank=model.blank)]
                 for batch in map(stage.collate, batches) for seen in [model(batch["pixels"], batch["widths"])]]
    sums = totals(stage, model, *batches)
    said, found = ([text.lower() if ignore_case else text for text in texts] for texts in (read.keys(), read.values()))
    rate = {name: total / count for name, (total, count) in sums.items()}
    assert rate["cer"] == pytest.approx(jiwer.cer(said, found), abs=1e-12) and 0 < rate["cer"] < 1
    heard = [stage._compared(text) for texts in heads for text in texts]
    assert rate["ctc_cer"] == pytest.approx(jiwer.cer(said, heard), abs=1e-12) and rate["ctc_cer"] > 0.5
    assert rate["wer"] == pytest.approx(jiwer.wer(said, found), abs=1e-12)
    assert rate["exact"] == sum(a == b.strip() for a, b in zip(said, found)) / len(said) > 0


def test_padding_and_the_order_of_batches_change_no_figure(tmp_path: Path) -> None:
    stage = prepared(tmp_path, valid_share=0.3)
    model, rows = scribbling(stage), views(stage)
    together = totals(stage, model, rows)
    for other in ([[row] for row in rows], [rows[::-1][:7], rows[::-1][7:]]):
        found = totals(stage, model, *other)
        assert found.keys() == together.keys() == {"loss", "text_loss", "ctc_loss", "ctc_cer", "cer", "wer", "exact"}
        for name, sums in together.items():
            assert found[name] == pytest.approx(sums, rel=1e-4), name
    with torch.no_grad():
        read = stage.texts(stage.written(model, model(*(stage.collate(rows)[name] for name in ("pixels", "widths")))))
    assert len(set(read)) > 3, "the lines make a difference"


def test_the_loss_is_that_of_torch(tmp_path: Path) -> None:
    """Cross-entropy over all logits and CTC by torch, line by line and without padding; each line's end counts too."""
    stage = prepared(tmp_path, ctc_weight=0.25)
    model, rows, end = scribbling(stage), views(stage), stage.tokenizer.end_of_text
    expected = count = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(stage.encode(row.text))
            seen = model(row.pixels[None], torch.tensor([row.pixels.shape[2]]))
            tokens = torch.cat([torch.tensor([end]), ids])[None]
            logits = model.decoder.logits(model.decoder(tokens, model.memory(seen)))[0]
            written = torch.nn.functional.cross_entropy(logits, torch.cat([ids, torch.tensor([end])]), reduction="sum")
            aligned = torch.nn.functional.ctc_loss(seen.logits.log_softmax(-1).transpose(0, 1), ids[None],
                                                   seen.lengths, torch.tensor([len(ids)]), end, reduction="sum")
            expected, count = expected + float(0.75 * written + 0.25 * aligned), count + len(ids) + 1
        loss = next(losses(stage, model, stage.collate(rows), torch.device("cpu"), "fp32"))
    assert float(loss.total) == pytest.approx(expected, rel=1e-4) and loss.count == count


def test_without_ctc_the_decoder_alone_is_trained(tmp_path: Path) -> None:
    stage = prepared(tmp_path, ctc_weight=0.0)
    model = stage.model()
    loss = stage.loss(model, stage.collate(views(stage)), Moment())
    loss.terms["loss"].backward()
    assert not loss.figures and not model.head.weight.requires_grad and model.head.weight.grad is None
    assert model.encoder.stem.linear.weight.grad.abs().sum() > 0
    assert "ctc_cer" not in totals(stage, model.eval(), views(stage))


# -- data -----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_what_its_rows_hold(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    rows, end = views(stage, "train")[:4], stage.tokenizer.end_of_text
    batch = stage.collate(rows)
    for row, view in enumerate(rows):
        width, ids = view.pixels.shape[2], stage.encode(view.text)
        assert torch.equal(batch["pixels"][row, :, :, :width], view.pixels) and batch["widths"][row] == width
        assert batch["tokens"][row, :len(ids) + 1].tolist() == [end, *ids] and stage.tokenizer.decode(ids) == view.text
    # what follows each token, in place
    T = batch["tokens"].shape[1]
    for place, target in zip(batch["places"].tolist(), batch["targets"].tolist()):
        row, at = divmod(place, T)
        assert target == [*stage.encode(rows[row].text), end][at]
    assert len(batch["places"]) == sum(len(stage.encode(view.text)) + 1 for view in rows)
    assert stage.size(batch) == {"lines": 4}


def test_batches_are_of_like_width(tmp_path: Path) -> None:
    stage = prepared(tmp_path, batch_width=500)
    order, rows = stage.order(), stage.dataset("train")
    dealt = [part for step in range(order.steps_per_epoch) for part in order.rows(step)]
    assert Counter(row for part in dealt for row in part) == Counter(range(len(rows)))
    for part in dealt:
        widths = [rows.pixels(row).shape[2] for row in part]
        assert len(part) == 1 or max(widths) * len(part) <= 500
    assert order.by_epoch, "each epoch shows a line otherwise"


def test_validation_lines_are_not_augmented(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    for split, changes in (("validation", False), ("train", True)):
        rows = stage.dataset(split)
        assert any(not torch.equal(rows[row].pixels, rows[row + len(rows)].pixels)
                   for row in range(len(rows))) == changes, split


def test_pages_are_not_parted(tmp_path: Path) -> None:
    stage = prepared(tmp_path, group_by="([^/]*)_[^/]*$", held_out="3,4")
    pages = {split: {Path(each.path).stem.partition("_")[0] for each in rows} for split, rows in stage.pictures.items()}
    assert pages["validation"] == {"3", "4"} and not pages["train"] & pages["validation"]


def test_compiled_batches_are_all_of_one_shape(tmp_path: Path) -> None:
    """Also the widest line, stretched and leaning."""
    stage = prepared(tmp_path, compile=True, stretch=0.3, slant=1.0)
    rows = stage.dataset("train")
    views = [rows[item] for item in range(20 * len(rows))]
    batches = [stage.collate([view]) for view in views]
    assert len({(batch["pixels"].shape, batch["tokens"].shape) for batch in batches}) == 1
    columns, widest = batches[0]["pixels"].shape[3], max(view.pixels.shape[2] for view in views)
    assert 0.9 * columns < widest <= columns
    assert batches[0]["tokens"].shape[1] == max(len(view.text) for view in views) + 1


@pytest.mark.parametrize("ctc_weight", [0.3, 0.0])
def test_lines_that_cannot_be_aligned_are_not_trained_on(tmp_path: Path, ctc_weight: float) -> None:
    """Where nothing is to be aligned they may stay."""
    made_lines.write(tmp_path, lines=60)
    with open(tmp_path / "lines.csv", "a", newline="", encoding="utf-8") as file:
        made_lines.drawn("i").save(tmp_path / "99_60.png")
        csv.writer(file).writerow(["99_60.png", "far more than can stand there"])
    stage = prepared(tmp_path, dataset=str(tmp_path / "lines.csv"), group_by="([^/]*)_[^/]*$", held_out="3",
                     ctc_weight=ctc_weight)
    assert len(stage.pictures["train"]) == 57 - bool(ctc_weight)


def test_lines_that_could_come_too_narrow_are_not_trained_on(tmp_path: Path) -> None:
    """As wide as their text needs, and in training now and then narrower."""
    made_lines.write(tmp_path, lines=60)
    with open(tmp_path / "lines.csv", "a", newline="", encoding="utf-8") as file:
        made_lines.drawn("x").resize((48, 32)).save(tmp_path / "99_60.png")  # 12 states
        csv.writer(file).writerow(["99_60.png", "abcdefghijkl"])
    for stretch, rows in ((0.0, 57), (0.2, 56)):
        stage = prepared(tmp_path, dataset=str(tmp_path / "lines.csv"), group_by="([^/]*)_[^/]*$", held_out="3",
                         stretch=stretch)
        assert len(stage.pictures["train"]) == rows
    assert len(prepared(tmp_path, dataset=str(tmp_path / "lines.csv"), max_samples=7).dataset("train")) == 7


def test_validation_rows_that_cannot_be_aligned_have_errors_and_no_ctc_loss(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    rows = views(stage)[:1]
    narrow = rows[0]._replace(pixels=rows[0].pixels[:, :, :5])
    loss, wrong, written = (totals(stage, scribbling(stage), [narrow])[name] for name in ("loss", "cer", "text_loss"))
    assert 0 < loss[0] < float("inf") and wrong[1] == len(narrow.text)
    assert loss[0] == pytest.approx(0.7 * written[0])


def test_mistakes_are_reported_before_anything_is_started() -> None:
    with pytest.raises(UserError) as told:
        config.parse(OCR.Config, OCR.presets, ["--image_height", "30", "--d_model", "30"])
    text = str(told.value)
    assert "--image_height 30 is no multiple of 16" in text and "--num_heads 4" in text
    assert OCR.check(replace(Config(), dataset="nowhere.csv", labels="chrs"), resumed=False)[1].startswith("--labels")


def test_labels_are_no_texts(tmp_path: Path) -> None:
    """The name of a class, or of a folder, does not stand in the picture."""
    (tmp_path / "data").mkdir()
    table = made_lines.write(tmp_path / "data" / "receipts", lines=12)
    for name, text in csv.reader(table.read_text().splitlines()[1:-1]):
        (table.parent / name).with_suffix(".txt").write_text(text)
    table.unlink()
    stage = prepared(tmp_path, dataset=str(tmp_path / "data"), valid_share=0.3)
    assert sum(map(len, stage.pictures.values())) == 11, "one has no text"


def test_characters_that_are_no_labels_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = prepared(tmp_path)
    first.begin()
    made_lines.write(tmp_path / "other", lines=20)
    table = tmp_path / "other" / "lines.csv"
    table.write_text(table.read_text().replace("tea", "t\u00ea\u00e0").replace("salt", "\u015d"))
    prepared(tmp_path, dataset=str(table))
    assert "3 characters of the texts are not among the labels" in caplog.text and "\u00e0 \u00ea \u015d" in caplog.text
    caplog.clear()
    prepared(tmp_path / "new", dataset=str(table))
    assert "not among the labels" not in caplog.text


@pytest.mark.parametrize("beam", [1, 5])
def test_a_text_has_no_more_labels_than_it_may(tmp_path: Path, beam: int) -> None:
    stage = prepared(tmp_path, max_text_length=30)
    model, batch = scribbling(stage), stage.collate(views(stage, "train")[:8])
    model.head.bias.data[stage.tokenizer.end_of_text] -= 50  # CTC finds a label in each state
    model.decoder.embedding.weight.data[stage.tokenizer.end_of_text] = 0
    with torch.no_grad():
        seen = model(batch["pixels"], batch["widths"])
        free = [len(each.tokens) for each in stage.written(model, seen, beam)]
        stage.cfg.max_text_length = 3
        del stage._most_labels
        cut = [len(each.tokens) for each in stage.written(model, seen, beam)]
    assert all(0 < length <= states for length, states in zip(free, seen.lengths.tolist())) and set(cut) == {3}


def test_a_beam_searches(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    model, batch = scribbling(stage), stage.collate(views(stage, "train")[:8])
    with torch.no_grad():
        seen = model(batch["pixels"], batch["widths"])
        one, many = (stage.written(model, seen, beam) for beam in (1, 6))
    assert any(a.tokens != b.tokens and a.log_prob < b.log_prob for a, b in zip(one, many))


def test_bytes_are_given_the_room_of_characters(tmp_path: Path) -> None:
    assert prepared(tmp_path / "a", max_text_length=30)._most_labels == 30
    assert prepared(tmp_path / "b", max_text_length=30, labels="bpe", vocab_size=300)._most_labels == 120


# -- out, and in again ----------------------------------------------------------------------------------------------


def test_weights_go_out_and_in_again(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    model, folder = scribbling(stage), tmp_path / "model"
    folder.mkdir()
    stage.export(model, folder)
    pretrained.note(folder, "ocr", 3, vars(stage.cfg), {})
    again, loaded = pretrained.opened(pretrained.find(str(folder)), OCR, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert again.tokenizer.fingerprint == stage.tokenizer.fingerprint


def test_without_ctc_a_model_is_read_without_it(tmp_path: Path) -> None:
    stage = prepared(tmp_path, ctc_weight=0.0)
    model, folder, rows = scribbling(stage), tmp_path / "model", views(stage)
    folder.mkdir()
    stage.export(model, folder)
    pretrained.note(folder, "ocr", 3, vars(stage.cfg), {})
    again, loaded = pretrained.opened(pretrained.find(str(folder)), OCR, "cpu")
    batch = stage.collate(rows)
    with torch.no_grad():
        seen = model(batch["pixels"], batch["widths"])
        assert again.written(loaded, loaded(batch["pixels"], batch["widths"])) == stage.written(model, seen)
    assert not loaded.joint and prepared(tmp_path).model().joint


def test_other_data_are_gone_on_with_by_the_labels_of_the_first(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "a")
    stage.export(stage.model(), tmp_path / "a")
    pretrained.note(tmp_path / "a", "ocr", 3, vars(stage.cfg), {})
    source = pretrained.find(str(tmp_path / "a"))
    cfg = pretrained.apply_options(OCR, Parsed(Config(), frozenset(), ""), source).config
    assert (cfg.d_model, cfg.decoder_layers, cfg.labels) == (32, 1, str(tmp_path / "a" / "tokenizer.json"))
    with pytest.raises(UserError, match="--stem_width 8 differs from the 4"):
        pretrained.apply_options(OCR, Parsed(replace(Config(), stem_width=8), frozenset({"stem_width"}), ""), source)


def test_the_worst_lines_are_shown_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = prepared(tmp_path, valid_share=0.3)
    rows = views(stage)
    read = [row.text if number % 3 else "$?$" for number, row in enumerate(rows)]
    parts = iter([read[start:start + 4] for start in range(0, len(read), 4)])
    monkeypatch.setattr(stage, "texts", lambda written: next(parts))
    shown = stage.samples(scribbling(stage))
    text, picture = shown["text/worst"], shown["picture/worst"]
    assert isinstance(text, Text) and isinstance(picture, Picture) and picture.pixels.std() > 0
    wrong = sum(each == "$?$" for each in read)
    lines = text.content.splitlines()
    assert [line == "read  $?$" for line in lines[1::2]] == [number < wrong for number in range(len(lines) // 2)]
