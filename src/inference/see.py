"""Says what pictures show, of what is proposed. Standard output carries the answers and nothing else."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import command, config
from stoker.config import UserError, opt
from stoker.data.pictures import images
from stoker.data.pictures import table as pictures
from stoker.inference import trained
from stoker.training.core import pretrained
from stoker.training.core.options import device_problems
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import discover

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "vision"
AT_ONCE = 64  # pictures
USAGE = """usage: see.sh PICTURE... [--labels A,B,C | --captions FILE] [OPTIONS]

Says which of some classes pictures belong to, or which of some captions fit them: pictures of any kind and size, all
those of a folder, or, for -, one that comes from standard input."""


@dataclass
class Config:
    """What for"""

    labels: str = opt("", "classes to choose from, with commas between them; the model need not know their names "
                      "(default: those that it was trained with)")
    template: str = opt("", "the caption of a class, whose name {} stands for (default: as in training)")
    captions: str = opt("", "captions to choose from instead: a file with one a line")
    top_k: int = opt(1, "answers to each picture, the likeliest first", ge=1)
    tta: bool = opt(False, "answer by the mean embedding of six views of each picture: as it is, moved up and moved "
                    "down a little, and the mirror images of these. Takes six times as long; fewer mistakes where a "
                    "mirror image shows the same thing")
    json: bool = opt(False, "a line of JSON for each picture: answers with probabilities and cosines")
    model: str = opt("newest", "a run of run_train_vision.sh, also one that still trains, a snapshot or a model "
                     "folder; newest: the newest finished run")
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self) -> list[str]:
        found = device_problems(self.device)
        if self.labels and self.captions:
            found.append("--labels and --captions: give one of them")
        if self.template and not self.labels:
            found.append("--template is for --labels: give these too")
        if self.template and "{}" not in self.template:
            found.append(f"--template {self.template!r} has no {{}} in it, which stands for the class")
        return found


def _main(argv: Sequence[str]) -> int:
    return trained.command(Config, USAGE, argv, _work)


def _work(cfg: Config, words: list[str], only_check: bool) -> int:
    paths = trained.inputs(words, images.SUFFIXES, "picture")
    source = trained.found(cfg.model, STAGE, "sees")
    proposed = _proposed(cfg, source)
    return 0 if only_check else _see(cfg, source, proposed, paths)


def _proposed(cfg: Config, source: Pretrained) -> dict[str, str]:
    """answer -> the caption that stands for it. Raises UserError where there are less than two."""
    if cfg.captions:
        found = {line: line for line in _lines(cfg.captions)}
    elif cfg.labels:
        template = cfg.template or str(source.options.get("template", "{}"))
        found = {name: pictures.captioned(name, template) for name in config.listed(cfg.labels)}
    else:
        found = _known(source)
    if len(found) < 2:
        raise UserError(f"{'--captions' if cfg.captions else '--labels'}: there must be two or more to choose from, "
                        f"are {len(found)}")
    return found


def _lines(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"--captions {path}: {why}; give a file with a caption a line") from error


def _known(source: Pretrained) -> dict[str, str]:
    """The classes that a model was trained with, as its folder has them."""
    path = source.folder / "config.json"
    content: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if not content.get("labels"):
        raise UserError(f"what may the pictures show? {source} knows no classes of its own: give --labels A,B,C or "
                        "--captions FILE")
    return dict(content["labels"])


# -- seeing ---------------------------------------------------------------------------------------------------------


def _see(cfg: Config, source: Pretrained, proposed: Mapping[str, str], paths: Sequence[str]) -> int:
    trained.require_torch("see")
    from stoker.training.core import device as devices

    viewer = Viewer(source, devices.choose(cfg.device), proposed, tta=cfg.tta)
    evaluated = bool(source.options.get("tta"))  # by several views
    how = f", evaluated {'with' if evaluated else 'without'} --tta" * (cfg.tta != evaluated)
    trained.note(f"{source}; {trained.scored(source, ('acc', 'label_acc', 'text_recall_5'))}{how}")
    return trained.answer(paths, viewer.read, images.ImageError, lambda pictures: viewer.see(pictures, cfg.top_k),
                          _lines_of, as_json=cfg.json, at_once=AT_ONCE)


def _lines_of(found: Mapping[str, Any]) -> list[str]:
    return [f"{answer['text']}\t{answer['probability']:.1%}" for answer in found["answers"]]


class Viewer:
    """A trained model and the `proposed` answers, each with its caption; with `tta`, it compares the mean over six
    views of a picture. Raises UserError where a caption has no tokens that the model knows."""

    def __init__(self, source: Pretrained, device: Any, proposed: Mapping[str, str], tta: bool = False):
        import torch

        from stoker.data.pictures.resized import Frame

        stage, self.model = pretrained.opened(source, discover()[STAGE], device)
        self.device, self.answers, self.tta = device, list(proposed), tta
        self.frame = Frame(stage.cfg.image_size, stage.cfg.image_size, str(source.options.get("fit", "crop")))
        tokens = stage.captions(list(proposed.values()))
        if silent := [caption for caption, ids in zip(proposed.values(), tokens) if not len(ids)]:
            raise UserError(f"{silent[0]!r} has nothing in it that this model can read: say it otherwise")
        batch = stage.tokens(tokens)
        with torch.no_grad():
            self.captions = self.model.captions(batch["tokens"].to(device), batch["lengths"].to(device))

    def read(self, path: str) -> "Tensor":
        """(3, H, W) uint8, in the model's frame. Raises images.ImageError."""
        return self.frame(trained.picture(path))

    def see(self, pictures: "Sequence[Tensor]", top_k: int) -> Iterator[dict[str, Any]]:
        """For each {"answers": [{"text", "probability", "cosine"}]}, in the order of their probabilities."""
        import torch

        if not pictures:
            return
        with torch.no_grad():
            seen = self.model.pictures(torch.stack(list(pictures)).to(self.device), tta=self.tta)
            logits = self.model.logits(seen, self.captions)
            probabilities, cosines = self.model.probabilities(logits).cpu(), (seen @ self.captions.T).cpu()
        for likely, near in zip(probabilities, cosines):
            best = likely.argsort(descending=True)[:top_k].tolist()
            yield {"answers": [{"text": self.answers[i], "probability": round(float(likely[i]), 4),
                                "cosine": round(float(near[i]), 4)} for i in best]}


if __name__ == "__main__":
    sys.exit(command.answered(_main))
