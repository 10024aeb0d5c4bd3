"""torchaudio beside a torch of another build: what is written in Python works, what is compiled says so."""

import sys

import pytest
import torch

import wheels


def test_what_is_written_in_python_works() -> None:
    torchaudio = wheels.torchaudio()
    assert torchaudio is wheels.torchaudio() is sys.modules["torchaudio"]
    assert torchaudio.functional.resample(torch.zeros(1, 100), 2, 1).shape == (1, 50)
    assert torchaudio.functional.edit_distance("kitten", "sitting") == 3
    assert torchaudio.transforms.MelSpectrogram(16000, n_fft=400, n_mels=40)(torch.zeros(800)).shape == (40, 5)


def test_what_is_compiled_says_so() -> None:
    torchaudio = wheels.torchaudio()
    if torchaudio._extension._IS_TORCHAUDIO_EXT_AVAILABLE:
        pytest.skip("this torchaudio is whole")
    scores, targets = torch.zeros(1, 3, 2).log_softmax(-1), torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="forced_align is compiled, and torchaudio's compiled part is for another"):
        torchaudio.functional.forced_align(scores, targets)
