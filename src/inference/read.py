"""Reads lines of text in pictures. Standard output carries the texts and nothing else."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker import command, config
from stoker.config import opt
from stoker.data.pictures import images
from stoker.inference import trained
from stoker.training.core import pretrained
from stoker.training.core.options import device_problems
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import discover

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from stoker.model.decoding import Written

STAGE = "ocr"
AT_ONCE = 32  # lines
COLUMNS = 32_768  # of pixels in all lines that are read at once: the memory depends on these, not on the count of lines
WIDEST = 16  # times as wide as the model was trained on: a wider picture is no line, and might fill the memory
SIMILAR = 1.25  # times as wide as the narrowest: lines that are read together
INK, HIGH = 0.3, 0.2  # of the contrast of a picture, of its height: a line of text has so much at least
USAGE = """usage: read.sh PICTURE... [OPTIONS]

Reads what is written in pictures of any kind and size, one line of text in each: in files, in all those of a folder,
or, for -, in one that comes from standard input."""


@dataclass
class Config:
    """How"""

    beam: int = opt(1, "search for the likeliest text with so many at a time (1: the likeliest label at each place)",
                    ge=1, le=1000)
    json: bool = opt(False, "a line of JSON for each picture: text, confidence, and words with theirs")
    model: str = opt("newest", "a run of run_train_ocr.sh, also one that still trains, a snapshot or a model folder; "
                     "newest: the newest finished run")
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps")

    def problems(self) -> list[str]:
        return device_problems(self.device)


def _main(argv: Sequence[str]) -> int:
    return trained.command(Config, USAGE, argv, _work)


def _work(cfg: Config, words: list[str], only_check: bool) -> int:
    paths = trained.inputs(words, images.SUFFIXES, "picture")
    source = trained.found(cfg.model, STAGE, "reads")
    return 0 if only_check else _read(cfg, source, paths)


# -- reading --------------------------------------------------------------------------------------------------------


def _read(cfg: Config, source: Pretrained, paths: Sequence[str]) -> int:
    trained.require_torch("read")
    from stoker.training.core import device as devices

    reader = LineReader(source, devices.choose(cfg.device))
    trained.note(f"{source}; {trained.scored(source, ('cer', 'wer', 'exact'))}")
    return trained.answer(paths, reader.open, images.ImageError, lambda lines: reader.read(lines, cfg.beam),
                          lambda found: [f"{found['text']}\t{found['confidence']:.1%}"], as_json=cfg.json,
                          at_once=AT_ONCE)


class LineReader:
    """A trained model, and what it reads."""

    def __init__(self, source: Pretrained, device: Any):
        from stoker.data.pictures.resized import Frame

        self.stage, self.model = pretrained.opened(source, discover()[STAGE], device)
        self.device, self.frame = device, Frame(self.stage.cfg.image_height, grey=True)
        for name in ("max_width", "max_text_length"):
            setattr(self.stage.cfg, name, source.options.get(name, getattr(self.stage.cfg, name)))

    def open(self, path: str) -> "Tensor":
        """(1, H, W) uint8, in the model's frame; tells what will hardly be read. Raises images.ImageError."""
        pixels = self.frame(trained.picture(path))
        if pixels.shape[2] > WIDEST * self.stage.cfg.max_width:
            raise images.ImageError(f"is {pixels.shape[2]:,} pixels wide at a height of {pixels.shape[1]}, up to "
                                    f"{WIDEST * self.stage.cfg.max_width:,} can be read: cut it into lines")
        if pixels.min() == pixels.max():
            raise images.ImageError("is blank: nothing is written there")
        if (count := text_lines(pixels[0].numpy())) > 1:
            config.complain([f"{path} seems to have {count} lines of text and is read as if it had one: cut it into "
                             "lines"])
        if pixels.shape[2] > self.stage.cfg.max_width:
            config.complain([f"{path} is {pixels.shape[2]:,} pixels wide at a height of {pixels.shape[1]}, the model "
                             f"was trained on up to {self.stage.cfg.max_width:,}: cut it into shorter lines"])
        return pixels

    def read(self, lines: "Sequence[Tensor]", beam: int = 1) -> Iterator[dict[str, Any]]:
        """For each {"text", "confidence", "words": [{"word", "confidence"}]}: how likely the model has it that this,
        and nothing else, stands there."""
        found = dict[int, dict[str, Any]]()
        for rows in _alike([line.shape[2] for line in lines]):
            for row, written in zip(rows, self._written([lines[row] for row in rows], beam)):
                found[row] = self._answer(written)
        yield from (found[row] for row in range(len(lines)))

    def _written(self, lines: "Sequence[Tensor]", beam: int) -> "list[Written]":
        import torch
        from torch.nn.functional import pad

        widths = torch.tensor([line.shape[2] for line in lines], device=self.device)
        pixels = torch.stack([pad(line, (0, int(widths.max()) - line.shape[2])) for line in lines]).to(self.device)
        with torch.no_grad():
            found: list[Written] = self.stage.written(self.model, self.model(pixels, widths), beam)
        return found

    def _answer(self, written: "Written") -> dict[str, Any]:
        from stoker.data.text.labels import words

        tokenizer = self.stage.tokenizer
        found = [{"word": word, "confidence": _likely(costs)}
                 for word, costs in words(tokenizer, list(zip(written.tokens, written.log_probs)))]
        text = tokenizer.decode(written.tokens).strip()
        return {"text": text, "confidence": _likely(written.log_probs), "words": found}


def _alike(widths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in groups of like width, since one that is far wider would make all others of its group as wide. Very wide
    rows come in smaller groups."""
    group = list[int]()
    for row in sorted(range(len(widths)), key=lambda row: widths[row]):
        if group and (widths[row] > SIMILAR * widths[group[0]] or (len(group) + 1) * widths[row] > COLUMNS):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _likely(log_probs: Sequence[float]) -> float:
    return round(math.exp(sum(log_probs)), 4)


def text_lines(pixels: "np.ndarray") -> int:
    """How many lines of text a picture (H, W) seems to have: stretches of rows with ink in them, high enough to be more
    than the dot of an i, with rows without any between."""
    import numpy as np

    contrast = pixels.max(1).astype(int) - pixels.min(1)
    inked = np.flatnonzero(contrast > INK * contrast.max()) if contrast.max() else np.zeros(0, int)
    stretches = np.split(inked, np.flatnonzero(np.diff(inked) > 1) + 1)
    return max(1, sum(len(stretch) >= HIGH * len(pixels) for stretch in stretches))


if __name__ == "__main__":
    sys.exit(command.answered(_main))
