"""Tables that translate the names of weights between our models and another library, in both directions.

Needs no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """A weight, or several of one pattern: `*` stands for one component of a name (the number of a layer, "weight" or
    "bias"), the same one on both sides."""

    ours: str
    theirs: str
    transposed: bool = False  # their matrix is the transpose of ours; vectors are the same


@dataclass(frozen=True)
class Table:
    """Rows in the order in which they are tried. `unused`: patterns of their tensors that we do not need, as masks."""

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()

    def to_theirs(self, name: str, tensor: "Tensor") -> "tuple[str, Tensor]":
        """Their name and form of one of our weights. Raises ValueError where no row matches: the table lacks one."""
        for row in self.rows:
            if found := _renamed(name, row.ours, row.theirs):
                return found, _transposed(row, tensor)
        raise ValueError(f"no row of the table of names has our {name}: add one")

    def to_ours(self, name: str, tensor: "Tensor") -> "tuple[str, Tensor] | None":
        """Our name and form of one of their weights; None for an unused one. Raises UserError where no row matches."""
        if self._is_unused(name):
            return None
        for row in self.rows:
            if found := _renamed(name, row.theirs, row.ours):
                return found, _transposed(row, tensor)
        raise UserError(f"{name} is {tuple(tensor.shape)} there and has no counterpart here: name other weights")

    def _is_unused(self, name: str) -> bool:
        return any(_renamed(name, pattern, pattern) for pattern in self.unused)

    def converted(self, theirs: "Mapping[str, Tensor]", ours: "Mapping[str, Tensor]",
                  where: object) -> "dict[str, Tensor]":
        """Their tensors under our names and in our form, for a model whose state dict is `ours`. Raises UserError where
        a tensor is missing, has no counterpart, or has another shape; it gives their name of the first such one."""
        theirs = {name: tensor for name, tensor in theirs.items() if not self._is_unused(name)}
        expected = [self.to_theirs(name, tensor) for name, tensor in ours.items()]
        shapes = {name: tensor.shape for name, tensor in expected}
        different = [name for name in shapes | theirs
                     if name not in theirs or name not in shapes or theirs[name].shape != shapes[name]]
        if different:
            there = tuple(theirs[different[0]].shape) if different[0] in theirs else "missing"
            here = tuple(shapes[different[0]]) if different[0] in shapes else "missing"
            raise UserError(f"{where} does not fit: {different[0]} is {there} there and {here} here, and so for "
                            f"{len(different)} of {len(shapes | theirs)} tensors")
        return dict(found for name, tensor in theirs.items() if (found := self.to_ours(name, tensor)))


def _renamed(name: str, pattern: str, other: str) -> str:
    """The pattern `other` with what the stars of `pattern` stand for in `name`; "" where the name does not match."""
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"([^.]+)"), name)
    stars = iter(found.groups() if found else ())
    return re.sub(r"\*", lambda _: next(stars), other) if found else ""


def _transposed(row: Row, tensor: "Tensor") -> "Tensor":
    return tensor.T if row.transposed and tensor.dim() == 2 else tensor
