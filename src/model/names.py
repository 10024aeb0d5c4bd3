"""Names of weights here and in another library, as a table that is read in both directions. Needs no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.config import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One weight, or several alike: `*` stands for one component of a name (the number of a layer, "weight" or "bias"),
    the same one on both sides."""

    ours: str
    theirs: str
    transposed: bool = False  # their matrix is ours transposed; vectors are the same


@dataclass(frozen=True)
class Table:
    """`unused` are patterns of their tensors that have no counterpart here, such as masks."""

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()

    def to_theirs(self, name: str, tensor: "Tensor") -> "tuple[str, Tensor]":
        """Their name and form of a weight of ours. Raises ValueError where no row has it: the table is incomplete."""
        for row in self.rows:
            if found := _renamed(name, row.ours, row.theirs):
                return found, _turned(row, tensor)
        raise ValueError(f"no row of the table of names has our {name}: add one")

    def to_ours(self, name: str, tensor: "Tensor") -> "tuple[str, Tensor] | None":
        """Our name and form of a weight of theirs; None where it is not used. Raises UserError where no row has it."""
        if self._is_unused(name):
            return None
        for row in self.rows:
            if found := _renamed(name, row.theirs, row.ours):
                return found, _turned(row, tensor)
        raise UserError(f"{name} is {tuple(tensor.shape)} there and has no counterpart here: name other weights")

    def _is_unused(self, name: str) -> bool:
        return any(_renamed(name, pattern, pattern) for pattern in self.unused)

    def converted(self, theirs: "Mapping[str, Tensor]", ours: "Mapping[str, Tensor]",
               where: object) -> "dict[str, Tensor]":
        """Their tensors under our names, in our form, for a model whose state is `ours`. Raises UserError, with their
        name of the first, where one is missing, too many, or of another shape."""
        theirs = {name: tensor for name, tensor in theirs.items() if not self._is_unused(name)}
        expected = {there: (name, turned.shape) for name, tensor in ours.items()
                    for there, turned in [self.to_theirs(name, tensor)]}
        shapes = {name: shape for name, (_, shape) in expected.items()}
        different = [name for name in shapes | theirs
                     if name not in theirs or name not in shapes or theirs[name].shape != shapes[name]]
        if different:
            there = tuple(theirs[different[0]].shape) if different[0] in theirs else "missing"
            here = tuple(shapes[different[0]]) if different[0] in shapes else "missing"
            raise UserError(f"{where} does not fit: {different[0]} is {there} there and {here} here, and so for "
                            f"{len(different)} of {len(shapes | theirs)} tensors")
        return dict(found for name, tensor in theirs.items() if (found := self.to_ours(name, tensor)))


def _renamed(name: str, pattern: str, other: str) -> str:
    """The name in the form of `other`; empty where it does not fit the pattern."""
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"([^.]+)"), name)
    stars = iter(found.groups() if found else ())
    return re.sub(r"\*", lambda _: next(stars), other) if found else ""


def _turned(row: Row, tensor: "Tensor") -> "Tensor":
    return tensor.T if row.transposed and tensor.dim() == 2 else tensor
