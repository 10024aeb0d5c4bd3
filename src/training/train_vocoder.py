"""Vocoder: trained to make waveforms of log-mel spectrograms, by spectral losses and, optionally, as a GAN."""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker import files
from stoker.config import UserError, listed, opt
from stoker.data.sources import names
from stoker.data.speech import audio, recordings
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from stoker.training.core.options import Options
from stoker.training.core.phases import Group, Phase
from stoker.training.core.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stoker.data.speech.clips import Clip, Clips
    from stoker.model.vocoding import Vocoding
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

GENERATORS = "istft", "hifigan"
SHAPE = "generator", "num_mels", "d_model", "num_layers", "channels", "upsample_rates"
HOP = 160  # samples in a mel frame
PLACE = 1  # key of a row's random number for where its segment begins, beside those for its sound
EVALUATED = 40  # recordings


@dataclass
class Speech:
    """Data"""

    dataset: str = opt("spoken", f"{', '.join(names.SPOKEN)} (made here by espeak-ng), "
                       f"{', '.join(names.LIBRISPEECH)}, a CSV file or a folder of sound files; texts are not needed",
                       path=recordings.NAMES, aliases=("data_path", "csv"))
    held_out: str = opt("", "speakers to keep for validation, comma-separated (default: the data's own split, else "
                        "5 % of the speakers or recordings)")
    segment_seconds: float = opt(0.5, "length of the segments to train on", ge=0.1, le=20)
    max_mel_length: int = opt(2048, "longest recording, in frames of 10 ms; longer ones are left out", ge=16)
    cache_audio: bool = opt(True, "keep all recordings decoded on disk (115 MB an hour) instead of decoding them in "
                            "each epoch", may_change=True)


@dataclass
class Architecture:
    """Model"""

    generator: str = opt("istft", "istft: magnitudes and phases, then the inverse Fourier transform; hifigan: "
                         "transposed convolutions, slower to train and to use", choices=GENERATORS)
    num_mels: int = opt(80, "mel bands", ge=8, usual=(40, 128))
    d_model: int = opt(192, "hidden size of --generator istft", ge=8, usual=(64, 1024), aliases=("n_embd",))
    num_layers: int = opt(5, "layers of --generator istft", ge=1, le=48, aliases=("n_layer", "n_layers"))
    channels: int = opt(128, "channels of the first layer of --generator hifigan; each further one has half", ge=16)
    upsample_rates: str = opt("8,5,2,2", "by how much each layer of --generator hifigan multiplies the rate; their "
                              f"product is {HOP}, the samples in a mel frame")

    def problems(self) -> list[str]:
        rates = listed(self.upsample_rates)
        if not all(rate.isdigit() and int(rate) > 0 for rate in rates) or math.prod(map(int, rates)) != HOP:
            return [f"--upsample_rates {self.upsample_rates}: whole numbers with the product {HOP}, the samples in a "
                    "mel frame, such as 8,5,2,2"]
        if self.channels % 2 ** len(rates):
            return [f"--channels {self.channels} cannot be halved {len(rates)} times: take a multiple of "
                    f"{2 ** len(rates)}"]
        return []


@dataclass
class Losses:
    """Optimization"""

    mel_weight: float = opt(45.0, "weight of the difference of mel spectrograms", ge=0, le=1000)
    stft_weight: float = opt(1.0, "weight of the distance of spectra at three resolutions", ge=0, le=1000)
    discriminators: bool = opt(False, "also train discriminators, and the generator against them: sharper sound, for "
                               "ten times the time of a step")
    discriminator_start: float = opt(0.25, "share of the steps after which the discriminators begin", ge=0, lt=1)
    discriminator_width: int = opt(16, "channels of the discriminators' first layers, a multiple of 4; 32 in the paper",
                                   ge=4)
    feature_weight: float = opt(2.0, "weight of the difference of the discriminators' features", ge=0, le=1000)

    def problems(self) -> list[str]:
        if self.discriminator_width % 4:
            return [f"--discriminator_width {self.discriminator_width} must be a multiple of 4"]
        return []


@dataclass
class Config(Options, Losses, Architecture, Speech):
    """The vocoder's options."""


class Vocoder(Stage[Config]):
    """Trains a vocoder on recordings, in the foreground. (./run/run_train_vocoder.sh: in the background.)

    A sample is a segment of a recording. `mel` is the mean absolute difference of log-mel spectrograms, in powers of
    ten; `stft` the distance of spectra (Yamamoto et al. 2020).
    """

    name = "vocoder"
    Config = Config
    best = "eval/stft", "min"
    presets = {
        "nano": {"lr": 2e-3, "batch_size": 16, "epochs": 2},
        "tiny": {"generator": "hifigan", "discriminators": True, "batch_size": 16},
        "small": {"d_model": 384, "num_layers": 8, "discriminators": True, "batch_size": 16},
        "medium": {"d_model": 512, "num_layers": 8, "discriminators": True, "discriminator_width": 32},
    }

    @classmethod
    def check(cls, cfg: Any, *, resumed: bool) -> list[str]:
        return recordings.check(cfg.dataset)

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from stoker.data.speech.check import Limits, checked

        cfg = self.cfg
        found = recordings.read(cfg.dataset, held_out=listed(cfg.held_out), shared_texts=True)
        limits = Limits(max_mel_length=cfg.max_mel_length, labelled=False)
        self.utterances, self.decoded, _ = checked(found, keep=cfg.cache_audio, limits=limits,
                                                   evaluated_split=cfg.evaluated_split)

    def dataset(self, split: str) -> "Clips":
        from stoker.data.speech.clips import Clips

        limit = self.cfg.max_samples if split == "train" else 0
        return Clips(self.utterances[split][:limit or None], decoded=self.decoded, seed=self.cfg.seed)

    def splits(self) -> tuple[str, ...]:
        return tuple(self.utterances)

    def groups(self, split: str) -> list[str]:
        """The speaker of each row."""
        return [each.speaker for each in self.dataset(split).utterances]

    def collate(self, samples: "list[Clip]") -> Batch:
        """waveforms (B, N), their lengths in samples (B,), and where in each the segment begins, as a share (B,)."""
        import numpy as np
        import torch
        from torch.nn.utils.rnn import pad_sequence

        return {"waveforms": pad_sequence([clip.waveform for clip in samples], batch_first=True),
                "samples": torch.tensor([len(clip.waveform) for clip in samples]),
                "places": torch.tensor([np.random.default_rng((self.cfg.seed, clip.epoch, clip.row, PLACE)).random()
                                        for clip in samples], dtype=torch.float32)}

    def made_from(self) -> dict[str, str]:
        rows = json.dumps([[split, each.path, each.speaker] for split, part in self.utterances.items()
                           for each in part])
        return {"speech": hashlib.sha256((self.decoded.fingerprint() + rows).encode()).hexdigest()}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "Vocoding":
        from stoker.model.hifigan import Discriminators, Generator
        from stoker.model.vocoder import SpectralVocoder
        from stoker.model.vocoding import Vocoding

        cfg = self.cfg
        if cfg.generator == "istft":
            generator: nn.Module = SpectralVocoder(cfg.num_mels, cfg.d_model, cfg.num_layers)
        else:
            generator = Generator(cfg.num_mels, cfg.channels, [int(rate) for rate in listed(cfg.upsample_rates)])
        judges = Discriminators(cfg.discriminator_width) if cfg.discriminators else None
        return Vocoding(cfg.num_mels, generator, judges)

    def phases(self) -> tuple[Phase, ...]:
        """The generator, then the discriminators on what it made."""
        generator = Phase("generator", (Group("generator.*"),), betas=(0.8, 0.99))
        if not self.cfg.discriminators:
            return (generator,)
        return generator, Phase("discriminators", (Group("discriminators.*"),), betas=(0.8, 0.99), first=self._start)

    @property
    def _start(self) -> int:
        """The step at which the discriminators begin."""
        return int(self.cfg.discriminator_start * (self.cfg.max_steps or 0))

    def counts(self, batch: Batch, phase: str) -> dict[str, int]:
        terms = ["mel", "stft"] + ["adversarial", "features"] * self.cfg.discriminators
        return dict.fromkeys(terms if phase == "generator" else ["discriminators"], len(batch["samples"]))

    def weights(self, moment: Moment) -> dict[str, float]:
        cfg = self.cfg
        found = {"mel": cfg.mel_weight, "stft": cfg.stft_weight}
        if cfg.discriminators:
            begun = float(moment.step >= self._start)
            found |= {"adversarial": begun, "features": begun * cfg.feature_weight}
        return found

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        from stoker.model import spectral_losses as losses

        mel, real = model.segments(batch, self.cfg.segment_seconds)
        if moment.phase == "discriminators":
            judged = model.discriminators(real), model.discriminators(moment.passed)
            return Loss({"discriminators": losses.discriminator_loss(*judged).sum()})
        made = model.generator(mel)
        terms = {"mel": model.mel_distance(made, real).sum(), "stft": losses.stft_distance(made, real).sum()}
        if self.cfg.discriminators:
            if moment.step < self._start:
                terms |= dict.fromkeys(("adversarial", "features"), made.new_zeros(()))
            else:
                judged = model.discriminators(real), model.discriminators(made)
                terms |= {"adversarial": losses.generator_loss(judged[1]).sum(),
                          "features": losses.feature_loss(*judged).sum()}
        return Loss(terms, passed=made)

    def evaluations(self) -> list[Evaluation]:
        """Whole recordings one by one, since padding would count as silence that is made well."""
        return [Evaluation("eval", self.dataset, self.collate, self.score, groups=self.groups, batch_size=1,
                           max_rows=EVALUATED)]

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        """Beside the distances of what is made those of Griffin-Lim's, the bar that a vocoder should be below."""
        from stoker.model.griffin_lim import GriffinLim
        from stoker.model.spectral_losses import stft_distance

        mel, real, _ = model.pairs(batch)
        found: dict[str, Ratio] = {}
        makers: "dict[str, Callable[[Tensor], Tensor]]" = {"": model.generator, "griffin_lim_": GriffinLim(model.mel)}
        for name, make in makers.items():
            made = make(mel).float()
            for figure, distances in (("stft", stft_distance(made, real)), ("mel", model.mel_distance(made, real))):
                found[f"{name}{figure}"] = Sampled(distances.sum(), len(mel), (distances, distances.new_ones(len(mel))))
        return found

    def samples(self, model: Any) -> "dict[str, Media]":
        """The first validation recording, what the vocoder and Griffin-Lim make of its spectrogram, and their
        spectrograms."""
        from stoker.model.griffin_lim import GriffinLim
        from stoker.model.mel import FRAME_RATE
        from stoker.training.core import device as devices
        from stoker.training.core.media import Sound, spectrogram

        batch = devices.move(self.collate([self.dataset("validation")[0]]), devices.of(model))
        mel, real, frames = model.pairs(batch)
        sounds = {"recording": real, "vocoder": model.generator(mel).float(), "griffin_lim": GriffinLim(model.mel)(mel)}
        found: "dict[str, Media]" = {}
        for name, sound in sounds.items():
            found[f"sound/{name}"] = Sound(sound[0].cpu().numpy(), audio.RATE)
            picture = model.mel(sound, batch["samples"].new_tensor([sound.shape[1]]))[0]
            found[f"picture/{name}"] = spectrogram(picture[0].cpu().numpy(), FRAME_RATE,
                                                     model.mel.frequencies().cpu().numpy())
        return found

    # -- export and load ----------------------------------------------------------------------------------------

    def export(self, model: Any, folder: Path) -> None:
        """The generator alone, in model.safetensors, and config.json with its sizes."""
        import safetensors.torch

        weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()
                   if name.startswith("generator.")}
        files.write(folder / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
        files.write_json(folder / "config.json", {"model_type": f"stoker_{self.name}", "sample_rate": audio.RATE,
                                                  **{name: getattr(self.cfg, name) for name in SHAPE}})

    def load(self, model: Any, folder: Path) -> None:
        from stoker.model import weights

        weights.load(model, folder, but=("discriminators.",))

    @classmethod
    def options_from(cls, pretrained: "Pretrained") -> dict[str, Any]:
        if not pretrained.options.keys() >= set(SHAPE):
            raise UserError(f"{pretrained} is of another program or version: this stage reads models of "
                            "run_train_vocoder.sh")
        return {name: pretrained.options[name] for name in SHAPE}


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(Vocoder)
