"""torchaudio and torchvision beside a torch of another build: what is in Python works, what is compiled says so."""

import sys

import pytest
import torch

from stoker import wheels


def test_what_torchaudio_has_in_python_works() -> None:
    torchaudio = wheels.torchaudio()
    assert torchaudio is wheels.torchaudio() is sys.modules["torchaudio"]
    assert torchaudio.functional.resample(torch.zeros(1, 100), 2, 1).shape == (1, 50)
    assert torchaudio.functional.edit_distance("kitten", "sitting") == 3
    assert torchaudio.transforms.MelSpectrogram(16000, n_fft=400, n_mels=40)(torch.zeros(800)).shape == (40, 5)


def test_what_torchaudio_has_compiled_says_so() -> None:
    torchaudio = wheels.torchaudio()
    if torchaudio._extension._IS_TORCHAUDIO_EXT_AVAILABLE:
        pytest.skip("this torchaudio is whole")
    scores, targets = torch.zeros(1, 3, 2).log_softmax(-1), torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="forced_align is compiled, and torchaudio's compiled part is for another"):
        torchaudio.functional.forced_align(scores, targets)


def test_what_torchvision_has_in_python_works() -> None:
    torchvision = wheels.torchvision()
    assert torchvision is wheels.torchvision() is sys.modules["torchvision"]
    from torchvision.transforms import v2

    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    assert v2.functional.resize(ramp, [2, 128]).shape == (3, 2, 128)
    assert torch.equal(v2.functional.horizontal_flip(ramp), ramp.flip(-1))
    model = torchvision.models.VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=1, hidden_dim=4,
                                                 mlp_dim=4)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 1000)


def test_what_torchvision_has_compiled_says_so() -> None:
    torchvision = wheels.torchvision()
    if torchvision.extension._has_ops():
        pytest.skip("this torchvision is whole")
    with pytest.raises((RuntimeError, NotImplementedError), match="Couldn't load custom C"):
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_transformers_finds_both_in_order() -> None:
    """It imports whichever of them is installed."""
    from transformers import CLIPModel

    assert CLIPModel
