"""The mel front end against NumPy, transformers' Whisper, and published numbers; padding; SpecAugment."""

import numpy as np
import pytest
import torch

from stoker import wheels
from stoker.model.mel import HOP_LENGTH, N_FFT, SAMPLE_RATE, LogMel, num_frames


def tones(seconds: float, seed: int = 0) -> torch.Tensor:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    draw = np.random.default_rng(seed)
    made = sum(draw.uniform(0.02, 0.1) * np.sin(2 * np.pi * hertz * time) for hertz in draw.uniform(100, 7000, 8))
    return torch.tensor(made + 0.001 * draw.standard_normal(len(time)), dtype=torch.float32)


def hertz_of(mels: np.ndarray) -> np.ndarray:
    """Slaney's scale (Auditory Toolbox, 1998): 15 mels, linear, up to 1,000 Hz; then 27 to each factor of 6.4."""
    return np.where(mels < 15, 200 * mels / 3, 1000 * 6.4 ** ((mels - 15) / 27))


def filters(count: int) -> np.ndarray:
    """(201, count): triangles between neighbours on that scale, each of area 1 Hz."""
    edges = hertz_of(np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), count + 2))
    hertz = np.linspace(0, 8000, N_FFT // 2 + 1)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    triangles: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return triangles


def by_hand(waveform: np.ndarray, count: int) -> np.ndarray:
    """(T, M): log10 of the power in each band, by NumPy's Fourier transform of windows of Hann's."""
    padded = np.pad(waveform.astype(np.float64), N_FFT // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    starts = range(0, len(waveform) // HOP_LENGTH * HOP_LENGTH, HOP_LENGTH)
    spectra = np.abs(np.fft.rfft([padded[start:start + N_FFT] * window for start in starts])) ** 2
    return np.log10(np.maximum(spectra @ filters(count), 1e-10))


def test_the_published_numbers_are_those_of_whisper() -> None:
    """https://github.com/openai/whisper, audio.py: SAMPLE_RATE, N_FFT, HOP_LENGTH."""
    assert (SAMPLE_RATE, N_FFT, HOP_LENGTH) == (16000, 400, 160)
    assert num_frames(torch.tensor([30 * 16000])).item() == 3000


@pytest.mark.parametrize("count", [80, 128])
def test_log_powers_are_those_of_numpy(count: int) -> None:
    waveform = tones(0.7)
    ours = LogMel(count).log_powers(waveform[None], torch.tensor([len(waveform)]))[0]
    theirs = by_hand(waveform.numpy(), count)
    assert ours.shape == theirs.shape == (70, count)
    assert np.abs(ours.numpy() - theirs).max() < 1e-3


@pytest.mark.parametrize("count", [80, 128])
def test_it_is_whispers_but_for_the_level(count: int) -> None:
    from transformers import WhisperFeatureExtractor

    waveform = tones(1.0, seed=1)
    theirs = WhisperFeatureExtractor(feature_size=count)(waveform.numpy(), sampling_rate=16000, return_tensors="np")
    whisper = theirs["input_features"][0].T[:100]  # it goes on with silence up to 30 s
    ours, frames = LogMel(count)(waveform[None], torch.tensor([len(waveform)]))
    assert frames.tolist() == [100] and ours.max() == 1
    difference = ours[0].numpy() - (whisper - whisper.max() + 1)
    assert np.abs(difference[2:-2]).max() < 1e-4  # at the edges Whisper reflects the sound


def test_a_louder_recording_is_the_same() -> None:
    waveform, mel = tones(0.5), LogMel(80)
    ours, louder = (mel(factor * waveform[None], torch.tensor([8000]))[0] for factor in (1.0, 7.0))
    assert torch.allclose(ours, louder, atol=1e-4)


def test_padding_changes_nothing_even_if_it_is_noise() -> None:
    mel, short, long = LogMel(80), tones(0.339), tones(0.9, seed=2)
    short[33 * HOP_LENGTH + 20:] *= 100  # the loudest is in what follows the last whole hop
    batch = torch.stack([torch.cat([short, torch.randn(len(long) - len(short))]), long])
    both, frames = mel(batch, torch.tensor([len(short), len(long)]))
    alone, _ = mel(short[None], torch.tensor([len(short)]))
    assert frames.tolist() == [33, 90]
    assert torch.allclose(both[0, :33], alone[0], atol=1e-5) and not both[0, 33:].any()


def test_it_has_nothing_to_save() -> None:
    assert not LogMel(80).state_dict()


def test_under_autocast_it_is_computed_in_fp32() -> None:
    waveform, mel = tones(0.5)[None], LogMel(80)
    expected, _ = mel(waveform, torch.tensor([8000]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = mel(waveform, torch.tensor([8000]))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("bands", [20, 40, 80, 128])
def test_frequencies_are_where_the_filters_are_highest(bands: int) -> None:
    """Of torchaudio's filters, sampled finely."""
    fine = wheels.torchaudio().functional.melscale_fbanks(80001, 0.0, 8000.0, bands, 16000, norm=None,
                                                          mel_scale="slaney")
    assert LogMel(bands).frequencies().numpy() == pytest.approx(fine.argmax(0).numpy() * 0.1, abs=0.2)


def test_a_tone_is_loudest_in_the_band_of_its_frequency() -> None:
    mel, time = LogMel(40), torch.arange(8000) / SAMPLE_RATE
    for band in (3, 12, 25, 38):
        heard, _ = mel(torch.sin(2 * torch.pi * mel.frequencies()[band] * time)[None], torch.tensor([8000]))
        assert heard[0].mean(0).argmax() == band
