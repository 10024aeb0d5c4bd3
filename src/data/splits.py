"""Splits rows into training and validation. Draws no random numbers: the same rows are always split the same way."""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from stoker.config import UserError

SPLITS = ("train", "validation", "test")
NAMES = {"train": "train", "training": "train", "dev": "validation", "val": "validation", "valid": "validation",
         "validation": "validation", "test": "test", "eval": "test"}
SHARE = 0.05  # of the rows to validate on
T = TypeVar("T")


def named(word: str) -> str:
    """The split that a folder or a part is called after, such as "train-clean-100", or ''."""
    return NAMES.get(re.split(r"[-_.]", word.lower())[0], "")


def of_cell(cell: str, where: object) -> str:
    """The split that a row names, "train" if none. Raises UserError."""
    if cell and cell.lower() not in NAMES:
        raise UserError(f"--dataset {where}: a split is one of {', '.join(SPLITS)}, is {cell.lower()!r}")
    return NAMES[cell.lower()] if cell else "train"


def parted(rows: Sequence[T], group: Callable[[T], str], share: float = SHARE) -> tuple[list[T], list[T]]:
    """Rows to train on, rows to judge by: whole groups in the order of their hashes until `share` is reached; one that
    would bring it over twice that is passed over, unless there is none smaller."""
    sizes = Counter(map(group, rows))
    chosen: set[str] = set()
    taken = 0
    for each in sorted(sizes, key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest()):
        if taken >= share * len(rows):
            break
        if taken + sizes[each] <= 2 * share * len(rows):
            chosen.add(each)
            taken += sizes[each]
    if not chosen and len(sizes) > 1:
        chosen = {min(sizes, key=lambda name: (sizes[name], name))}
    return _by(rows, group, chosen)


def held_out(rows: Sequence[T], group: Callable[[T], str], chosen: Collection[str], *, name: str,
             kind: str) -> tuple[list[T], list[T]]:
    """Rows to train on, rows to judge by: those of the groups that `--held_out` names. Raises UserError."""
    known = Counter(map(group, rows))
    for each in chosen:
        if each not in known:
            close = difflib.get_close_matches(each, known, n=1)
            raise UserError(f"--held_out {each}: {name} has no such {kind}"
                            + (f" (did you mean {close[0]}?)" if close else f", but {', '.join(sorted(known)[:8])}"))
    if not known.keys() - set(chosen):
        raise UserError(f"--held_out names all the {kind}s of {name}: leave some to train on")
    return _by(rows, group, chosen)


def divided(found: Mapping[str, Sequence[T]], group: Callable[[T], str], otherwise: Callable[[T], str],
            chosen: Collection[str], *, name: str, kind: str, share: float = SHARE) -> dict[str, list[T]]:
    """The same rows with a validation split: those of the groups that `--held_out` names; else the one that the data
    name; else whole groups, or, where these are not known, what `otherwise` parts. Raises UserError."""
    splits = {split: list(rows) for split, rows in found.items()}
    pool = splits.pop("train", [])
    if chosen:
        pool += splits.pop("validation", [])
        pool, splits["validation"] = held_out(pool, group, chosen, name=name, kind=kind)
    elif "validation" not in splits:
        groups = set(map(group, pool))
        pool, splits["validation"] = parted(pool, group if len(groups - {""}) > 1 and "" not in groups else otherwise,
                                            share)
    return {"train": pool, **{split: splits[split] for split in SPLITS if split in splits}}


def without_shared_texts(splits: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The training rows whose texts are in no other split."""
    evaluated = {each.text for split, rows in splits.items() if split != "train" for each in rows}
    return [each for each in splits["train"] if each.text not in evaluated]


def _by(rows: Sequence[T], group: Callable[[T], str], chosen: Collection[str]) -> tuple[list[T], list[T]]:
    return [row for row in rows if group(row) not in chosen], [row for row in rows if group(row) in chosen]
