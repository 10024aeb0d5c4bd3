"""Model folders of the Hugging Face hub, `hf://ORG/NAME` or `ORG/NAME@REVISION`, each downloaded once.

A revision is a branch, a tag or a commit, by default `main`. A revision that is in the cache is used without asking the
hub, so that a run can be resumed without network. To get a newer commit of a branch, name that commit.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.config import UserError
from stoker.data.sources import hub
from stoker.progress import announced

log = logging.getLogger(__name__)

SCHEME = "hf://"
NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w.-]*(?:/[\w-][\w.-]*)*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model")  # nothing that can run code
# Folders hold other formats of the same weights, and so does Mistral's consolidated.safetensors.
UNWANTED = ("*/*", "consolidated*")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Repository:
    name: str  # ORG/NAME
    revision: str = "main"

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}@{self.revision}"


def parse(what: str) -> Repository | None:
    """The repository that a name such as hf://ORG/NAME means; None where the name has another form, or is a file or
    folder of this machine. Raises UserError where it begins with hf://, in letters of any case, but the rest is no
    ORG/NAME@REVISION."""
    has_scheme = what.lower().startswith(SCHEME)
    found = NAME.fullmatch(what[len(SCHEME):] if has_scheme else what)
    if has_scheme:
        if not found:
            raise UserError(f"{what}: a repository of the Hugging Face hub is written hf://ORG/NAME or "
                            "hf://ORG/NAME@REVISION")
    elif not found or not found[2] or Path(what).exists():
        return None
    return Repository(found[1], found[2] or "main")


def folder(repository: Repository, *, download: bool) -> tuple[Path, Repository]:
    """The repository's folder in the cache, and the repository with its commit as the revision. Raises UserError where
    it is not in the cache and `download` is false, or it cannot be downloaded."""
    found = _cached(repository)
    if found is None and not download:
        raise UserError(f"{repository} is not in {_cache()} yet: the start of a run downloads it")
    if found is None:
        found = _downloaded(repository)
    return found, Repository(repository.name, found.name)


def problem(repository: Repository) -> str:
    """Why the repository is neither in the cache nor can be downloaded, or ''. Takes seconds, and needs only the
    standard library, so it cannot find every reason."""
    return "" if _cached(repository) else _unreachable(repository)


def _unreachable(repository: Repository) -> str:
    why = hub.away_from(f"{repository.name}/resolve/{repository.revision}/config.json")
    return why and (f"{repository}: {why}, and {_cache()} has no copy: connect, or copy it there from a machine that "
                    "has it")


def _cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or hub.home() / "hub").expanduser()


def _repository_folder(repository: Repository) -> Path:
    return _cache() / f"models--{repository.name.replace('/', '--')}"


def _cached(repository: Repository) -> Path | None:
    """The folder of a revision in the cache, if it was downloaded completely."""
    folder = _repository_folder(repository)
    reference = folder / "refs" / repository.revision
    commit = reference.read_text().strip() if reference.is_file() else repository.revision
    found = folder / "snapshots" / commit
    return found if COMMIT.fullmatch(commit) and _is_whole(found) else None


def _is_whole(found: Path) -> bool:
    """Whether a download was completed: all files that the index of weights lists are there, or, without an index, one
    file with weights."""
    if not (found / INDEX).is_file():
        return any(path.is_file() for path in found.glob("*.safetensors"))
    try:
        listed = set(json.loads((found / INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(isinstance(name, str) and (found / name).is_file() for name in listed)


def _downloaded(repository: Repository) -> Path:
    if why := _unreachable(repository):
        raise UserError(why)
    from huggingface_hub import errors, snapshot_download

    hub.quieten()
    log.info("Downloading %s from %s (once, into %s)", repository, hub.endpoint(), _cache())
    blobs = _repository_folder(repository) / "blobs"
    before = hub.megabytes(blobs)
    options: dict[str, Any] = {"revision": repository.revision, "cache_dir": _cache(), "endpoint": hub.endpoint(),
                               "allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    try:
        with announced(lambda: f"Downloading {repository}: {hub.megabytes(blobs) - before:.0f} MB so far"):
            return Path(snapshot_download(repository.name, **options))
    except errors.GatedRepoError as error:
        why = "needs your consent to its terms, on its page at the hub; then set HF_TOKEN to a token of yours"
        raise UserError(f"{repository} {why}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{repository}: {hub.endpoint()} has no such repository, or it is private: correct the name, "
                        "or set HF_TOKEN to a token that may read it") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository}: the repository has no revision {repository.revision!r}: name a branch, a tag "
                        "or a commit") from error
    except hub.errors() as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{repository}: the download from {hub.endpoint()} failed ({why}); try again") from error
