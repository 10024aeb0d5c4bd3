"""WikiText from the Hugging Face hub: the articles of its three splits, downloaded once by `datasets`.

What the library has in its cache is used without asking the hub, so that a run goes on without network.
"""

import itertools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.config import UserError
from stoker.data.sources.network import unreachable
from stoker.progress import announced

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

REPOSITORY = "Salesforce/wikitext"
CONFIGS = {"wikitext": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}
SPLITS = ("train", "validation", "test")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
TITLE = re.compile(r" = (?!= ).* = \n?")  # and not a section: " = = History = = "


def missing(name: str) -> str:
    """Why a data set can be had neither from the cache nor from the hub, or ''; also '' for what is not of the hub.

    Answers in seconds, with the standard library alone.
    """
    if name not in CONFIGS or _cached(name):
        return ""
    why = away(REPOSITORY)
    return f"{why}, and {_cache()} has no copy" if _offline() else why


def away(repository: str) -> str:
    """Why a data set of the hub cannot be asked for now, or ''. Answers in seconds."""
    return away_from(f"datasets/{repository}/resolve/main/README.md")


def away_from(page: str) -> str:
    """Why a page of the hub cannot be asked for now, or ''. Answers in seconds."""
    if variable := _offline():
        return f"{variable} is set"
    why = unreachable(f"{endpoint()}/{page}")
    return f"the Hugging Face hub ({endpoint()}) cannot be reached ({why})" if why else ""


def _offline() -> str:
    """The variable that forbids to ask the hub for anything, or ''."""
    return next((name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), "")


def articles(name: str) -> dict[str, list[str]]:
    """split -> its articles. Raises UserError where they cannot be had."""
    folder = _cached(name)
    try:
        splits = _read(folder) if folder else _downloaded(name)
        return {split: divided(_rows(splits[split])) for split in SPLITS}
    except errors() as error:
        what = f"its copy in {folder} cannot be read" if folder else f"the download from {endpoint()} failed"
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--dataset {name}: {what} ({why}); {'delete that folder' if folder else 'try again'}, "
                        "or take --dataset pydocs, or a text file") from error


def divided(rows: Iterable[str]) -> list[str]:
    """The articles in the rows of a split: each begins at its title; an empty row is an empty line."""
    titles = 0

    def number(row: str) -> int:
        nonlocal titles
        titles += TITLE.fullmatch(row) is not None
        return titles

    found = ("".join(row if row.endswith("\n") else row + "\n" for row in lines)
             for _, lines in itertools.groupby(rows, number))
    return [text for text in found if text.strip()]


# -- the library and its cache --------------------------------------------------------------------------------------


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _cache() -> Path:
    """Where `datasets` keeps what it has prepared."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or home() / "datasets").expanduser()


def home() -> Path:
    """The folder of the hub's caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or os.path.join(base, "huggingface")).expanduser()


def _cached(name: str) -> Path | None:
    """The newest whole copy in the cache."""
    notes = _cache().glob(f"{REPOSITORY.replace('/', '___')}/{CONFIGS[name]}/*/*/dataset_info.json")
    whole = [note.parent for note in notes if note.parent.suffix != ".incomplete"]
    return max(whole, key=lambda folder: folder.stat().st_mtime, default=None)


def _read(folder: Path) -> dict[str, "Dataset"]:
    from datasets import Dataset, concatenate_datasets

    log.info("Reading %s", folder)
    return {split: concatenate_datasets([Dataset.from_file(str(path))
                                         for path in sorted(folder.glob(f"*-{split}*.arrow"))]) for split in SPLITS}


def _rows(split: "Dataset") -> Iterator[str]:
    """A stretch at a time: all of WikiText-103 as rows, beside its articles, would be twice the memory."""
    for stretch in split.data.column("text").chunks:
        yield from stretch.to_pylist()


def _downloaded(name: str) -> dict[str, "Dataset"]:
    from datasets import load_dataset
    from huggingface_hub import constants

    quieten()
    blobs = Path(constants.HF_HUB_CACHE, f"datasets--{REPOSITORY.replace('/', '--')}", "blobs")
    before = megabytes(blobs)
    log.info("Downloading %s from %s (once, kept in %s)", name, endpoint(), _cache())
    with announced(lambda: f"Downloading {name}: {megabytes(blobs) - before:.0f} MB so far"):
        return dict(load_dataset(REPOSITORY, CONFIGS[name], cache_dir=str(_cache())))


def quieten() -> None:
    """Their lines belong in our log, with the time; bars in a terminal only."""
    from datasets import disable_progress_bars
    from huggingface_hub.utils.tqdm import disable_progress_bars as disable_download_bars

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request
    if not sys.stderr.isatty():
        disable_progress_bars()
        disable_download_bars()


def megabytes(folder: Path) -> float:
    """The size of the files in a folder, which come and go meanwhile."""
    sizes = [path.stat().st_size for path in folder.glob("*") if path.exists()]
    return sum(sizes) / 1e6


def errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises when a download fails or a copy is damaged; it has no common ancestor."""
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
    from huggingface_hub.errors import XetDownloadError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    return OSError, ValueError, RuntimeError, DatasetsError, XetDownloadError, httpx.HTTPError, ArrowException
