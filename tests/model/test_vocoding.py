"""Losses of vocoders against numpy, networks against the paper's figures, segments, Griffin-Lim."""

import numpy as np
import pytest
import torch

from stoker.model.griffin_lim import GriffinLim
from stoker.model.hifigan import Discriminators, Generator
from stoker.model.mel import LogMel
from stoker.model.spectral_losses import RESOLUTIONS, discriminator_loss, feature_loss, generator_loss, stft_distance
from stoker.model.vocoding import Vocoding


def magnitudes(sound: np.ndarray, size: int, hop: int, window: int) -> np.ndarray:
    """Of windows around every hop, the sound mirrored at its ends, as torch.stft's and librosa's default."""
    padded = np.pad(sound.astype(np.float64), size // 2, mode="reflect")
    hann = np.zeros(size)
    start = (size - window) // 2
    hann[start:start + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = [padded[at:at + size] * hann for at in range(0, len(padded) - size + 1, hop)]
    return np.sqrt(np.maximum(np.abs(np.fft.rfft(frames)) ** 2, 1e-7))


def test_stft_distance_is_that_of_the_paper() -> None:
    draw = np.random.default_rng(0)
    made, real = (draw.normal(0, 0.2, (2, 4800)).astype(np.float32) for _ in range(2))
    expected = []
    for one, other in zip(made, real):
        total = 0.0
        for resolution in RESOLUTIONS:
            x, y = magnitudes(one, *resolution), magnitudes(other, *resolution)
            total += np.linalg.norm(y - x) / np.linalg.norm(y) + np.abs(np.log(y) - np.log(x)).mean()
        expected.append(total / 3)
    assert stft_distance(torch.from_numpy(made), torch.from_numpy(real)).tolist() == pytest.approx(expected, rel=1e-4)
    assert not stft_distance(torch.from_numpy(real), torch.from_numpy(real)).any()


def test_losses_of_a_gan_are_least_squares() -> None:
    """Of two discriminators: scores, and the features of a layer."""
    real = [(torch.tensor([[1.0, 0.0]]), [torch.tensor([[[1.0, 2.0]]])]),
            (torch.tensor([[0.5]]), [torch.zeros(1, 1, 4)])]
    made = [(torch.tensor([[0.0, 1.0]]), [torch.tensor([[[0.0, 4.0]]])]),
            (torch.tensor([[0.0]]), [torch.ones(1, 1, 4)])]
    assert discriminator_loss(real, made).tolist() == pytest.approx([0.5 + 0.5 + 0.25 + 0.0])
    assert generator_loss(made).tolist() == pytest.approx([0.5 + 1.0])
    assert feature_loss(real, made).tolist() == pytest.approx([1.5 + 1.0])


def test_hifigan_has_the_papers_size_and_a_hop_for_each_frame() -> None:
    """V1: 13.92 M parameters (Kong et al. 2020, table 1), without the norms that weight normalization adds."""
    model = Generator(80, 512, [8, 8, 2, 2])
    assert sum(p.numel() for name, p in model.named_parameters() if "original0" not in name) == pytest.approx(
        13.92e6, rel=0.002)
    small = Generator(20, 32, [8, 5, 2, 2]).eval()
    with torch.no_grad():
        assert small(torch.randn(2, 9, 20)).shape == (2, 9 * 160)


def test_discriminators_score_each_sound_by_itself() -> None:
    torch.manual_seed(0)
    model, sounds = Discriminators(4).eval(), torch.randn(2, 4000)
    with torch.no_grad():
        both, alone = model(sounds), model(sounds[:1])
    assert len(both) == 8, "five periods, three scales"
    for (scores, features), (score, feature) in zip(both, alone):
        torch.testing.assert_close(scores[:1], score, rtol=1e-4, atol=1e-5)
        assert len(features) == len(feature)


def tone(samples: int, level: float) -> torch.Tensor:
    time = torch.arange(samples) / 16000
    return level * (torch.sin(2 * torch.pi * 220 * time) + 0.5 * torch.sin(2 * torch.pi * 660 * time))


def test_a_segment_is_of_one_place_in_spectrogram_and_sound() -> None:
    """The sound at the level of what vocoders make, whatever that of the recording."""
    model = Vocoding(20, torch.nn.Identity())
    sound = torch.cat([torch.zeros(4800), tone(4800, 0.05), torch.zeros(6400)])
    for level in (1.0, 7.0):
        batch = {"waveforms": level * sound[None], "samples": torch.tensor([16000]), "places": torch.tensor([0.5])}
        mel, real = model.segments(batch, 0.2)
        assert mel.shape == (1, 20, 20) and real.shape == (1, 3200)
        starts = int(0.5 * (100 - 20 + 1))
        assert torch.equal(mel, model.pairs(batch)[0][:, starts:starts + 20])
        loudest = model.mel.log_powers(model.pairs(batch)[1], torch.tensor([16000])).max()
        assert float(loudest) == pytest.approx(1.0, abs=0.02)
        assert torch.equal(real, model.pairs(batch)[1][:, 160 * starts:160 * (starts + 20)])


def test_griffin_lim_gives_a_sound_with_that_spectrogram() -> None:
    mel = LogMel(80)
    sound = tone(16000, 0.1)[None]
    wanted, _ = mel(sound, torch.tensor([16000]))
    made = GriffinLim(mel)(wanted)
    assert made.shape == (1, 16000) and made.abs().max() < 1
    again, _ = mel(made, torch.tensor([16000]))
    loud = wanted > -0.2
    assert (again - wanted)[loud].abs().mean() < 0.05 < (wanted[loud] + 1).mean()
    assert torch.equal(made, GriffinLim(mel)(wanted)), "its first phases are the same each time"
