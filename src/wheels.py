"""Imports torchaudio also where its compiled part cannot load: beside a torch of another build.

A CUDA-linked wheel of torchaudio finds no CUDA libraries beside a CPU torch. All that is written in Python works
nevertheless: filters, resampling, spectrograms, masking. What is compiled says so where it is called.
"""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any


def torchaudio() -> Any:
    """The module `torchaudio`, whole or without its compiled part. Raises ImportError where it is not installed."""
    try:
        return importlib.import_module("torchaudio")
    except OSError as error:
        if "Could not load" not in str(error) and "cannot open shared object" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]
    sys.modules["torchaudio._extension"] = _without_compiled_part()
    return importlib.import_module("torchaudio")


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
