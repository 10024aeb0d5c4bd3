"""Reading lines of text in pictures: an encoder for lines of any width, and a decoder with cross-attention to it."""

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker.config import opt, select
from stoker.data.pictures import table
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from stoker.training.core.options import Options
from stoker.training.core.transcripts import Source, Terms, Transcribing
from stoker.training.stages.labelled import evenly, label_kind, vocabulary
from stoker.training.stages.pictures import OfPictures, Validation
from stoker.training.stages.sizes import Transformer, preset, sizes_of

if TYPE_CHECKING:
    from torch import nn

    from stoker.data.loader import Order
    from stoker.data.pictures.line_augmentation import LineAugmentation
    from stoker.data.pictures.resized import Frame
    from stoker.data.pictures.views import View, Views
    from stoker.model.decoding import Written
    from stoker.model.reader import Reader, Seen
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)

LOOKED_AT, SHOWN = 256, 10  # samples: lines to read, and the worst of them to show


@dataclass
class Lines:
    """Data"""

    dataset: str = opt("lines", "lines (printed here in many typefaces), mjsynth, a CSV file (image,text), or a folder "
                       "or TAR archive of pictures with a manifest", path=table.NAMES, aliases=("data_path", "csv"))
    image_height: int = opt(32, "height in pixels that lines are resized to; the width follows", ge=16, le=256)
    max_width: int = opt(1024, "widest line, in pixels at that height; wider ones are left out", ge=16)
    max_text_length: int = opt(256, "longest text, in characters; longer ones are left out", ge=1)
    ignore_case: bool = opt(False, "ignore case in error rates: for data sets whose texts do not keep it")
    cache_images: bool = opt(True, "keep all lines on disk, decoded and resized, instead of decoding them in each "
                             "epoch", may_change=True)
    batch_width: int = opt(0, "largest micro-batch, in columns of pixels with padding, before augmentation (0: only "
                           "--batch_size limits it)", ge=0)


@dataclass
class Augmentation:
    """Augmentation of the training lines, different in each epoch (0: off)"""

    stretch: float = opt(0.15, "wider or narrower by up to this share", ge=0, le=0.5)
    slant: float = opt(0.15, "slanted: the top moved sideways by up to this share of the height", ge=0, le=1)
    shift: float = opt(0.06, "moved up or down, and larger or smaller, by up to this share of the height", ge=0, le=0.3)
    weight: float = opt(0.4, "bolder or thinner by up to this share of a pixel on either side", ge=0, le=1)
    contrast: float = opt(0.3, "contrast and brightness, more or less by up to this share", ge=0, le=0.9)
    blur: float = opt(0.7, "blurred by up to so many pixels, in half of the lines", ge=0, le=5)
    noise: float = opt(12.0, "noise of up to so many grey levels, in half of the lines", ge=0, le=100)
    invert: float = opt(0.02, "share of the lines that are inverted, light on dark", ge=0, le=1)


@dataclass
class Architecture(Transformer, d_model=128, num_heads=4, num_layers=3, d_ff=512, dropout=0.0):
    """Model"""

    labels: str = label_kind("chars", "what the model writes")
    vocab_size: int = vocabulary(512)
    stem_width: int = opt(32, "channels of the first convolution; the others have 2, 3 and 4 times as many", ge=1,
                          usual=(8, 128))
    ctc_weight: float = opt(0.3, "share of the CTC loss in the loss: with it the model learns sooner where each "
                            "label stands (0: the decoder's loss alone)", ge=0, lt=1)


@dataclass
class Decoder(Transformer, prefix="decoder_", num_layers=2):
    """Decoder"""


@dataclass
class Config(Options, Decoder, Architecture, Augmentation, Validation, Lines):
    """The reader's options."""

    def problems(self) -> list[str]:
        if self.image_height % 16:
            return [f"--image_height {self.image_height} is no multiple of 16: take 32, 48 or 64"]
        return []


class OCR(Transcribing, OfPictures[Config]):
    """Trains a reader of lines of text, in the foreground. (./run/run_train_ocr.sh: in the background.)

    `loss` is -log of the probability of the text, divided by its number of labels. With --ctc_weight W it is 1 - W
    times the decoder's, `text_loss`, plus W times the encoder's, `ctc_loss`.
    """

    name = "ocr"
    Config = Config
    Augmentation = Augmentation
    content = "lines", "text"
    sizes = ("image_height", "stem_width", "d_model", "num_heads", "num_layers", "d_ff", "decoder_layers")
    best = "eval/cer", "min"
    target = 0.10
    text_rates = "eval/cer", "eval/wer"
    terms = Terms("lines", "group", "pixels wide", "written", "read")
    presets = {
        "nano": preset(128, 4, 3, lr=2e-3, warmup_steps=200, epochs=6, batch_width=12000),
        "tiny": preset(256, 4, 4, stem_width=64, lr=1e-3, batch_size=64, batch_width=24000),
        "small": preset(384, 6, 8, stem_width=64, decoder_layers=4, dropout=0.1, lr=1e-3, batch_size=128,
                       batch_width=48000),
        "medium": preset(512, 8, 12, stem_width=96, decoder_layers=6, dropout=0.1, lr=5e-4, batch_size=128,
                        batch_width=48000),
    }

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from stoker.data.pictures.check import Limits
        from stoker.model.line_encoder import states_of

        cfg = self.cfg
        found = self.read_table()
        self.open_tokenizer([each.text.strip() for each in found["train"]])
        self.open_pictures(found, Limits(
            max_width=cfg.max_width, height=cfg.image_height, max_text_length=cfg.max_text_length, lines=True,
            labels=self.encode if cfg.ctc_weight else None, columns=states_of, stretch=cfg.stretch))
        for split, rows in self.pictures.items():
            if split != "train":  # so that lines of similar width are evaluated together
                rows.sort(key=lambda each: self._width(split, each))
        log.info("Labels: %s, %s of them and the end; a state of the encoder for every 4 columns of pixels",
                 self.tokenizer.name, f"{self.tokenizer.vocab_size - 1:,}")
        self.warn_of_unspelled(each.text for rows in self.pictures.values() for each in rows)

    def encode(self, text: str) -> list[int]:
        return super().encode(text.strip())

    def frame(self) -> "Frame":
        from stoker.data.pictures.resized import Frame

        return Frame(self.cfg.image_height, grey=True)

    def changes(self, split: str) -> "LineAugmentation":
        from stoker.data.pictures.line_augmentation import LineAugmentation

        return select(LineAugmentation, self.cfg) if split == "train" else LineAugmentation()

    def _width(self, split: str, picture: table.Picture) -> int:
        """Columns of pixels of a line, at --image_height."""
        fact = self.resized[split].facts[picture.path]
        return self.frame().width_of(fact.height, fact.width)

    def dataset(self, split: str) -> "Views":
        return self.views(split)

    def groups(self, split: str) -> list[str]:
        """The group of each row, by --group_by or the data."""
        return [each.group for each in self.dataset(split).pictures]

    def text_sources(self, split: str) -> list[Source]:
        """The width is in pixels, at --image_height."""
        return [Source(each.path, self._width(split, each)) for each in self.dataset(split).pictures]

    def order(self) -> "Order":
        widths = [self._width("train", each) for each in self.dataset("train").pictures]
        return self.order_by_length(widths, self.cfg.batch_width)

    def collate(self, samples: "list[View]") -> Batch:
        """pixels (B, 1, H, W) uint8, and widths (B,), their columns without padding. For the decoder: tokens (B, T), an
        end label and then the text; targets (N,), all texts in one row, each with an end label; places (N,), where
        these are among the B * T outputs. For CTC: labels, all texts in one row, and label_lengths (B,). texts."""
        import torch
        from torch.nn.functional import pad
        from torch.nn.utils.rnn import pad_sequence

        end = torch.tensor([self.tokenizer.end_of_text])
        labels = [torch.tensor(self.encode(view.text), dtype=torch.long) for view in samples]
        widths, lengths = ([len(each) for each in part] for part in ([view.pixels[0, 0] for view in samples], labels))
        columns, length = self._longest if self.cfg.compile else (max(widths), max(lengths) + 1)
        tokens = pad_sequence([torch.cat([end, ids]) for ids in labels], batch_first=True, padding_value=int(end))
        return {"pixels": torch.stack([pad(view.pixels, (0, columns - width)) for view, width in zip(samples, widths)]),
                "widths": torch.tensor(widths), "tokens": pad(tokens, (0, length - tokens.shape[1]), value=int(end)),
                "targets": torch.cat([part for ids in labels for part in (ids, end)]),
                "places": torch.cat([torch.arange(count + 1) + row * length for row, count in enumerate(lengths)]),
                "labels": torch.cat(labels), "label_lengths": torch.tensor(lengths),
                "texts": [view.text for view in samples]}

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """The largest number of columns of pixels, after augmentation, and of labels, with an end, of any line."""
        cfg, rows = self.cfg, [(split, each) for split, rows in self.pictures.items() for each in rows]
        widest = max(self._width(split, each) for split, each in rows)
        return (math.ceil(widest * (1 + cfg.stretch) + cfg.slant * cfg.image_height),
                max(len(self.encode(each.text)) for _, each in rows) + 1)

    def size(self, batch: Batch) -> dict[str, int]:
        return {"lines": len(batch["texts"])}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "Reader":
        from stoker.model.line_encoder import LineEncoder
        from stoker.model.reader import Reader, TextDecoder

        cfg = self.cfg
        encoder = LineEncoder(**sizes_of(cfg), image_height=cfg.image_height, stem_width=cfg.stem_width)
        decoder = TextDecoder(self.tokenizer.vocab_size, **sizes_of(cfg) | sizes_of(cfg, "decoder_"))
        return Reader(encoder, decoder, self.tokenizer.end_of_text, joint=cfg.ctc_weight > 0)

    def blocks(self, model: Any) -> list["nn.Module"]:
        return [*model.encoder.blocks, *model.decoder.blocks]

    def counts(self, batch: Batch, phase: str) -> dict[str, int]:
        return {"loss": len(batch["targets"])}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        loss, figures = self._figures(model, batch, model(batch["pixels"], batch["widths"]))
        return Loss({"loss": loss.total}, figures)

    def _figures(self, model: Any, batch: Batch, seen: "Seen") -> tuple[Ratio, dict[str, Ratio]]:
        from stoker.model import ctc

        decoder, weight = model.decoder, self.cfg.ctc_weight
        hidden = decoder(batch["tokens"], model.memory(seen)).flatten(0, 1)
        written, each = decoder.cross_entropies(hidden[batch["places"]], batch["targets"])
        count, counts = len(batch["targets"]), batch["label_lengths"] + 1
        by_line = each.new_zeros(hidden.shape[0]).index_copy(0, batch["places"], each).view(len(counts), -1).sum(1)
        if not weight:
            return Sampled(written, count, (by_line, counts)), {}
        losses = ctc.ctc_loss(seen.logits, seen.lengths, batch["labels"], batch["label_lengths"],
                              blank=self.tokenizer.end_of_text)
        alignable = losses.detach().where(~losses.isposinf(), 0)
        by_line = (1 - weight) * by_line + weight * alignable
        if not model.training:  # a line that CTC cannot align has no CTC loss, but its errors count
            losses = losses[~losses.isposinf()]
        aligned = losses.sum()
        return Sampled((1 - weight) * written + weight * aligned, count, (by_line, counts)), {
            "text_loss": Ratio(written.detach(), count), "ctc_loss": Ratio(aligned.detach(), count)}

    # -- evaluation ---------------------------------------------------------------------------------------------

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        """Beside the losses, error rates: edit distances over the lengths of the references, and the share of lines
        without an error (`exact`). `ctc_cer` is the character error rate of the encoder's CTC head alone."""
        import torch

        from stoker.training.core.error_rates import error_rates

        seen = model(batch["pixels"], batch["widths"])
        loss, extras = self._figures(model, batch, seen)
        said, found = ([self._compared(text) for text in texts] for texts in (
            batch["texts"], self.texts(self.written(model, seen))))
        if self.cfg.ctc_weight:
            heard = self.ctc_texts(seen.logits, seen.lengths)
            extras["ctc_cer"] = error_rates(said, list(map(self._compared, heard)))
        right = torch.tensor(list(map(str.__eq__, said, found)))
        return {"loss": loss, **extras, "cer": error_rates(said, found),
                "wer": error_rates(*([text.split() for text in texts] for texts in (said, found))),
                "exact": Ratio(right, torch.ones_like(right, dtype=torch.long))}

    def _compared(self, text: str) -> str:
        """The text as error rates compare it: without blanks around it, and without case if --ignore_case."""
        return text.strip().lower() if self.cfg.ignore_case else text.strip()

    @cached_property
    def _most_labels(self) -> int:
        from stoker.data.text.labels import most_labels

        return most_labels(self.tokenizer, self.cfg.max_text_length)

    def written(self, model: Any, seen: "Seen", beam: int = 1) -> "list[Written]":
        """What the decoder writes for each line: at most as many labels as the line has encoder states, and at most
        --max_text_length characters."""
        from stoker.model import decoding

        limits = seen.lengths.clamp(max=self._most_labels)
        memory = model.memory(seen, int(limits.max()))
        if beam == 1:
            return decoding.greedy(model, memory, limits, ends=self.tokenizer.end_of_text)
        return decoding.beam_search(model, memory, limits, ends=self.tokenizer.end_of_text, width=beam)

    def texts(self, written: "Sequence[Written]") -> list[str]:
        return [self.tokenizer.decode(each.tokens) for each in written]

    def samples(self, model: Any) -> "dict[str, Media]":
        """The lines with the highest error rates among some, evenly spread: the true text, and what the model read."""
        from stoker.training.core import media

        views = evenly(self.dataset("validation"), LOOKED_AT)
        found = [text for batch in self.batches(views, model)
                 for text in self.texts(self.written(model, model(batch["pixels"], batch["widths"])))]
        worst = sorted(zip(views, found), key=self._errors, reverse=True)[:SHOWN]
        below = [f"says  {view.text}\nread  {text}" for view, text in worst]
        return {"text/worst": media.Text("\n".join(below)),
                "picture/worst": media.strips([view.pixels[0].numpy() for view, _ in worst], below)}

    def _errors(self, pair: "tuple[View, str]") -> float:
        from stoker.training.core.error_rates import error_rate

        wrong, length = error_rate([self._compared(pair[0].text)], [self._compared(pair[1])])
        return float(wrong / max(1, length))

    def described(self) -> dict[str, Any]:
        return {"end": self.tokenizer.end_of_text}

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        """Also --ctc_weight 0 where the weights have no CTC head."""
        return {**super().options_from(pretrained),
                **({} if pretrained.options.get("ctc_weight", 1) else {"ctc_weight": 0.0})}


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(OCR)
