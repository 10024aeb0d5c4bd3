"""Base class of stages with pictures and texts: reads, checks, resizes, caches and augments the pictures."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stoker.config import listed, opt
from stoker.data import splits
from stoker.data.pictures import table
from stoker.training.core.stage import C
from stoker.training.stages.labelled import Labelled

if TYPE_CHECKING:
    from stoker.data.pictures.check import Limits
    from stoker.data.pictures.resized import Frame
    from stoker.data.pictures.views import Changes, Views


@dataclass
class Validation:
    """Validation set, where the data define no split"""

    group_by: str = opt("", "a regular expression for the group in a picture's path, such as a page or a patient; "
                        "a group is never split between training and validation")
    held_out: str = opt("", "groups to validate on, comma-separated (default: the data's own split, else --valid_share "
                        "of the groups or pictures)")
    valid_share: float = opt(splits.SHARE, "share of the groups or pictures to validate on", gt=0, le=0.5)


class OfPictures(Labelled[C]):
    """`pictures` are the rows by split, `resized` their decoded files. `content` is for the fingerprint of the data:
    first the word for them in the message when a resume is refused, then the fields of a row that count beside the
    pixels."""

    content: ClassVar[tuple[str, ...]]

    def frame(self) -> "Frame":
        """The size of the pictures that the model sees."""
        raise NotImplementedError

    def changes(self, split: str) -> "Changes":
        """How the rows of a split are augmented."""
        raise NotImplementedError

    @classmethod
    def check(cls, cfg: Any, *, resumed: bool) -> list[str]:
        return table.check(cfg.dataset, group_by=cfg.group_by) + super().check(cfg, resumed=resumed)

    def read_table(self, template: str = "") -> table.Splits:
        """The rows of --dataset; `template` makes the caption of a row that has only a label."""
        cfg: Any = self.cfg
        return table.read(cfg.dataset, template=template, group_by=cfg.group_by, held_out=listed(cfg.held_out),
                          share=cfg.valid_share)

    def open_pictures(self, found: table.Splits, limits: "Limits | None" = None) -> None:
        """Decode every file, and leave out rows that cannot be used. Raises UserError where a split has no other."""
        from stoker.data.pictures import check

        cfg: Any = self.cfg
        frames = {split: self.changes(split).stored(self.frame()) for split in found}
        self.pictures, self.resized, _ = check.checked(found, frames, keep=cfg.cache_images,
                                                       limits=limits or check.Limits(),
                                                       evaluated_split=cfg.evaluated_split)

    def views(self, split: str) -> "Views":
        from stoker.data.pictures.views import Views

        limit = self.cfg.max_samples if split == "train" else 0
        return Views(self.pictures[split][:limit or None], self.frame(), resized=self.resized[split],
                     augmentation=self.changes(split), seed=self.cfg.seed)

    def splits(self) -> tuple[str, ...]:
        return tuple(self.pictures)

    def made_from(self) -> dict[str, str]:
        name, *fields = self.content
        rows = [[split, *(getattr(each, field) for field in fields)]
                for split, part in self.pictures.items() for each in part]
        seen = json.dumps([*(each.fingerprint() for each in self.resized.values()), rows])
        return {name: hashlib.sha256(seen.encode()).hexdigest(), **super().made_from()}
