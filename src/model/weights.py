"""Weights of a model from a model folder of our own, whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import nn


def load(model: "nn.Module", folder: Path, *, but: tuple[str, ...] = ()) -> None:
    """Fill a model from a folder's model.safetensors; what begins with one of `but` stays as it is. Raises UserError
    where the file cannot be read, or a tensor is missing, too many, or of another shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    try:
        theirs = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(but)}
    for name in ours | theirs:
        here, there = (str(tuple(tensors[name].shape)) if name in tensors else "missing" for tensors in (ours, theirs))
        if here != there:
            raise UserError(f"{path} does not fit: {name} is {there} there and {here} here")
    model.load_state_dict(theirs, strict=False)  # what is missing is what stays
