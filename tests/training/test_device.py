"""What a run computes on, and that a GPU which torch cannot use is not passed over in silence."""

import pytest
import torch

from stoker.daemon import machine
from stoker.training.core import device

TOO_OLD = ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
           "downloading and installing a new version.")


def refuse() -> None:
    raise RuntimeError(TOO_OLD)


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)


@pytest.mark.parametrize("there, asked, warned", [(True, "auto", True), (True, "cpu", False), (False, "auto", False)])
def test_a_gpu_that_torch_cannot_use_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                             there: bool, asked: str, warned: bool) -> None:
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: there)
    assert device.choose(asked) == torch.device("cpu")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    if warned:
        assert (f"torch {torch.__version__} cannot use, so the CPU computes: The NVIDIA driver on your system is too "
                "old (found version 11040). Update the driver") in caplog.text
