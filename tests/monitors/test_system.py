"""The GPU's use and temperature, asked of a stand-in for NVML."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stoker.monitors import system
from stoker.monitors.system import NotMeasured, System, gpu_figures


class NVMLError(Exception):
    """As pynvml's."""


class NotLoaded(NVMLError):
    """No driver."""


class NVML:
    """Two GPUs; `CUDA_VISIBLE_DEVICES=1` makes the second the first."""

    NVMLError, NVMLError_DriverNotLoaded = NVMLError, NotLoaded
    error: type[Exception] | None = None

    def nvmlInit(self) -> None:
        if self.error:
            raise self.error("no driver")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=(97, 42)[handle])

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return (61, 88)[handle]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[NVML]:
    stand_in = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    monkeypatch.setattr(torch.cuda, "pynvml", stand_in, raising=False)
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield stand_in


def test_the_figures_are_those_of_the_device_that_is_meant(nvml: NVML, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_figures(torch.device("cuda:0")) == {"system/gpu_percent": 97.0, "system/gpu_celsius": 61.0}
    assert gpu_figures(torch.device("cuda:1")) == {"system/gpu_percent": 42.0, "system/gpu_celsius": 88.0}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_figures(torch.device("cuda:0")) == {"system/gpu_percent": 42.0, "system/gpu_celsius": 88.0}


def trainer_on(kind: str) -> Any:
    return SimpleNamespace(device=torch.device(kind), timings={}, step=1, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("error", [NotLoaded, NVMLError])
def test_without_a_driver_it_is_reported_once(tmp_path: Path, nvml: NVML, error: type[Exception],
                                              caplog: pytest.LogCaptureFixture) -> None:
    """The other figures are there all the same."""
    nvml.error = error
    with pytest.raises(NotMeasured):
        gpu_figures(torch.device("cuda:0"))
    monitor = System(tmp_path, tmp_path / "alerts.jsonl")
    for _ in range(3):
        trainer = trainer_on("cuda")
        monitor.on_log(trainer, {})
        assert trainer.timings["system/process_mb"] > 1 and "system/gpu_percent" not in trainer.timings
    assert caplog.text.count("the GPU's use and temperature cannot be measured") == 1


def test_without_the_package_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # then an import of it fails
    with pytest.raises(NotMeasured, match="nvidia-ml-py is not installed"):
        gpu_figures(torch.device("cuda"))


def test_beside_a_gpu_its_figures_are_timings_and_on_a_cpu_nobody_asks(tmp_path: Path, nvml: NVML) -> None:
    trainer = trainer_on("cuda:1")
    System(tmp_path, tmp_path / "alerts.jsonl").on_log(trainer, {})
    assert (trainer.timings["system/gpu_percent"], trainer.timings["system/gpu_celsius"]) == (42.0, 88.0)
    nvml.error = AssertionError
    trainer = trainer_on("cpu")
    System(tmp_path, tmp_path / "alerts.jsonl").on_log(trainer, {})
    assert not any("gpu" in name for name in trainer.timings)


def test_a_disk_without_room_for_a_snapshot_is_reported_until_there_is(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, alerts = System(tmp_path, tmp_path / "alerts.jsonl"), tmp_path / "alerts.jsonl"
    for step, (free, told) in enumerate(((10**9, 0), (50, 1), (40, 1), (10**9, 1), (50, 2))):
        monkeypatch.setattr(system.psutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        trainer = trainer_on("cpu")
        trainer.step = step
        monitor.on_log(trainer, {})
        assert (alerts.read_text().count("make room") if alerts.exists() else 0) == told


def test_what_an_evaluation_asks_of_the_gpu_is_not_taken_for_training(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([95.0, 10.0, 90.0])  # training, evaluating, training
    monkeypatch.setattr(system, "gpu_figures", lambda device: {"system/gpu_percent": next(told)})
    monitor, trainer, seen = System(tmp_path, tmp_path / "alerts.jsonl"), trainer_on("cuda"), []
    monitor.on_eval_start(trainer)
    next(told)
    for _ in range(2):
        monitor.on_log(trainer, {})
        seen.append(trainer.timings["system/gpu_percent"])
    assert seen == [95.0, 90.0]
