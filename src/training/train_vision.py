"""Vision encoder: trained on pictures and captions by a contrastive loss."""

import itertools
import logging
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker.config import UserError, opt, select
from stoker.data.pictures import table
from stoker.training.core.copied import beside
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from stoker.training.core.options import Options
from stoker.training.core.parts import Part
from stoker.training.core.phases import Group, Phase
from stoker.training.core.stage import reader
from stoker.training.stages.labelled import TOKENIZER, evenly, label_kind, vocabulary
from stoker.training.stages.pictures import OfPictures, Validation
from stoker.training.stages.sizes import Transformer, preset, sizes_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stoker.data.loader import Order
    from stoker.data.pairs import Pair, Pairs
    from stoker.data.pictures.resized import Frame
    from stoker.data.pictures.views import Augmentation as Changes
    from stoker.model.contrastive import DualEncoder
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)

STEMS, POSITIONS, BACKBONES = ("conv", "patch"), ("rotary", "learned"), ("vit", "conv")
LOSSES = ("auto", "softmax", "sigmoid", "classes")
VISION = ("image_size", "patch_size", "backbone", "stem", "positions")
TEXT = ("text_d_model", "text_num_heads", "text_layers")
SHAPE = (*VISION, "d_model", "num_heads", "num_layers", "d_ff", "embed_dim", "loss")
LANGUAGE_MODEL = "text.language_model"  # the part of the model whose weights --text_model names
LANGUAGE_MODELS = ("lm", "text")  # the stages that train language models
RECALL_AT = 1, 5, 10  # recall among so many nearest
LOOKED_AT, SHOWN, NEAREST = 256, 8, 3  # samples: pictures to compare, pictures to show, captions of each
CHARACTERS = 60  # of a caption that is shown
MOST_CLASSES = 40  # in a confusion matrix
MOST_COMPARED = 1000  # classes with which --loss auto compares each picture
FASTER = 9.0  # learning rate of the convolutional backbone's blocks, as a multiple of --lr
WHITENED = 2000  # pictures from which the filters of the convolutional backbone are computed


@dataclass
class Pictures:
    """Data"""

    dataset: str = opt("scenes", "scenes (drawn here, with captions), digits (handwritten, from scikit-learn), "
                       "coco-captions, a CSV file (image,caption or image,label), an annotations.json, or a folder or "
                       "TAR archive of pictures by class", path=table.NAMES, aliases=("data_path",))
    template: str = opt("a photo of {}", "caption of a picture that has only a class; {} stands for the class")
    image_size: int = opt(64, "side length that pictures are resized to, in pixels", ge=8, usual=(32, 384))
    fit: str = opt("crop", "how pictures become square: crop keeps the middle, pad adds white, stretch changes their "
                   "proportions", choices=("crop", "pad", "stretch"))
    max_text_length: int = opt(256, "characters of a caption that are used; the rest is cut off", ge=1)
    cache_images: bool = opt(True, "keep all pictures on disk, decoded and resized, instead of decoding them in each "
                             "epoch", may_change=True)

    def problems(self) -> list[str]:
        if "{}" not in self.template:
            return [f"--template {self.template!r} has no {{}} in it, which stands for the class"]
        return []


@dataclass
class Augmentation:
    """Augmentation of the training pictures, different in each epoch (0: off)"""

    crop: float = opt(0.1, "cut away up to this share of the area", ge=0, lt=1)
    flip: float = opt(0.0, "share of the epochs in which a picture is mirrored, left to right; 0.5: in every second "
                      "one. Not where captions say left or right, or pictures have text", ge=0, le=1)
    shift: float = opt(0.0, "move up or down and sideways by up to this share of the sides; the border is filled with "
                       "its mirror image", ge=0, le=0.5)
    colour: float = opt(0.1, "make brightness, contrast and saturation greater or smaller by up to this share", ge=0,
                        le=1)


@dataclass
class Architecture(Transformer, d_model=128, num_heads=4, num_layers=4, d_ff=512, dropout=0.0, head_multiple=4,
                   fewest_layers=0):
    """Model"""

    patch_size: int = opt(16, "side length of a patch, in pixels", ge=2)
    backbone: str = opt("vit", "vit: a transformer; conv: convolutions, which learn faster from photographs, then "
                        "--num_layers layers of a transformer, which may be 0", choices=BACKBONES)
    stem: str = opt("conv", "how pixels become patches in front of --backbone vit: conv (strided convolutions, which "
                    "learn faster) or patch (a linear layer)", choices=STEMS)
    positions: str = opt("rotary", "position embeddings of the patches: rotary, for pictures of any size, or learned, "
                         "for those of --image_size", choices=POSITIONS)

    def problems(self: Any) -> list[str]:  # num_layers is an option of the base class
        found = []
        if "conv" in (self.stem, self.backbone) and self.patch_size & (self.patch_size - 1):
            found.append(f"--patch_size {self.patch_size}: strided convolutions make patches of 2, 4, 8, 16, 32"
                         + ("; or take --stem patch" if self.backbone == "vit" else ""))
        if not self.num_layers and self.backbone == "vit":
            found.append("--num_layers 0: only --backbone conv sees without a transformer; take 1 or more")
        return found


@dataclass
class Text(Transformer, prefix="text_", d_model=128, num_heads=4, num_layers=2):
    """Text tower"""

    tokenizer: str = label_kind("bpe", "tokens of the captions")
    vocab_size: int = vocabulary(1024)
    text_model: str = opt("", "read captions with a trained, frozen language model instead of a text tower: a run of "
                          "run_train_lm.sh or run_train_text.sh, a snapshot, a model folder or hf://ORG/NAME", path=(),
                          aliases=("thinker_ckpt",))


@dataclass
class Contrast:
    """Contrastive loss"""

    embed_dim: int = opt(128, "size of the embeddings that are compared", ge=1)
    loss: str = opt("auto", "softmax: which caption of the batch belongs to a picture, and which picture to a "
                    "caption (CLIP); sigmoid: whether picture and caption belong together, for each pair (SigLIP); "
                    "classes: which of the captions of all classes belongs to a picture; auto: classes where captions "
                    "are classes, else softmax", choices=LOSSES)
    label_smoothing: float = opt(0.2, "share of the target that --loss classes spreads evenly over all classes", ge=0,
                                 lt=1)
    tta: bool = opt(False, "evaluate with the mean embedding of six views of each picture: as it is, moved up and "
                    "moved down a little, and the mirror images of these (test-time augmentation)")


@dataclass
class Config(Options, Contrast, Text, Architecture, Augmentation, Validation, Pictures):
    """The vision encoder's options."""

    def problems(self) -> list[str]:
        if self.image_size % self.patch_size:
            return [f"--patch_size {self.patch_size} does not divide --image_size {self.image_size}: take a divisor"]
        return []


class Vision(OfPictures[Config]):
    """Trains a vision encoder on pictures and captions, in the foreground. (./run/run_train_vision.sh: in the
    background.)

    `acc` is the share of pictures whose own caption is the nearest: in training among those of the micro-batch, in an
    evaluation among all.
    """

    name = "vision"
    Config = Config
    Augmentation = Augmentation
    content = "pictures", "text", "label"
    sizes = (*SHAPE, *TEXT)
    former_sizes = {"backbone": "vit"}
    tokenizer_option = "tokenizer"
    best = "eval/acc", "max"
    target = 0.70
    divisible = False  # a picture is compared with the others of its micro-batch
    presets = {
        "nano": preset(128, 4, 0, backbone="conv", text_layers=1, batch_size=64, optimizer="muon", lr=3e-3,
                       lr_schedule="linear", min_lr_ratio=0.0, crop=0.2, max_steps=1000),
        "tiny": preset(128, 2, 4, image_size=224, lr=1e-3, batch_size=64, epochs=15),
        "small": preset(384, 6, 4, backbone="conv", image_size=224, lr=5e-4, batch_size=256, text_d_model=256,
                       text_layers=4, embed_dim=256, vocab_size=8192),
        "medium": preset(768, 12, 12, image_size=224, lr=5e-4, batch_size=256, text_d_model=512,
                        text_num_heads=8, text_layers=8, embed_dim=512, vocab_size=16384),
    }

    @classmethod
    def resolve_defaults(cls, cfg: Any, typed: Collection[str]) -> tuple[Any, list[str]]:
        """Raises UserError where the user typed options of the text tower together with --text_model."""
        if cfg.text_model and (own := [f"--{name}" for name in ("tokenizer", "vocab_size", *TEXT) if name in typed]):
            raise UserError(f"{', '.join(own)}: of the text tower, which --text_model replaces; leave one of them out")
        return cfg, []

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from stoker.data import pairs

        self.open_pictures(self.read_table(self.cfg.template))
        self.register = pairs.registered(self.pictures, self.resized, longest=self.cfg.max_text_length)
        numbers = {split: rows[:, 1].unique().tolist() for split, rows in self.register.rows.items()}
        self._open_text([self.register.captions[number] for number in numbers["train"]])
        self.ids = self.captions(self.register.captions)
        self.loss_name = self._choose_loss()
        self._report({split: len(each) for split, each in numbers.items()})

    def _choose_loss(self) -> str:
        """The loss that --loss names or, for "auto", that suits the captions. Raises UserError for --loss classes where
        the captions are not classes."""
        asked, classes = self.cfg.loss, self.register.captions_are_classes()
        if asked == "classes" and not classes:
            raise UserError(f"--loss classes: the captions of --dataset {self.cfg.dataset} are not classes, each of "
                            "which has one caption; take --loss softmax")
        few = len(self.register.captions) <= MOST_COMPARED
        return asked if asked != "auto" else "classes" if classes and few else "softmax"

    def _open_text(self, captions: list[str]) -> None:
        """Open the tokenizer for captions: with --text_model, that of the language model."""
        from stoker.data.text.tokenizers import open_tokenizer

        if source := self.sources.get(LANGUAGE_MODEL):
            own = [folder / TOKENIZER for folder in (self.folder, source.folder) if (folder / TOKENIZER).is_file()]
            kind: Any = reader(source, LANGUAGE_MODELS)  # a file has the special tokens in it
            self.tokenizer = open_tokenizer(str(own[0]), 0, []) if own else open_tokenizer(
                source.options["tokenizer"], 0, [], special=kind.special_tokens)
        else:
            self.open_tokenizer(captions)

    def captions(self, captions: Sequence[str]) -> "list[Tensor]":
        """The token ids of each caption, cut at --max_text_length and at the language model's context."""
        import torch

        found = self.tokenizer.encode_batch([caption[:self.cfg.max_text_length] for caption in captions])
        source = self.sources.get(LANGUAGE_MODEL)
        context = source.options["max_seq_len"] if source else None
        if context and (cut := sum(len(ids) > context for ids in found)):
            log.warning("%s captions have more than the %s tokens that the language model reads at a time: the rest of "
                        "them is not read", f"{cut:,}", f"{context:,}")
        return [torch.tensor(ids[:context].tolist(), dtype=torch.long) for ids in found]

    def tokens(self, ids: "Sequence[Tensor]") -> "dict[str, Tensor]":
        """The ids of `captions` as a batch: tokens (U, T), and lengths (U,) without padding."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        return {"tokens": pad_sequence(list(ids), batch_first=True),
                "lengths": torch.tensor([len(each) for each in ids])}

    def _report(self, different: Mapping[str, int]) -> None:
        cfg = self.cfg
        if different["train"] < 2:
            raise UserError(f"--dataset {cfg.dataset}: all training pictures have the same caption, so there is "
                            "nothing to distinguish")
        counts = ", ".join(f"{count:,} in {split}" for split, count in different.items())
        log.info("Captions: %s; %s, vocabulary size %s", counts, self.tokenizer.name, f"{self.tokenizer.vocab_size:,}")
        if cut := sum(len(each.text) > cfg.max_text_length for rows in self.pictures.values() for each in rows):
            log.warning("%s captions are longer than %s characters: the rest of them is not read (--max_text_length)",
                        f"{cut:,}", f"{cfg.max_text_length:,}")
        if self.loss_name == "classes":
            log.info("Loss: which of the captions of all %s classes belongs to a picture", len(self.register.captions))
            return
        log.info("Contrast: each picture and each caption with the others of its micro-batch of %s, but for those that "
                 "share a picture or a caption", f"{cfg.batch_size:,}")
        if cfg.grad_accum_steps > 1:
            log.info("The %s micro-batches of a step are not compared with each other: a larger --batch_size, with "
                     "--gradient_checkpointing, compares more", cfg.grad_accum_steps)

    def changes(self, split: str) -> "Changes":
        from stoker.data.pictures.views import Augmentation as Changes

        return select(Changes, self.cfg) if split == "train" else Changes()

    def frame(self) -> "Frame":
        from stoker.data.pictures.resized import Frame

        return Frame(self.cfg.image_size, self.cfg.image_size, self.cfg.fit)

    def dataset(self, split: str) -> "Pairs":
        from stoker.data.pairs import Pairs

        return Pairs(self.views(split), self.register.rows[split])

    def groups(self, split: str) -> list[str]:
        """The group of each row, by --group_by or the data, else its picture, which may be in several rows."""
        rows = self.dataset(split)
        return [each.group or str(number) for each, number in zip(rows.views.pictures, rows.numbers[:, 0].tolist())]

    def order(self) -> "Order":
        from stoker.data.loader import Order

        cfg = self.cfg
        return Order(len(self.dataset("train")), cfg.batch_size, cfg.grad_accum_steps, cfg.seed, by_epoch=True)

    def collate(self, samples: "list[Pair]") -> Batch:
        """pixels (B, 3, H, W) uint8; numbers (B, 3) of picture, caption and class; tokens (U, T) and lengths (U,) of
        the U different captions of the batch (with the loss by classes, of all captions); caption (B,), the index of
        each picture's own caption among these U."""
        import torch

        numbers = torch.stack([pair.numbers for pair in samples])
        if self.loss_name == "classes":
            different, caption = torch.arange(len(self.ids)), numbers[:, 1]
        else:
            different, caption = numbers[:, 1].unique(return_inverse=True)
        return {"pixels": torch.stack([pair.pixels for pair in samples]), "numbers": numbers, "caption": caption,
                **self.tokens([self.ids[number] for number in different.tolist()])}

    def size(self, batch: Batch) -> dict[str, int]:
        return {"images": len(batch["pixels"])}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "DualEncoder":
        from stoker.model.contrastive import DualEncoder
        from stoker.model.vision_encoder import VisionEncoder

        cfg = self.cfg
        vision = VisionEncoder(**sizes_of(cfg), **{name: getattr(cfg, name) for name in VISION})
        return DualEncoder(vision, self._text_tower(), cfg.embed_dim, cfg.loss)

    def initialize(self, model: Any, batches: Iterable[Batch]) -> None:
        """Whitens the first layer of the convolutional backbone."""
        if self.cfg.backbone == "conv":
            pictures = (picture for batch in batches for picture in batch["pixels"])
            model.vision.stem.whitening.fit(itertools.islice(pictures, WHITENED))

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(groups=(Group("vision.stem.blocks.*", lr_factor=FASTER), Group())),)

    def parts(self) -> Sequence[Part]:
        named = self.cfg.text_model
        return [Part(LANGUAGE_MODEL, named, stages=LANGUAGE_MODELS, train="frozen", export="beside")] if named else []

    def _text_tower(self) -> "nn.Module":
        from stoker.model.text_tower import FrozenTextTower, TextTower

        cfg: Any = self.cfg
        if source := self.sources.get(LANGUAGE_MODEL):
            return FrozenTextTower(self._language_model(source), cfg.embed_dim)
        return TextTower(self.tokenizer.vocab_size, **sizes_of(cfg, "text_"), d_ff=4 * cfg.text_d_model,
                         embed_dim=cfg.embed_dim, dropout=cfg.dropout)

    def _language_model(self, source: "Pretrained") -> "nn.Module":
        """The language model's network without weights; `networks.build` loads them from the source."""
        import torch

        kind: Any = reader(source, LANGUAGE_MODELS)
        known = {field.name for field in fields(kind.Config)} & source.options.keys()
        language = kind(replace(kind.Config(), **{name: source.options[name] for name in known}), self.folder)
        language.tokenizer = self.tokenizer
        with torch.device("meta"):  # draws no random numbers
            return language.model().to_empty(device="cpu")  # type: ignore[no-any-return]

    def blocks(self, model: Any) -> list["nn.Module"]:
        """Those of the vision encoder only, since the length of captions differs from batch to batch."""
        return [*getattr(model.vision.stem, "blocks", ()), *model.vision.blocks]

    def counts(self, batch: Batch, phase: str) -> dict[str, int]:
        return {"loss": len(batch["pixels"])}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        from stoker.model.contrastive import LOSS_FUNCTIONS, alike, right_ones

        seen, read = self._vectors(model, batch)
        if self.loss_name == "classes":
            logits, own = model.logits(seen, read), batch["caption"]
            total, right = self._class_loss(logits, own), (logits.argmax(1) == own).sum()
        else:
            logits, same = model.logits(seen, read[batch["caption"]]), alike(*batch["numbers"].T[:2])
            total, right = LOSS_FUNCTIONS[self.loss_name](logits, same), right_ones(logits, same)
        return Loss({"loss": total}, {"acc": Ratio(right, len(logits)), "scale": Ratio(model.terms()[0].detach(), 1)})

    def _class_loss(self, logits: "Tensor", own: "Tensor", reduction: str = "sum") -> "Tensor":
        from torch.nn import functional as F

        return F.cross_entropy(logits, own, reduction=reduction, label_smoothing=self.cfg.label_smoothing)

    def _vectors(self, model: Any, batch: Batch) -> "tuple[Tensor, Tensor]":
        """The embeddings of the pictures (B, E) and of the batch's captions (U, E)."""
        tta = self.cfg.tta and not model.training
        return model.pictures(batch["pixels"], tta=tta), model.captions(batch["tokens"], batch["lengths"])

    # -- evaluation ---------------------------------------------------------------------------------------------

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        """Nothing is scored by batch: the nearest caption depends on all candidates, see `judge`."""
        return {}

    def gather(self, model: Any, batch: Batch) -> "dict[str, Tensor]":
        seen, read = self._vectors(model, batch)
        found = {"seen": seen, "read": read[batch["caption"]], "numbers": batch["numbers"],
                 "terms": model.terms().expand(len(seen), 2)}
        if self.loss_name == "classes":
            found["loss"] = self._class_loss(model.logits(seen, read), batch["caption"], "none")
        return found

    def judge(self, gathered: "Mapping[str, Tensor]") -> dict[str, Ratio]:
        from stoker.model import retrieval

        seen, read, numbers = (gathered[name] for name in ("seen", "read", "numbers"))
        queries = retrieval.queries(seen, read, numbers, at=RECALL_AT, seed=self.cfg.seed)
        return {"loss": self._loss_of_all(gathered), **{name: Sampled(retrieval.share(asked, right), 1, (right, asked))
                                                        for name, (asked, right) in queries.items()}}

    def _loss_of_all(self, gathered: "Mapping[str, Tensor]") -> Sampled:
        """A contrastive loss is computed in random batches of the training's batch size, so that it is comparable with
        the training loss whatever the order of the rows."""
        import torch

        from stoker.model import contrastive

        seen, read, numbers = (gathered[name] for name in ("seen", "read", "numbers"))
        ones = torch.ones(len(seen))
        if "loss" in gathered:
            return Sampled(float(gathered["loss"].sum()) / len(seen), 1, (gathered["loss"], ones))
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(self.cfg.seed))
        total, by_pair, compute = torch.zeros(()), torch.empty(len(seen)), contrastive.LOSS_FUNCTIONS[self.loss_name]
        for rows in order.split(self.cfg.batch_size):
            logits = contrastive.logits(seen[rows], read[rows], gathered["terms"][0])
            same = contrastive.alike(*numbers[rows].T[:2])
            total, by_pair[rows] = total + compute(logits, same), compute(logits, same, reduction="none")
        return Sampled(float(total) / len(seen), 1, (by_pair, ones))

    def samples(self, model: Any) -> "dict[str, Media]":
        """Pictures with the nearest captions, attention maps, and a confusion matrix where there are classes."""
        import torch

        from stoker.training.core import device as devices
        from stoker.training.core import media

        looked_at = evenly(self.dataset("validation"), LOOKED_AT)
        own, nearest = self._nearest(model, looked_at)
        shown = evenly(range(len(looked_at)), SHOWN)
        pixels = torch.stack([looked_at[i].pixels for i in shown])
        looks = model.attention(pixels.to(devices.of(model))).float().cpu().numpy()
        captions = self.register.captions
        below = [caption_lines(captions[own[i]], [captions[number] for number in nearest[i]]) for i in shown]
        images = pixels.movedim(1, 3).numpy()
        found: dict[str, Media] = {"text/captions": media.Text("\n\n".join(below)),
                                   "picture/captions": media.gallery(images, below),
                                   "picture/attention": media.gallery(images, below, looks)}
        if 2 <= len(labels := self.register.labels) <= MOST_CLASSES:
            class_of = {int(caption): int(label) for _, caption, label in self.register.rows["validation"]}
            confused = [(class_of[mine], class_of[found[0]]) for mine, found in zip(own, nearest)]
            found["picture/confusion"] = media.confusion([pair for pair in confused if min(pair) >= 0], labels)
        return found

    def _nearest(self, model: Any, looked_at: "list[Pair]") -> tuple[list[int], list[list[int]]]:
        """For each picture, the number of its own caption, and the numbers of the captions nearest to it."""
        import torch

        vectors = [(seen, read[batch["caption"]]) for batch in self.batches(looked_at, model)
                   for seen, read in [self._vectors(model, batch)]]
        seen, read = (torch.cat(each) for each in zip(*vectors))
        own = [int(pair.numbers[1]) for pair in looked_at]
        captions = {number: place for place, number in enumerate(own)}
        near = (seen @ read[list(captions.values())].T).argsort(1, descending=True)[:, :NEAREST]
        return own, [[list(captions)[place] for place in places] for places in near.tolist()]

    # -- exported weights ---------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        return {"template": self.cfg.template, "labels": self.register.caption_of()}

    def left_out(self) -> tuple[str, ...]:
        return (f"{LANGUAGE_MODEL}.",)

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        """With a language model, that instead of the sizes and the tokenizer of the text tower."""
        found = super().options_from(pretrained)
        if not (named := pretrained.options.get("text_model")):
            return found
        return {**{name: found[name] for name in SHAPE}, "text_model": str(beside(pretrained, LANGUAGE_MODEL) or named)}

    def reopen(self) -> None:
        self._open_text([])


def caption_lines(own: str, nearest: Sequence[str]) -> str:
    """The lines below a picture: its own caption, and the nearest ones, marked = if right and - if wrong."""
    import textwrap

    lines = [("caption:", own), *(("=" if text == own else "-", text) for text in nearest)]
    return "\n".join(textwrap.shorten(f"{sign} {text}", CHARACTERS) for sign, text in lines)


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(Vision)
