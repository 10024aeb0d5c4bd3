"""Speech and pictures from the Hugging Face hub, by name: fetched once, gone on with where it was interrupted.

Kept as ordinary files with a manifest, official parts and all: what is called test there is never trained on.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from stoker import files
from stoker.config import UserError
from stoker.data import cache, splits
from stoker.data.sources import hub, names, parts
from stoker.data.sources.parts import Part, Source
from stoker.progress import announced

log = logging.getLogger(__name__)

LIBRISPEECH = "openslr/librispeech_asr"
PARTS = {"train.clean.100": "train", "validation.clean": "validation", "test.clean": "test", "train.clean.360": "train",
         "train.other.500": "train"}
SOURCES = {
    "librispeech-100": Source(LIBRISPEECH, "all", dict(list(PARTS.items())[:3]), 7),
    "librispeech-460": Source(LIBRISPEECH, "all", dict(list(PARTS.items())[:4]), 31),
    "librispeech-960": Source(LIBRISPEECH, "all", PARTS, 63),
    "coco-captions": Source("jxie/coco_captions", None, gigabytes=20),  # with the parts of Karpathy and Fei-Fei 2015
    "mjsynth": Source("priyank-m/MJSynth_text_recognition", None, gigabytes=15, columns={"text": "label", "label": ""}),
}


def manifest(name: str) -> Path:
    """The manifest (CSV) of what was fetched. Raises UserError where it was not, or not all of it."""
    path = _folder(name) / "manifest.csv"
    if not path.exists():
        begun = "only in part" if path.parent.exists() else "not"
        raise UserError(f"--dataset {name} is {begun} on this machine: {files.hint('data')} download --dataset "
                        f"{name} fetches it, about {SOURCES[name].gigabytes:g} GB")
    digest, noted = files.sha256(path), cache.read(_digest_of(path))
    if noted is None:  # it was fetched by a former version
        with cache.room(path.parent):
            cache.write(_digest_of(path), digest)
    elif noted != digest:
        path.unlink()
        raise UserError(f"--dataset {name}: {path} was damaged and has been removed: {files.hint('data')} download "
                        f"--dataset {name} writes it again, from what has been fetched")
    return path


def download(name: str, most: int = 0) -> Path:
    """Fetch what is not there yet, of each part at most so many rows; returns the manifest. Raises UserError where the
    hub cannot be reached, or does not give it out; what was fetched by then stays."""
    folder = _folder(name)
    with files.locked(folder.with_suffix(".lock")):
        return _fetched(name, SOURCES[name], folder, most)


def copy(repository: str, config: str | None, folder: Path, most: int = 0) -> Path:
    """Any other data set with sounds or pictures, of the hub or a folder in the hub's form, in `folder`; returns the
    manifest. Raises UserError."""
    return _fetched(repository, Source(repository, config), folder, most)


def _folder(name: str) -> Path:
    return files.home() / ("speech" if name in names.LIBRISPEECH else "published") / name


def _fetched(name: str, source: Source, folder: Path, most: int) -> Path:
    path = folder / "manifest.csv"
    if path.exists() and all(Part(folder, source, rows.stem, "").enough(most) for rows in folder.glob("*.rows")):
        return path
    if not Path(source.repository).exists() and (why := hub.away(source.repository)):
        raise UserError(f"{name}: {why}; connect, and try again")
    kind, named = _looked_at(source)
    folder.mkdir(parents=True, exist_ok=True)
    files.tidy(folder)
    size = f"about {source.gigabytes:g} GB; " if source.gigabytes and not most else ""
    log.info("Fetching %s into %s (%sinterrupted, the same command goes on)", name, folder, size)
    found = [kind(folder, source, theirs, ours) for theirs, ours in named.items()]
    try:
        with announced(lambda: f"Fetching {name}: {_counted(found)} so far"):
            for part in found:
                part.fetch(most)
    except hub.errors() as error:
        if isinstance(error, OSError) and files.may_pass(error):
            raise UserError(f"{error.strerror} in {folder}: make room there, or set STOKER_HOME to another disk; the "
                            "same command goes on") from error
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name}: the download stopped ({why}); {_counted(found)} are kept: the same command goes on"
                        ) from error
    rows = "".join(part.rows.read_text(encoding="utf-8") for part in found)
    files.write(path, f"{kind.header}\n{rows}")
    cache.write(_digest_of(path), files.sha256(path))
    log.info("Fetched %s: %s", name, _counted(found))
    return path


def _digest_of(manifest: Path) -> Path:
    return manifest.with_suffix(".digest")


def _counted(found: list[Part]) -> str:
    return f"{sum(part.count for part in found):,} {found[0].unit}"


def _looked_at(source: Source) -> tuple[type[Part], Mapping[str, str]]:
    """What it holds, and its parts: their name -> ours. Raises UserError."""
    from datasets import get_dataset_split_names  # type: ignore[import-untyped]

    hub.quieten()
    try:
        ours = source.splits or {name: splits.named(name)
                                 for name in get_dataset_split_names(source.repository, source.config)}
        kind = parts.kind_of(source, next(iter(ours)))
    except hub.errors() as error:
        raise UserError(f"{source.repository}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if unknown := [name for name, split in ours.items() if not split]:
        raise UserError(f"{source.repository}: whether {', '.join(unknown)} is to train on or to judge by is not known")
    return kind, ours
