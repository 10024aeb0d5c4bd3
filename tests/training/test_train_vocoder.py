"""The vocoder's stage: who trains whom in a GAN, segments by seed, the bar of Griffin-Lim, weights out and in again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import made_speech
from stoker import config
from stoker.config import UserError
from stoker.training.core import pretrained
from stoker.training.core.figures import Moment
from stoker.training.train_vocoder import Config, Vocoder

SMALL: dict[str, Any] = dict(d_model=16, num_layers=1, num_mels=20, batch_size=4, segment_seconds=0.2,
                             discriminator_width=4, max_steps=10)


def prepared(folder: Path, **options: Any) -> Any:
    values = SMALL | {"dataset": str(made_speech.write(folder / "speech"))} | options
    stage = Vocoder(replace(Config(), **values), folder)
    stage.prepare()
    return stage


@pytest.mark.parametrize("generator", ["istft", "hifigan"])
def test_each_phase_trains_its_own_network(tmp_path: Path, generator: str) -> None:
    """The generator is trained against the discriminators, which get no gradient that stays; these on its sound, which
    gives it none."""
    stage = prepared(tmp_path, generator=generator, discriminators=True, discriminator_start=0.3, channels=16)
    generating, judging = stage.phases()
    assert (generating.first, judging.first, judging.runs(2), judging.runs(3)) == (0, 3, False, True)
    torch.manual_seed(0)
    model = stage.model()
    batch = stage.collate([stage.dataset("train")[row] for row in range(4)])
    early = stage.loss(model, batch, Moment("generator", 2, 10))
    assert not early.terms["adversarial"].requires_grad and float(early.terms["features"]) == 0
    for name in "discriminators", "generator":
        own, other = (getattr(model, each) for each in (name, {"generator": "discriminators"}.get(name, "generator")))
        model.zero_grad()
        other.requires_grad_(False)  # as the trainer does
        loss = stage.loss(model, batch, Moment(name, 3, 10, early.passed.detach()))
        torch.stack([*loss.terms.values()]).sum().backward()
        assert all(parameter.grad is not None for parameter in own.parameters())
        assert not any(parameter.grad is not None for parameter in other.parameters())
        other.requires_grad_(True)


def test_terms_are_those_that_are_counted_and_weighed(tmp_path: Path) -> None:
    plain, gan = prepared(tmp_path), prepared(tmp_path, discriminators=True)
    batch = plain.collate([plain.dataset("train")[row] for row in range(3)])
    assert plain.counts(batch, "generator") == {"mel": 3, "stft": 3}
    assert gan.counts(batch, "generator") == dict.fromkeys(["mel", "stft", "adversarial", "features"], 3)
    assert gan.counts(batch, "discriminators") == {"discriminators": 3}
    assert plain.weights(Moment()) == {"mel": 45, "stft": 1}
    assert [gan.weights(Moment(step=step))["features"] for step in (0, 1, 2, 9)] == [0, 0, 2, 2]


def test_the_place_of_a_segment_follows_from_seed_epoch_and_row(tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    rows = stage.dataset("train")
    first, again, next_epoch = (stage.collate([rows[row + start] for row in range(5)])["places"]
                                for start in (0, 0, len(rows)))
    assert torch.equal(first, again) and not torch.equal(first, next_epoch)
    assert ((first >= 0) & (first < 1)).all()


def test_griffin_lim_is_scored_beside_it(tmp_path: Path) -> None:
    """An untrained vocoder is far worse; a generator that cheats, with the recording itself, has no distance."""
    stage = prepared(tmp_path)
    torch.manual_seed(0)
    model = stage.model().eval()
    batch = stage.collate([stage.dataset("validation")[0]])
    with torch.no_grad():
        found = {name: float(ratio.total / ratio.count) for name, ratio in stage.score(model, batch).items()}
        assert 0 < found["griffin_lim_mel"] < found["mel"] and 0 < found["griffin_lim_stft"] < found["stft"]
        _, real, _ = model.pairs(batch)
        model.generator.forward = lambda mel: real
        cheat = stage.score(model, batch)
    assert float(cheat["mel"].total) == float(cheat["stft"].total) == 0


def test_an_exported_model_is_the_generator_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stage = prepared(tmp_path, discriminators=True)
    torch.manual_seed(0)
    model = stage.model().eval()
    (tmp_path / "model").mkdir()
    stage.export(model, tmp_path / "model")
    assert all(name.startswith("generator.") for name in load_file(tmp_path / "model" / "model.safetensors"))
    pretrained.note(tmp_path / "model", "vocoder", 1, vars(stage.cfg), {})
    _, again = pretrained.opened(pretrained.find(str(tmp_path / "model")), Vocoder, "cpu")
    mel = torch.randn(1, 30, 20)
    with torch.no_grad():
        assert torch.equal(model.generator(mel), again.generator(mel))


@pytest.mark.parametrize("argv, part", [
    (["--upsample_rates", "8,8,2,2"], "whole numbers with the product 160"),
    (["--upsample_rates", "8,x"], "whole numbers"), (["--generator", "wavenet"], "--generator"),
    (["--channels", "20"], "--channels 20 cannot be halved 4 times"),
    (["--discriminator_width", "6"], "must be a multiple of 4"), (["--dataset", "nowhere.csv"], "there is no such")])
def test_a_mistake_is_reported_before_anything_is_read(argv: list[str], part: str) -> None:
    with pytest.raises(UserError) as refusal:
        config.parse(Config, Vocoder.presets, argv, lambda cfg: Vocoder.check(cfg, resumed=False))
    assert any(part in problem for problem in refusal.value.problems), refusal.value.problems
