"""Parts that are networks of the transformers library, built by the config.json of their source.

A stage's `model` builds the network without weights, and `networks.build` then loads the weights into it:

    thinker = from_transformers.build("AutoModelForCausalLM", self.sources["thinker"])

Only this module imports the library, so only stages that use it need it. Code from a model's repository is never run.
"""

import importlib
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stoker import wheels
from stoker.config import UserError

if TYPE_CHECKING:
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)


def build(auto_class: str, source: "Pretrained", described: Mapping[str, Any] | None = None) -> nn.Module:
    """A network of an "Auto" class such as AutoModelForCausalLM, built by the source's config.json, or by `described`,
    such as a section of it. The network is on the meta device, without memory, except where a snapshot or model folder
    of the whole model has its weights. Raises UserError where the library is missing or cannot build the network."""
    library = _library()
    if described is None:
        described = source.options.get("config", {})
    try:
        config = library.AutoConfig.for_model(**described)
        with torch.device("cpu" if source.noted else "meta"):
            network: nn.Module = getattr(library, auto_class).from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"transformers {library.__version__} cannot build an {auto_class} by the config.json of "
                        f"{source} ({why}): name another model, or install the release that it needs") from error
    return network


def is_pretrained_model(network: nn.Module) -> bool:
    """Whether a network is a `PreTrainedModel` of the library."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(network, library.PreTrainedModel)


def fill(network: Any, tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Load the tensors of a checkpoint into a network on the meta device. The library itself maps the names that older
    checkpoints use, ties weights, and computes the buffers that no checkpoint holds. Each tensor is copied once, since
    it may be a view of a mapped file, and the network keeps the copy. Raises UserError where a tensor is missing or has
    another shape."""
    copies = {name: tensor.to(network.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
              for name, tensor in tensors}
    loaded, found = type(network).from_pretrained(
        None, config=network.config, state_dict=copies, dtype=network.dtype, ignore_mismatched_sizes=True,
        output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{where} do not fit: {missing[0]} is missing there, and so are {len(missing)} in all; name "
                        "others")
    if other := sorted(found["mismatched_keys"]):
        name, there, here = other[0]
        raise UserError(f"{where} do not fit: {name} is {tuple(there)} there and {tuple(here)} here; name others")
    if unused := sorted(found["unexpected_keys"]):
        log.warning("%s: %s tensors are not used, the first is %s", where, f"{len(unused):,}", unused[0])
    network.load_state_dict(loaded.state_dict(keep_vars=True), assign=True)
    for name, buffer in loaded.named_buffers():
        module, _, last = name.rpartition(".")
        network.get_submodule(module)._buffers[last] = buffer


def _library() -> Any:
    """Import the library, and keep it from printing. Raises UserError where it is not installed."""
    wheels.torchvision(), wheels.torchaudio()  # the library imports both
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError("the package transformers is not installed; install it: "
                        f"{sys.executable} -m pip install transformers") from error
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library
