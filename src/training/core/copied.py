"""Copies of the weights that parts of a model are initialized from, in the folder of a run and of a model, so that the
originals may be deleted."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files

if TYPE_CHECKING:
    from stoker.training.core.pretrained import Pretrained
    from stoker.training.core.stage import Stage

FOLDER = "parts"  # in a run's folder and in a model folder, with a folder for each part


def beside(weights: "Pretrained", name: str) -> Path | None:
    """The copy of the source of the part `name`: in the folder of these weights, else in that of their run; None if
    there is none."""
    folders = [weights.folder, *([weights.run.path] if weights.run else [])]
    return next((folder / FOLDER / name for folder in folders if (folder / FOLDER / name).is_dir()), None)


def copy_sources(stage: "Stage", folder: Path) -> None:
    """Copy the sources of the parts with export="beside" into `folder`, each completely or not at all. Copies that
    exist already are kept."""
    for part in stage.parts():
        source, target = stage.sources.get(part.name), folder / FOLDER / part.name
        if part.export != "beside" or source is None or target.exists():
            continue
        hidden = target.with_name(f".{part.name}")
        shutil.rmtree(hidden, ignore_errors=True)  # left over from a start that was killed
        hidden.mkdir(parents=True)
        # hard links are safe for our files and those of the hub's cache: they are replaced, never written in place
        put = files.link_or_copy if source.stage or source.is_snapshot or source.origin else shutil.copyfile
        # a tokenizer stands beside the snapshots of its run, not in them
        of_run = source.run.path.glob("tokenizer*.json") if source.is_snapshot and source.run else ()
        for path in [*source.folder.iterdir(), *of_run]:
            if path.is_file() and path.suffix in (".safetensors", ".json", ".txt"):
                put(path.resolve(), hidden / path.name)
        os.replace(hidden, target)
        files.sync_folder(target.parent)
