"""Shows, at each evaluation, what the model makes, and keeps it in the run's samples/."""

import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

from stoker import files
from stoker.training.core import device as devices
from stoker.training.core import rng
from stoker.training.core.callback import Callback
from stoker.training.core.media import Media, Picture, Sound, Text

if TYPE_CHECKING:
    from torch import nn

    from stoker.training.trainer import Trainer


@dataclass
class Samples(Callback):
    """Asks the stage for samples before each evaluation, when averaged weights, if there are, are in place.

    Whatever is drawn for them, training goes on as if it had not been. They stand in
    `folder`/step_00000500/text_0.txt (.png, .wav); a step that is done again writes them again.
    """

    folder: Path

    def on_eval_start(self, trainer: "Trainer") -> None:
        with torch.no_grad(), rng.preserved(), evaluating(trainer.model):
            with devices.autocast(trainer.device, trainer.cfg.precision):
                made = trainer.stage.samples(trainer.model)
        folder = self.folder / f"step_{trainer.step:08d}"
        for name, media in made.items():
            trainer.show(name, media)
            folder.mkdir(exist_ok=True)
            keep(folder / name.replace("/", "_"), media)


@contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """The model in evaluation mode; after the block, each of its modules is in the mode it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def keep(path: Path, media: Media) -> None:
    """Write a sample as the kind of file that people open; `path` is without ending."""
    if isinstance(media, Text):
        files.write(Path(f"{path}.txt"), media.content + "\n", sync=False)
    elif isinstance(media, Picture):
        files.write(Path(f"{path}.png"), lambda file: png(file, media), sync=False)
    elif isinstance(media, Sound):
        files.write(Path(f"{path}.wav"), lambda file: wav(file, media), sync=False)


def png(file: IO[bytes], picture: Picture) -> None:
    from PIL import Image

    Image.fromarray(picture.pixels).save(file, format="PNG")


def wav(file: IO[bytes], sound: Sound) -> None:
    """One channel of 16 bits."""
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sound.rate)
        out.writeframes((np.clip(sound.samples, -1, 1) * 32767).round().astype("<i2").tobytes())
