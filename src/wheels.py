"""Imports torchaudio and torchvision also where their compiled parts cannot load: beside a torch of another build.

A CUDA-linked wheel of either finds no CUDA libraries beside a CPU torch. All that is written in Python works
nevertheless: filters, resampling, spectrograms, masking; transforms of pictures, models. What is compiled says so where
it is called.
"""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

# operators of torchvision's compiled part that it describes to torch while it is imported
DESCRIBED = ("nms", "qnms")


def torchaudio() -> Any:
    """The module `torchaudio`, whole or without its compiled part. Raises ImportError where it is not installed."""
    try:
        return importlib.import_module("torchaudio")
    except OSError as error:
        if "Could not load" not in str(error) and "cannot open shared object" not in str(error):
            raise
    _forget("torchaudio")
    sys.modules["torchaudio._extension"] = _without_compiled_part()
    return importlib.import_module("torchaudio")


def torchvision() -> Any:
    """The module `torchvision`, whole or without its compiled part. Raises ImportError where it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    import torch

    _forget("torchvision")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in DESCRIBED:  # without an implementation: who calls it is told
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module: Any = importlib.import_module("torchvision")
    module.described = library  # they go when it does
    return module


def _forget(package: str) -> None:
    """What a failed import has left, so that the next one begins anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _without_compiled_part() -> types.ModuleType:
    """In place of the one module of torchaudio that loads it, with the names that the others take from there."""

    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"{function.__name__} is compiled, and torchaudio's compiled part is for another build "
                               "of torch than the one installed")

        return refused

    stand_in = types.ModuleType("torchaudio._extension")
    vars(stand_in).update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, fail_if_no_align=refuse,
                          _check_cuda_version=lambda: None)
    return stand_in
