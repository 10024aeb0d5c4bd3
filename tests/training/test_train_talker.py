"""The talker's stage: what each phase trains, whose codec and whose voices, what is spelled, who judges."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import made_speech
from stoker.config import UserError
from stoker.daemon import registry
from stoker.training.core import pretrained
from stoker.training.core.snapshots import Snapshots
from stoker.training.train_talker import BOOKS, Config, TalkerStage
from toys import WITHOUT_MONITORS, new_run, train

SMALL: dict[str, Any] = dict(d_model=16, num_layers=1, codec_d_model=16, codec_layers=1, latent=4, num_books=3,
                             book_size=8, num_mels=20, dropout=0.0, voices=4, judge="none", batch_size=8)


def prepared(folder: Path, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    values = SMALL | {"dataset": str(made_speech.write(folder / "speech"))} | options
    stage = TalkerStage(replace(Config(), **values), folder)
    stage.prepare()
    return stage


def test_codec_and_aligner_learn_first_then_the_talker_on_what_they_have_become(tmp_path: Path) -> None:
    run = new_run(tmp_path, TalkerStage)
    options = SMALL | {"dataset": str(made_speech.write(tmp_path / "speech"))} | WITHOUT_MONITORS
    train(TalkerStage, run, **options, max_samples=24, max_steps=6, codec_share=0.5, grad_accum_steps=1,
          keep_last_n_snapshots=5, eval_interval=6, log_interval=6)  # an epoch is 3 steps
    begun, half, done = (load_file(run.snapshots / name / "model.safetensors")
                         for name in ("snapshot_step_00000000", "snapshot_epoch_0001", "snapshot_epoch_0002"))

    def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert changed(begun, half) == {"codec", "aligner"} and changed(half, done) == {"talker"}
    assert "codec.quantizer.books.0.entries" in half


def test_another_talkers_codec_stays_as_it_is(tmp_path: Path) -> None:
    options = SMALL | {"dataset": str(made_speech.write(tmp_path / "speech"))} | WITHOUT_MONITORS
    short = dict(max_steps=4, grad_accum_steps=1, eval_interval=4, log_interval=4)
    first, second = new_run(tmp_path / "1", TalkerStage), new_run(tmp_path / "2", TalkerStage)
    train(TalkerStage, first, **options, **short)
    codec = Snapshots(first.snapshots, {}).found()[-1]
    trainer, _ = train(TalkerStage, second, **options | {"d_model": 24}, **short, codec_ckpt=str(codec), seed=7)
    theirs = {name: tensor for name, tensor in load_file(codec / "model.safetensors").items() if "codec." in name}
    ours = trainer.model.state_dict()
    assert theirs and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(UserError, match="--num_books 2 differs from the 3 of"):
        train(TalkerStage, new_run(tmp_path / "3", TalkerStage), **options | {"num_books": 2}, **short,
              codec_ckpt=str(codec))


def test_more_speakers_than_voices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3 speakers, --voices is 1: type --voices 3, or take recordings of one"):
        prepared(tmp_path, voices=1)
    stage = prepared(tmp_path)
    clips = [stage.dataset("train")[row] for row in range(8)]
    numbers = {clip.speaker: number for clip, number in zip(clips, stage.collate(clips)["voices"].tolist())}
    assert numbers == {speaker: stage.voices[speaker] for speaker in numbers} and len(set(numbers.values())) == 3


def test_how_many_books_a_recording_uses_follows_from_seed_epoch_and_row(tmp_path: Path) -> None:
    stage, whole = prepared(tmp_path), prepared(tmp_path, book_dropout=0.0)
    rows = stage.dataset("train")
    assert BOOKS and whole.collate([rows[row] for row in range(20)])["books"].tolist() == [3] * 20
    many = [stage.collate([rows[row] for row in range(start, start + 30)])["books"] for start in (0, 0, 3000)]
    assert torch.equal(many[0], many[1]) and not torch.equal(many[0], many[2])
    counts = torch.bincount(torch.cat([stage.collate([rows[row] for row in range(start, start + 40)])["books"]
                                       for start in range(0, 2000, 40)]), minlength=4).float() / 2000
    assert counts.tolist() == pytest.approx([0, 1 / 6, 1 / 6, 2 / 3], abs=0.04), "half with 1 to 3, evenly"


def test_texts_are_spelled_in_letters_or_sounds_with_silence_around(tmp_path: Path) -> None:
    letters, phones = prepared(tmp_path), prepared(tmp_path / "phones", spelling="phones")
    assert letters.tokenizer.decode(letters.encode("bad cab")) == " bad cab "
    assert phones.spelled("bad cab") == "bˈæd kˈæb"
    text = phones.dataset("train").utterances[0].text
    assert phones.tokenizer.decode(phones.encode(text)) == f" {phones.spelled(text)} "


def test_without_an_audio_encoder_spectrograms_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "runs", list)
    cfg, lines = TalkerStage.resolve_defaults(Config(), ())
    assert cfg.judge == "none" and any("run_train_audio_enc.sh --preset nano trains one" in line for line in lines)
    stage = prepared(tmp_path)
    assert stage.best == ("eval/mel", "min") and [part.name for part in stage.parts()] == ["codec"]
    assert TalkerStage(replace(Config(), judge="some"), tmp_path).best == ("eval/wer", "min")


def test_few_bits_a_second_are_warned_of() -> None:
    tiny, lines = TalkerStage.resolve_defaults(replace(Config(), **TalkerStage.presets["tiny"], judge="none"), ())
    assert lines == [line for line in lines if line.startswith("The codes have 175 bits a second")] and tiny
    assert not TalkerStage.resolve_defaults(replace(Config(), judge="none"), ())[1]


def test_an_exported_model_says_the_same(tmp_path: Path) -> None:
    from stoker.model.speaking import likeliest

    stage = prepared(tmp_path)
    torch.manual_seed(0)
    model = stage.model().eval()
    (tmp_path / "model").mkdir()
    stage.export(model, tmp_path / "model")
    pretrained.note(tmp_path / "model", "talker", 1, vars(stage.cfg), {})
    opened, again = pretrained.opened(pretrained.find(str(tmp_path / "model")), TalkerStage, "cpu")
    assert opened.voices == stage.voices
    text = torch.tensor([stage.encode("bad cab")])
    for voice in (0, 1):
        one, other = (each.speak(text, torch.tensor([text.shape[1]]), torch.tensor([voice]), likeliest)[0]
                      for each in (model, again))
        assert torch.equal(one, other)


def test_the_uses_of_a_book_are_counted(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    uses = torch.zeros(2, 3, 8)
    uses[:, 0, :2], uses[:, 1], uses[0, 2, 3] = 5, 1, 9
    found = stage.judge_books({"uses": uses})
    assert [found[f"used_share_{book}"] for book in (1, 2, 3)] == [0.25, 1.0, 0.125]
    assert [found[f"entropy_{book}"] for book in (1, 2, 3)] == pytest.approx([1.0, 3.0, 0.0], abs=1e-5)
