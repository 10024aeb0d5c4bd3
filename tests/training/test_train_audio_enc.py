"""The audio encoder's stage: rates against jiwer, what a batch holds, what is left out, weights out and in again."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import pytest
import torch

import made_speech
from stoker import config
from stoker.config import UserError
from stoker.data.speech import audio, recordings
from stoker.data.speech.augmentation import Augmentation
from stoker.model.mel import LogMel
from stoker.monitors.blanks import Blanks
from stoker.training.core import bootstrap, pretrained
from stoker.training.core.evaluation import Evaluations
from stoker.training.core.figures import Moment
from stoker.training.core.media import Picture, Sound, Text, spectrogram
from stoker.training.core.step import losses
from stoker.training.train_audio_enc import AUGMENTS, AudioEncoder, Config

SMALL: dict[str, Any] = dict(d_model=32, num_heads=2, num_layers=2, d_ff=64, dropout=0.0, num_mels=40, batch_size=8,
                             mask_bands=6)


def prepared(folder: Path, **options: Any) -> Any:
    values = {"dataset": str(folder / "speech.csv")} | SMALL | options
    if values["dataset"] == str(folder / "speech.csv"):
        made_speech.write(folder)
    stage = AudioEncoder(replace(Config(), **values), folder)
    stage.prepare()
    return stage


# -- figures --------------------------------------------------------------------------------------------------------


def test_the_intervals_of_rates_are_by_speaker(tmp_path: Path) -> None:
    stage = prepared(tmp_path, held_out="anna,boris,carla", precision="fp32", num_workers=0)
    torch.manual_seed(0)
    model, known = stage.model(), Evaluations(stage, stage.cfg)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    [scores] = known.run("validation", model, stage.cfg, torch.device("cpu"), lambda: False) or []
    rows = stage.dataset("validation")
    wrong, length = scores.rates["eval/cer"]
    heard = [{"wrong": 0, "length": 0} for _ in range(3)]
    for row in range(len(rows)):
        mine = heard[["anna", "boris", "carla"].index(rows.utterances[row].speaker)]
        mine["wrong"], mine["length"] = mine["wrong"] + int(wrong[row]), mine["length"] + int(length[row])
    assert [len(rows[row].text) for row in range(len(rows))] == length.tolist()
    sums = [np.array([each[name] for each in heard]) for name in ("wrong", "length")]
    intervals = scores.intervals(0)
    assert intervals["eval/cer"] == pytest.approx(bootstrap.intervals({"cer": (sums[0], sums[1])})["cer"], rel=1e-12)
    assert intervals.keys() == {"eval/loss", "eval/wer", "eval/cer"}
    assert scores.metrics["eval/cer"] == sums[0].sum() / sums[1].sum()


def test_all_rows_are_all_rows_as_they_are(tmp_path: Path) -> None:
    """Also those whose text is in both splits, that would be too fast when played faster, or that --max_samples and
    --held_out leave out."""
    path = made_speech.write(tmp_path / "shared")
    lines = path.read_text().splitlines()
    text = lines[1].split(",")[1]
    path.write_text("\n".join([*lines[:9], *[line.replace(line.split(",")[1], text) for line in lines[9:13]]]))
    cfg = replace(Config(), **SMALL, dataset=str(path), max_samples=1, held_out="nobody", noise=20.0)
    stage = AudioEncoder(AudioEncoder.all_rows(cfg), tmp_path)
    stage.prepare()
    rows = Evaluations(stage, stage.cfg).rows(stage.evaluations()[0], "all")
    assert rows and len(rows.dataset) == 12 == len(rows.groups or ())
    heard = {clip.text: clip.waveform for clip in rows.dataset}
    for number, line in enumerate(lines[2:9], start=1):
        assert torch.allclose(heard[line.split(",")[1]], torch.from_numpy(audio.read(f"{path.parent}/{number}.flac")),
                              atol=1e-4)


def test_the_score_is_that_of_the_whole_set(tmp_path: Path) -> None:
    """Over uneven batches, from what the model heard; and of nothing heard it is 1."""
    stage = prepared(tmp_path)
    torch.manual_seed(0)
    model, rows = stage.model().eval(), stage.dataset("validation")
    torch.nn.init.normal_(model.head.weight, std=1.0)
    clips = [rows[row] for row in range(len(rows))]
    sums = {"wer": [0.0, 0.0], "cer": [0.0, 0.0]}
    with torch.no_grad():
        for part in (clips[:3], clips[3:]):
            for name, ratio in stage.score(model, stage.collate(part)).items():
                if name in sums:
                    sums[name] = [sums[name][0] + int(ratio.total.sum()), sums[name][1] + int(ratio.count.sum())]
        heard = [" ".join(stage.ctc_texts(*stage._logits(model, stage.collate([clip])))[0].split()) for clip in clips]
        torch.nn.init.zeros_(model.head.weight)
        model.head.bias.view(stage.cfg.head_frames, -1)[:, stage.tokenizer.end_of_text] = 9.0
        silent = stage.score(model, stage.collate(clips))
    said = [clip.text for clip in clips]
    assert any(heard) and heard != said
    assert sums["wer"][0] / sums["wer"][1] == pytest.approx(jiwer.wer(said, heard))
    assert sums["cer"][0] / sums["cer"][1] == pytest.approx(jiwer.cer(said, heard))
    assert [float(torch.as_tensor(silent[name].total).sum() / torch.as_tensor(silent[name].count).sum())
            for name in ("wer", "cer", "blank_share")] == [1, 1, 1]


def test_accumulation_is_a_bigger_batch(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    torch.manual_seed(0)
    model, rows = stage.model().train(), stage.dataset("train")
    clips = [rows[row] for row in range(7)]

    def gradient(parts: list[list[Any]]) -> tuple[float, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        ratios = [next(losses(stage, model, stage.collate(part), torch.device("cpu"), "fp32")) for part in parts]
        for ratio in ratios:
            ratio.total.backward()
        count = sum(ratio.count for ratio in ratios)
        total = sum(ratio.total.item() for ratio in ratios)
        return total / count, torch.cat([p.grad.flatten() for p in model.parameters()]) / count

    (whole, one), (parts, other) = gradient([clips]), gradient([clips[:2], clips[2:]])
    assert parts == pytest.approx(whole, rel=1e-4) and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


# -- rows -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_was_said(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    rows = stage.dataset("train")
    batch = stage.collate([rows[row] for row in (0, 1, 2)])
    start = 0
    for row, size in enumerate(batch["label_lengths"].tolist()):
        text = stage.tokenizer.decode(batch["labels"][start:start + size].tolist())
        assert text == batch["texts"][row] == rows[row].text
        assert not batch["waveforms"][row, batch["samples"][row]:].any()
        start += size
    assert stage.size(batch) == {"samples": 3, "audio_sec": sum(batch["samples"].tolist()) // 16000}


def test_changes_of_the_spectrogram_are_a_function_of_seed_epoch_and_row(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    rows = stage.dataset("train")
    stage.cfg.elastic = 0.1
    for name in "masks", "changes", "fields":
        size = len(rows)

        def draws(*items: int) -> torch.Tensor:
            """Of elastic fields those at their beginning: how many there are follows the longest recording."""
            found: torch.Tensor = stage.collate([rows[item] for item in items])[name]
            return found[:, :, :2] if name == "fields" else found

        assert torch.equal(draws(3, 5)[1], draws(5)[0]) and not torch.equal(draws(3)[0], draws(5)[0])
        assert not torch.equal(draws(5)[0], draws(5 + size)[0])
        before, stage.cfg.seed = draws(5), stage.cfg.seed + 1
        assert not torch.equal(draws(5), before)
        assert name == "fields" or 0 <= draws(5).min() and draws(5).max() < 1


def test_training_rows_are_changed_as_the_options_say_and_no_others(tmp_path: Path) -> None:
    stage = prepared(tmp_path, speed=0.2, gain=3.0, noise=25.0, pitch=1.0, reverb=0.3, babble=9.0, seed=5)
    train, validation = stage.dataset("train"), stage.dataset("validation")
    assert train.augmentation == Augmentation(speed=0.2, gain=3.0, noise=25.0, pitch=1.0, reverb=0.3, babble=9.0)
    assert train.seed == 5 and validation.augmentation == Augmentation()
    assert torch.equal(validation[0].waveform, validation[len(validation)].waveform)


def test_the_spectrograms_of_recordings_that_stay_as_they_are_stay_so_too(tmp_path: Path) -> None:
    """One by one, and beside others that are changed."""
    stage = prepared(tmp_path, **AUGMENTS["strong"] | {"unchanged": 0.5, "masks": 0, "narrow": 1.0})
    torch.manual_seed(0)
    model, rows = stage.model(), stage.dataset("train")
    clips = [rows[row] for row in range(12)]
    batch = stage.collate(clips)
    found, frames = stage._views(model, batch)[0]
    plain, lengths = model.mel(batch["waveforms"], batch["samples"])
    kept = [clip.unchanged for clip in clips]
    assert any(kept) and not all(kept), "a batch of both"
    for row, clip in enumerate(clips):
        same = frames[row] == lengths[row] and torch.allclose(found[row, :frames[row]], plain[row, :frames[row]],
                                                              atol=1e-5)
        assert same == clip.unchanged


def test_augment_is_a_word_for_options_that_were_not_typed() -> None:
    def resolved(word: str, *typed: str, **options: Any) -> Config:
        found: Config = AudioEncoder.resolve_defaults(replace(Config(), augment=word, **options), typed)[0]
        return found

    assert resolved("mild") == replace(Config(), augment="mild", compile=False)
    none, strong = resolved("none"), resolved("strong")
    numbers = [each.name for each in fields(AudioEncoder.Augmentation) if each.name not in ("augment", "masks")]
    assert not any(getattr(none, name) for name in numbers)
    assert all(getattr(strong, name) for name in numbers), "every option has a strength"
    typed = resolved("strong", "noise", "warp", noise=3.0, warp=0.0)
    assert (typed.noise, typed.warp) == (3.0, 0.0)
    assert replace(typed, noise=strong.noise, warp=strong.warp) == strong
    with pytest.raises(UserError, match="--mask_bands 40 must be less than the 40 of --num_mels"):
        resolved("strong", "mask_bands", mask_bands=40, num_mels=40)


def test_two_views_differ_in_their_masks_alone(tmp_path: Path) -> None:
    """Without masks the loss is that of one view, and nothing is apart."""
    stage = prepared(tmp_path, consistency=0.2, warp=0.1)
    torch.manual_seed(0)
    model, rows = stage.model(), stage.dataset("train")
    torch.nn.init.normal_(model.head.weight, std=1.0)
    batch = stage.collate([rows[row] for row in range(4)])
    (first, frames), (second, same) = stage._views(model, batch)
    assert torch.equal(frames, same) and not torch.equal(first, second)
    alike = (first == second).float().mean()
    assert 0.5 < alike < 1
    both = stage.loss(model, batch, Moment())
    assert not both.figures.keys() & both.terms.keys(), "the loop reports terms itself"
    assert both.terms["consistency"] > 0 and stage.weights(Moment()) == {"consistency": 0.2}
    stage.cfg = replace(stage.cfg, mask_bands=0, mask_time=0.0)
    unmasked = stage.loss(model, batch, Moment())
    evaluated = stage.loss(model.eval(), batch, Moment()).terms
    assert evaluated.keys() == stage.counts(batch, "main").keys() and evaluated["consistency"] == 0
    model.train()
    assert float(unmasked.terms["consistency"].detach()) == pytest.approx(0, abs=1e-4)
    stage.cfg = replace(stage.cfg, consistency=0.0)
    [(mel, _)] = stage._views(model, batch | {"masks": batch["masks"][:, :1]})
    one = stage.loss(model, batch | {"masks": batch["masks"][:, :1]}, Moment())
    assert one.terms.keys() == stage.counts(batch, "main").keys() == {"loss"} and stage.weights(Moment()) == {}
    assert float(one.terms["loss"].detach()) == pytest.approx(float(unmasked.terms["loss"].detach()), rel=1e-5)


def test_max_samples_is_how_many_are_trained_on(tmp_path: Path) -> None:
    few, everything = prepared(tmp_path, max_samples=5), prepared(tmp_path)
    assert [clip.text for clip in few.dataset("train")] == [
        each.text for each in everything.utterances["train"][:5]] and few.order().size == 5
    assert len(few.dataset("validation")) == len(everything.dataset("validation"))


def test_a_micro_batch_has_no_more_seconds_than_asked_for(tmp_path: Path) -> None:
    order = prepared(tmp_path, batch_seconds=2.0).order()
    parts = [part for step in range(order.steps_per_epoch) for part in order.rows(step)]
    assert max(len(part) * max(order.lengths[row] for row in part) for part in parts) <= 2 < 8 * min(order.lengths)


def test_evaluations_are_not_masked(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    torch.manual_seed(0)
    model, rows = stage.model(), stage.dataset("train")
    batch = stage.collate([rows[0]])
    other = batch | {"masks": torch.rand(1, 1, 2, 4), "changes": torch.rand_like(batch["changes"])}
    scores = [stage.score(model.eval(), each)["loss"].total for each in (batch, other)]
    assert torch.equal(*scores)
    for name in ("masks", "changes"):
        changed = batch | {name: other[name]}
        assert not torch.equal(stage._views(model, batch)[0][0], stage._views(model, changed)[0][0])


def test_compiled_batches_are_all_of_one_length(tmp_path: Path) -> None:
    stage = prepared(tmp_path, compile=True, max_mel_length=90, speed=0.3)  # up to 84 frames, played slowly 120
    rows = stage.dataset("train")
    lengths = {stage.collate([rows[item]])["waveforms"].shape[1] for item in range(3 * len(rows))}
    assert len(lengths) == 1 and lengths.pop() >= max(len(rows[item].waveform) for item in range(3 * len(rows)))
    stage = prepared(tmp_path, compile=True, max_mel_length=90, speed=0.3, pitch=6.0, rhythm=0.3)
    rows, model = stage.dataset("train"), stage.model()
    batches = [stage.collate([rows[item]]) for item in range(3 * len(rows))]
    assert all(batch["waveforms"].shape[1] >= batch["samples"] for batch in batches), "nothing is cut off"
    views = [stage._views(model, batch)[0] for batch in batches]
    assert len({mel.shape for mel, _ in views}) == 1 and max(int(frames) for _, frames in views) > 84
    assert all(mel.shape[1] >= frames for mel, frames in views)


def test_rows_without_an_alignment_are_left_out_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = str(made_speech.write(tmp_path / "quick", 60, seconds=0.07))
    with pytest.raises(UserError, match="not alignable"):
        prepared(tmp_path, dataset=dataset, downsample_time=8, head_frames=1)
    stage = prepared(tmp_path, dataset=dataset, head_frames=1, speed=0.0)
    frames = [stage._frames(int(each.seconds * 16000)) for each in stage.utterances["train"]]
    assert frames and all(count >= len(each.text) for count, each in zip(frames, stage.utterances["train"]))
    caplog.clear()
    quicker = prepared(tmp_path, dataset=dataset, head_frames=1, speed=0.5)
    assert len(quicker.utterances["train"]) < 60 - len(quicker.utterances["validation"])
    assert "recordings have more labels than frames at 25 a second" in caplog.text


def test_validation_rows_are_never_left_out_for_being_quick(tmp_path: Path) -> None:
    """Its errors count, its loss, which is infinite, does not."""
    made_speech.write(tmp_path, 40)
    quick = made_speech.texts(3, seed=5)
    lines = (tmp_path / "speech.csv").read_text().replace("speaker\n", "speaker,split\n", 1)
    for row, text in enumerate(quick):
        audio.write(tmp_path / f"quick{row}.flac", made_speech.said(text, 0.02))
        lines += f"\nquick{row}.flac,{text},erika,validation"
    (tmp_path / "quick.csv").write_text(lines)
    stage = prepared(tmp_path, dataset=str(tmp_path / "quick.csv"), head_frames=1)
    rows = stage.dataset("validation")
    assert [rows[row].text for row in range(len(rows))] == quick
    with torch.no_grad():
        scores = stage.score(stage.model().eval(), stage.collate([rows[row] for row in range(3)]))
    assert scores["wer"].count.sum() == 6 and int(scores["loss"].count) == 0 == float(scores["loss"].total)


def test_the_frames_that_are_counted_on_are_those_of_the_model(tmp_path: Path) -> None:
    for downsample_time, head_frames in ((2, 1), (4, 2), (8, 1), (8, 4)):
        stage = prepared(tmp_path, downsample_time=downsample_time, head_frames=head_frames)
        model = stage.model().eval()
        for samples in (1600, 4000, 12345, 15999):
            _, (frames,) = model(*model.mel(torch.randn(1, samples), torch.tensor([samples])))
            assert stage._frames(samples) == frames


def test_extra_data_are_trained_on_but_for_texts_of_validation(tmp_path: Path) -> None:
    extra = made_speech.write(tmp_path / "extra", 60, seed=1)
    header, *rows = extra.read_text().splitlines()
    extra.write_text("\n".join([header, *(f"{row}'s brother" for row in rows)]))
    alone = prepared(tmp_path)
    judged = alone.utterances["validation"][0].text
    with open(extra, "a") as file:
        file.write(f"\n0.flac,{judged},anna")
    both = prepared(tmp_path, extra_dataset=str(extra))
    assert both.utterances["validation"] == alone.utterances["validation"]
    assert len(both.utterances["train"]) > len(alone.utterances["train"]) + 40
    assert judged not in {each.text for each in both.utterances["train"]}


def test_speakers_of_validation_are_not_in_extra_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    extra = made_speech.write(tmp_path / "extra", 60, seed=1)
    heard = {each.speaker for each in recordings.read(str(extra))["train"]}
    stage = prepared(tmp_path, extra_dataset=str(extra), held_out="boris", shared_texts=True)
    assert {each.speaker for each in stage.utterances["validation"]} == {"boris"}
    assert "boris" not in {each.speaker for each in stage.utterances["train"]} and len(stage.utterances["train"]) > 40
    assert "boris" in heard
    assert "30 recordings; 15 of texts or speakers of the validation set are left out" in caplog.text


def test_of_extra_data_the_training_part_alone_is_trained_on(tmp_path: Path) -> None:
    """Without what the test part says."""
    path = made_speech.write(tmp_path / "data", 40)
    rows = path.read_text().splitlines()
    parts = ["split", *["train"] * 30, *["validation"] * 5, *["test"] * 5]
    path.write_text("\n".join(f"{row},{part}" for row, part in zip(rows, parts)))
    extra = tmp_path / "data" / "extra.csv"
    extra.write_text("\n".join(["audio_path,transcription,split", *(
        f"{row}.flac,{text},{part}" for row, text, part in
        ((0, "bag", "train"), (1, made_speech.texts(40)[37], "train"), (2, "cab", "validation"), (3, "dab", "test")))]))
    stage = prepared(tmp_path, dataset=str(path), extra_dataset=str(extra))
    assert [each.text for each in stage.utterances["train"]] == [*made_speech.texts(40)[:30], "bag"]


def test_extra_data_that_are_of_no_use_are_reported_with_their_option(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("audio_path,transcription\n")
    with pytest.raises(UserError, match="^--extra_dataset .*empty.csv: names no sound files"):
        prepared(tmp_path, extra_dataset=str(tmp_path / "empty.csv"))


def test_held_out_speakers_are_validated_by(tmp_path: Path) -> None:
    stage = prepared(tmp_path, held_out="carla, david")
    assert {each.speaker for each in stage.utterances["validation"]} == {"carla", "david"}
    assert {each.speaker for each in stage.utterances["train"]} == {"anna", "boris"}


def test_a_run_that_goes_on_keeps_its_labels(tmp_path: Path) -> None:
    """Though the file that they were taken from is gone."""
    first = prepared(tmp_path, labels="bpe", vocab_size=280)
    first.begin()
    gone = str(tmp_path / "gone.json")
    assert prepared(tmp_path, labels=gone).tokenizer.fingerprint == first.tokenizer.fingerprint
    cfg = replace(Config(), dataset=str(tmp_path / "speech.csv"), labels=gone)
    assert AudioEncoder.check(cfg, resumed=True) == [] and "--labels" in AudioEncoder.check(cfg, resumed=False)[0]


def test_other_texts_and_other_sounds_are_other_data(tmp_path: Path) -> None:
    one, same = (prepared(tmp_path, dataset=str(made_speech.write(tmp_path / name))) for name in "ab")
    assert one.made_from() == same.made_from()
    path, known = tmp_path / "b" / "speech.csv", one.made_from()["speech"]
    text = same.utterances["train"][0].text
    path.write_text(path.read_text().replace(f",{text},", f",{text[::-1]},"))
    assert prepared(tmp_path, dataset=str(path)).made_from()["speech"] != known
    audio.write(tmp_path / "a" / "0.flac", made_speech.said("gag"))
    assert prepared(tmp_path, dataset=one.cfg.dataset).made_from()["speech"] != known


def test_tokens_have_half_as_many_frames_as_characters() -> None:
    nano = AudioEncoder.resolve_defaults(replace(Config(), **AudioEncoder.presets["nano"]), ())[0]
    assert (nano.labels, nano.vocab_size, nano.head_frames) == ("bpe", 300, 1)
    for labels, typed, expected in (("chars", (), 2), ("bpe", (), 1), ("bpe", ("head_frames",), 2)):
        assert AudioEncoder.resolve_defaults(replace(Config(), labels=labels), typed)[0].head_frames == expected


def test_it_is_compiled_only_where_that_was_asked_for() -> None:
    for asked, expected in ((None, False), (False, False), (True, True)):
        assert AudioEncoder.resolve_defaults(replace(Config(), compile=asked), ())[0].compile is expected


@pytest.mark.parametrize("argv, part", [
    (["--downsample_time", "3"], "--downsample_time must be 2, 4 or 8, is 3"),
    (["--num_heads", "5"], "--num_heads 5 does not divide --d_model 192 into even parts"),
    (["--dataset", "nowhere.csv"], "--dataset nowhere.csv: there is no such file"),
    (["--extra_dataset", "nowhere.csv"], "--extra_dataset nowhere.csv: there is no such file"),
    (["--extra_dataset", "librispeech-100"], "--extra_dataset librispeech-100 is not on this machine: ./run/data.sh "
     "download --dataset librispeech-100 fetches it"),
    (["--labels", "words"], "--labels: 'words' is none of chars, bpe"), (["--speed", "0.9"], "--speed must be"),
    (["--noise", "1e9"], "--noise must be at least 0 and at most 100"),
])
def test_a_mistake_is_reported_before_anything_is_read(argv: list[str], part: str) -> None:
    with pytest.raises(UserError) as told:
        config.parse(Config, AudioEncoder.presets, argv, lambda cfg: AudioEncoder.check(cfg, resumed=False))
    assert any(part in problem for problem in told.value.problems), told.value.problems


# -- what is seen ---------------------------------------------------------------------------------------------------


def test_samples_show_what_was_said_and_heard(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    made, first = stage.samples(stage.model().eval()), stage.dataset("validation")[0]
    text, picture, sound = (made[name] for name in ("text/transcripts", "picture/spectrogram", "sound/first"))
    assert isinstance(text, Text) and text.content.startswith(f"said   {first.text}\nheard  ")
    mel, _ = LogMel(40)(first.waveform[None], torch.tensor([len(first.waveform)]))
    drawn = spectrogram(mel[0].numpy(), 100, LogMel(40).frequencies().numpy()).pixels
    assert isinstance(picture, Picture) and np.array_equal(picture.pixels, drawn)
    assert isinstance(sound, Sound) and len(sound.samples) == len(first.waveform) and sound.rate == 16000


def test_samples_show_the_training_speech_before_and_after_augmentation(tmp_path: Path) -> None:
    stage = prepared(tmp_path, speed=0.2, noise=5.0, warp=0.2, elastic=0.1)
    made, rows = stage.samples(stage.model().eval()), stage.dataset("train")
    for kind, field in ("sound", "samples"), ("picture", "pixels"):
        before, after = (getattr(made[f"{kind}/training_{when}"], field) for when in ("before", "after"))
        assert before.shape != after.shape or not np.array_equal(before, after)
    assert np.array_equal(made["sound/training_before"].samples, rows.samples(0))
    assert np.array_equal(made["sound/training_after"].samples, rows[0].waveform.numpy())
    rows.augmentation, rows.seed = replace(rows.augmentation, unchanged=0.6), 0
    while not rows[0].unchanged:
        rows.seed += 1
    changed = next(clip for epoch in range(20) if not (clip := rows[epoch * len(rows)]).unchanged)
    shown = stage.samples(stage.model().eval())["sound/training_after"]
    assert np.array_equal(shown.samples, changed.waveform.numpy())


def test_only_blanks_for_long_are_reported_once_until_something_is_heard(tmp_path: Path) -> None:
    alert, trainer = Blanks(tmp_path / "alerts.jsonl"), SimpleNamespace(step=0, steps=3000)

    def told(shares: list[float]) -> int:
        before = alerts()
        for share in shares:
            trainer.step += 100
            alert.on_log(trainer, {"train/blank_share": share})  # type: ignore[arg-type]
        return alerts() - before

    def alerts() -> int:
        return len((tmp_path / "alerts.jsonl").read_text().splitlines()) if alert.alerts.exists() else 0

    assert told([1.0, 1.0, 1.0]) == 0 and told([0.9]) == 0, "each training begins so"

    def resumed() -> Blanks:
        again = Blanks(alert.alerts)
        again.load_state_dict(alert.state_dict())
        return again

    assert told([1.0, 1.0, 1.0]) == 0
    alert = resumed()
    assert told([1.0, 1.0, 1.0]) == 1
    alert = resumed()
    assert told([1.0, 1.0]) == 0 and told([0.5, 1.0, 1.0, 1.0, 1.0]) == 1
    trainer.steps = 500  # of a short run a tenth is less than it takes to begin
    assert told([0.5, 1.0, 1.0]) == 0 and told([1.0]) == 1


# -- out, and in again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels, vocab_size", [("chars", 512), ("bpe", 280)])
def test_a_model_folder_hears_what_the_run_heard(tmp_path: Path, labels: str, vocab_size: int) -> None:
    stage = prepared(tmp_path, labels=labels, vocab_size=vocab_size)
    torch.manual_seed(0)
    model, folder = stage.model().eval(), tmp_path / "model"
    folder.mkdir()
    stage.export(model, folder)
    pretrained.note(folder, stage.name, 3, config.to_json(stage.cfg), {"eval/wer": 0.25})
    source = pretrained.find(str(folder))
    assert source.scores == {"eval/wer": 0.25}
    parsed = config.parse(Config, AudioEncoder.presets, [])
    again: Any = AudioEncoder(pretrained.apply_options(AudioEncoder, parsed, source).config, folder)
    again.reopen()
    loaded = again.model().eval()
    source.load(again, loaded)
    batch = stage.collate([stage.dataset("validation")[0]])
    assert torch.equal(stage._logits(model, batch)[0], again._logits(loaded, batch)[0])
    assert again.tokenizer.decode(batch["labels"].tolist()) == batch["texts"][0]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stage, other = prepared(tmp_path), prepared(tmp_path, d_ff=128)
    stage.export(stage.model(), tmp_path)
    with pytest.raises(UserError, match=r"encoder.blocks.0.mlp.up.weight is \(64, 32\) there and \(128, 32\) here"):
        other.load(other.model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        stage.load(stage.model(), tmp_path)
    with pytest.raises(UserError, match="is of another program"):
        AudioEncoder.options_from(pretrained.find(str(tmp_path)))
