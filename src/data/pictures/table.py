"""Pictures: which, with what text or label; read from CSV files, annotations.json, folders, archives and what is made
here, and split.

What a stage does with it:

    splits = pictures.read(cfg.dataset, ...)       # by name of the split: pictures, their files not opened yet
    splits, resized, report = picture_check.checked(splits, frames, keep=cfg.cache_images, limits=Limits(...))
    rows = Views(splits["train"], frame, resized=resized["train"], augmentation=..., seed=...)  # a torch data set

Texts are kept as they stand. Standard library only, so that a mistake in `--dataset` is reported at once.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stoker import files
from stoker.config import UserError
from stoker.data import splits as parting
from stoker.data.pictures import images
from stoker.data.sources import archives, tables
from stoker.data.sources.names import DRAWN, HUB_PICTURES, PICTURES
from stoker.data.splits import SPLITS

NAMES = (*DRAWN, *HUB_PICTURES)
WHAT_TO_GIVE = ("give a CSV file (image,label or image,text), an annotations.json, a folder or TAR archive of pictures "
                "by class or with a text file each, or one of " + ", ".join(NAMES))
MANIFESTS = ("manifest.csv", "metadata.csv", "labels.csv", "annotations.json")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture. `path` is a file, or ARCHIVE.tar[.gz]!MEMBER; `text` what is said of it, or is written on it;
    `label` its class, where it has one; `group` what is never parted between training and validation."""

    path: str
    text: str
    label: str = ""
    group: str = ""


Splits = dict[str, list[Picture]]


def check(name: str, *, group_by: str = "") -> list[str]:
    """What is wrong with a `--dataset`, or a `--group_by`, found before anything is started: opens no picture."""
    try:
        re.compile(group_by)
    except re.error as error:
        return [f"--group_by {group_by}: is no regular expression ({error})"]
    return tables.problems(name, DRAWN, lambda: _look_into(name), WHAT_TO_GIVE)


def read(name: str, *, template: str = "{}", group_by: str = "", held_out: Collection[str] = (),
         share: float = parting.SHARE, shared_texts: bool = True) -> Splits:
    """The pictures of "train" and "validation", and of "test" where the data name one.

    Splits that the data name are kept; what they do not name is split off the training data, about `share` of it:
    whole groups where they are known, else whole files. `held_out` names the groups to validate on instead. `group_by`
    is a regular expression: what it, or the first group in it, matches in a path is the picture's group, as in
    `([^/]*)_[^/]*$`: all before the last underscore of a file's name. Where there is only a label, the text is
    `template` with it in place of {}; with an empty one there is none. Unless `shared_texts`, training leaves out the
    texts of the validation or test set.
    Raises UserError where nothing is left.
    """
    if problems := check(name, group_by=group_by):
        raise UserError(*problems)
    found: Splits = {split: [] for split in SPLITS}
    for split, each in listed(name):
        text = each.text or (captioned(each.label, template) if each.label and template else "")
        found[split].append(Picture(each.path, text, each.label, _group(each, group_by) if group_by else each.group))
    splits = {split: rows for split, rows in found.items() if rows}
    if not splits:
        raise UserError(f"--dataset {name}: names no pictures; {WHAT_TO_GIVE}")
    return divided(splits, name, held_out=held_out, share=share, shared_texts=shared_texts)


def _look_into(name: str) -> None:
    """Raises UserError, OSError where nothing can be listed. Unpacks no archive."""
    path = _path(name)
    if archives.is_archive(path) and path.is_file():
        if not any(map(_is_picture, archives.names(path))):
            raise _none_in(path)
    else:
        next(listed(name), None)


def listed(name: str) -> Iterator[tuple[str, Picture]]:
    """(split, picture) of all that is named, as it stands there; the split is "train" where none is named.
    Raises UserError."""
    path = _made(name) if name in NAMES else _path(name)
    if path.is_dir():
        yield from _folder(path)
    elif path.is_file():
        yield from _file(path)
    else:
        raise UserError(f"--dataset {name}: {tables.absent(path, NAMES)}; {WHAT_TO_GIVE}")


def captioned(label: str, template: str) -> str:
    """The caption of a picture that has a class alone: "a photo of a {}", "polar_bear" -> "a photo of a polar bear"."""
    return template.replace("{}", label.replace("_", " "))


# -- the split ------------------------------------------------------------------------------------------------------


def divided(splits: Splits, name: str, *, held_out: Collection[str] = (), share: float = parting.SHARE,
            shared_texts: bool = True) -> Splits:
    """The same with a validation split, which shares no groups, or files, with training. Raises UserError."""
    train = splits.get("train", [])
    root = os.path.commonpath([os.path.dirname(each.path) for each in train]) if train else ""
    splits = parting.divided(splits, _by_group, lambda each: each.path.removeprefix(root), held_out, name=name,
                             kind="group", share=share)
    pool = splits["train"]
    train = pool if shared_texts else parting.without_shared_texts(splits)
    if not train or not splits["validation"]:
        raise UserError(f"--dataset {name}: of its {len(pool):,} pictures nothing is left to "
                        f"{'validate' if train else 'train'} on; give more, or name their splits in a column `split`")
    return splits | {"train": train}


def _by_group(each: Picture) -> str:
    return each.group


def _group(each: Picture, pattern: str) -> str:
    match = re.search(pattern, each.path)
    if not match or not (group := match[1 if match.re.groups else 0]):
        raise UserError(f"--group_by {pattern}: matches nothing in {each.path}")
    return group


# -- reading --------------------------------------------------------------------------------------------------------


def _made(name: str) -> Path:
    """The manifest of a data set by name; what is made here is made when it is not there yet."""
    if name == "scenes":
        from stoker.data.pictures import scenes

        return scenes.build()
    if name == "digits":
        from stoker.data.pictures import digits

        return digits.build()
    if name == "lines":
        from stoker.data.pictures import lines

        return lines.build()
    from stoker.data.sources import published

    return published.manifest(name)


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name)).absolute()


def _is_picture(name: str) -> bool:
    return name.lower().endswith(images.SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def _none_in(path: Path) -> UserError:
    return UserError(f"--dataset {path}: has no pictures ({', '.join(images.SUFFIXES)}) in it; {WHAT_TO_GIVE}")


def _file(path: Path) -> Iterator[tuple[str, Picture]]:
    if archives.is_archive(path):
        names = list(filter(_is_picture, archives.members(path)))
        if not names:
            raise _none_in(path)
        texts = {name for name in archives.members(path) if name.endswith(".txt")}
        yield from _pictures(names, f"{path}!", texts, lambda name: archives.read(str(path), name, most=tables.TEXT))
    elif path.suffix == ".json":
        yield from _annotations(path)
    else:
        yield from _csv(path)


def _csv(path: Path, split: str = "") -> Iterator[tuple[str, Picture]]:
    """`image,label` or `image,text`, with a header; or `image,text` without one. A header may name `label`, `group` and
    `split` too. Files lie beside the CSV, or in the working folder."""
    for row in tables.rows(path, PICTURES, WHAT_TO_GIVE):
        yield split or parting.of_cell(row["split"], path), Picture(
            tables.located(row["path"], path.parent), row["text"], row["label"], row["group"])


def _annotations(path: Path) -> Iterator[tuple[str, Picture]]:
    """{"images": [{"id", "file_name", "caption"}, ...]}, with "label", "group" and "split" where there are any; or, as
    MS-COCO has it, with the captions in {"annotations": [{"image_id", "caption"}, ...]}."""
    try:
        content = json.loads(files.read(path, most=tables.TABLE).decode("utf-8-sig"))
        captions: dict[object, list[str]] = {}
        for each in content.get("annotations", []):
            captions.setdefault(each["image_id"], []).append(str(each["caption"]))
        rows = [(each, str(each["file_name"]), captions.get(each.get("id"), [str(each.get("caption") or "")]))
                for each in content["images"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'--dataset {path}: is not of the form {{"images": [{{"file_name": ..., "caption": ...}}]}} '
                        f"({type(error).__name__}: {error}); {WHAT_TO_GIVE}") from error
    for each, named, texts in rows:
        for text in texts:
            yield parting.of_cell(str(each.get("split") or ""), path), Picture(
                tables.located(named, path.parent), text.strip(), str(each.get("label") or ""),
                str(each.get("group") or ""))


def _folder(folder: Path) -> Iterator[tuple[str, Picture]]:
    """Its manifest or annotations.json; else the CSV files that are named after splits; else its pictures: by class, or
    the text of a.png in a.txt beside it."""
    for name in MANIFESTS:
        if (folder / name).is_file():
            yield from _file(folder / name)
            return
    if tables_of := {path: split for path in sorted(folder.glob("*.csv")) if (split := parting.NAMES.get(path.stem))}:
        for path, split in tables_of.items():
            yield from _csv(path, split)
        return
    names = [path.relative_to(folder).as_posix() for path in tables.files_below(folder, images.SUFFIXES)]
    if not names:
        raise _none_in(folder)
    texts = {path.relative_to(folder).as_posix() for path in tables.files_below(folder, [".txt"])}
    yield from _pictures(names, f"{folder}/", texts, lambda name: files.read(folder / name, most=tables.TEXT))


def _pictures(names: Sequence[str], around: str, texts: Collection[str],
              read: Callable[[str], bytes]) -> Iterator[tuple[str, Picture]]:
    """Those with a text file beside them, of `texts`, have what stands in it; the others their class. Raises
    UserError."""
    for name, split, label in _by_class(names):
        beside = f"{name.rpartition('.')[0]}.txt"
        if beside not in texts:
            yield split, Picture(around + name, "", label)
            continue
        yield split, Picture(around + name, tables.text(around + beside, partial(read, beside)))


def _by_class(names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, split, class) of relative paths: folders of classes, within folders of splits where all outermost ones are
    such; what lies around them all makes no difference."""
    parts = [name.split("/") for name in names]
    around = 0
    while len({each[around] for each in parts}) == 1 and all(len(each) > around + 2 for each in parts) and (
            not parting.named(parts[0][around])):
        around += 1
    splits = all(len(each) > around + 1 and parting.named(each[around]) for each in parts)
    for name, each in zip(names, parts):
        rest = each[around + splits:]
        yield name, parting.named(each[around]) if splits else "train", rest[0] if len(rest) > 1 else ""
