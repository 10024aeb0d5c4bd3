"""Audio encoder of speech: log-mel, strided convolutions, transformer; trained to recognise speech by CTC."""

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker.config import UserError, listed, opt, select
from stoker.data.sources import names
from stoker.data.speech import audio, recordings
from stoker.training.core.figures import Batch, Loss, Moment, Ratio, Sampled
from stoker.training.core.language import LanguageModel
from stoker.training.core.options import Options
from stoker.training.core.transcripts import Source, Terms, Transcribing
from stoker.training.stages import fusion
from stoker.training.stages.labelled import Labelled, label_kind, vocabulary
from stoker.training.stages.sizes import Transformer, preset, sizes_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from stoker.data.loader import Order
    from stoker.data.speech.check import Limits
    from stoker.data.speech.clips import Clip, Clips
    from stoker.model.speech_encoder import Recognizer
    from stoker.training.core.callback import Callback
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

log = logging.getLogger(__name__)

BLOCKS = "transformer", "convolution", "conformer"
SHOWN = 8  # transcripts
EPOCHS_LOOKED_AT = 20  # for one in which a recording is changed
SHAPE = 32  # frames: batches are padded to a multiple, since torch prepares its kernels again for each other length
SPECTRUM_DRAWS, MASK_DRAWS, FIELD_DRAWS = 1, 2, 3  # keys of a row's random numbers, beside those for its sound
MELS = 80  # bands for which AUGMENTS states mask_bands; for another number it is scaled in proportion
AUGMENTS: dict[str, dict[str, Any]] = {  # --augment
    "none": {},
    "mild": {"speed": 0.1, "gain": 6.0, "colour": 6.0, "mask_bands": 12, "mask_time": 0.08},
    "strong": {"speed": 0.12, "pitch": 1.0, "warp": 0.12, "rhythm": 0.2, "silence": 0.4, "reverb": 0.3, "noise": 8.0,
               "babble": 20.0, "clip": 0.03, "codec": 0.05, "gain": 6.0, "colour": 12.0, "narrow": 0.1,
               "contrast": 0.15, "elastic": 0.1, "unchanged": 0.3, "mask_bands": 14, "mask_time": 0.08},
}


@dataclass
class Speech:
    """Data"""

    dataset: str = opt("spoken", f"{', '.join(names.SPOKEN)} (made here by espeak-ng), "
                       f"{', '.join(names.LIBRISPEECH)}, a CSV file "
                       "(audio_path,transcription), or a folder of sound files with their texts",
                       path=recordings.NAMES, aliases=("data_path", "csv"))
    extra_dataset: str = opt("", "also train on the training set of this data set; validation does not use it",
                               path=recordings.NAMES)
    held_out: str = opt("", "speakers to keep for validation, comma-separated (default: the data's own split, else "
                        "5 % of the speakers or texts)")
    shared_texts: bool = opt(False, "allow training texts that validation has too, said by others: right for digits "
                             "and commands")
    max_mel_length: int = opt(2048, "longest recording, in frames of 10 ms; longer ones are left out", ge=16)
    max_text_length: int = opt(256, "longest text, in characters; longer ones are left out", ge=1)
    cache_audio: bool = opt(True, "keep all recordings decoded on disk (115 MB an hour) instead of decoding them in "
                            "each epoch", may_change=True)
    batch_seconds: float = opt(0.0, "largest micro-batch, in seconds of sound with padding, before --speed and "
                               "--silence make it longer (0: only --batch_size limits it)", ge=0)


@dataclass
class Augmentation:
    """Augmentation of the training speech, different in each epoch (0: off)"""

    augment: str = opt("mild", "sets all other options of this section but --masks: none, mild or strong (preset nano: "
                       "strong); those that you type keep their values", choices=tuple(AUGMENTS))
    speed: float = opt(0.1, "play faster or slower, which changes the pitch too, by up to this share", ge=0, le=0.5)
    pitch: float = opt(0.0, "higher or lower by up to so many semitones, voice and resonances alike, at the same "
                       "speed", ge=0, le=12)
    warp: float = opt(0.0, "as by a shorter or longer vocal tract: formants up or down by up to so many octaves", ge=0,
                      le=0.5)
    rhythm: float = opt(0.0, "parts of a recording faster or slower than others, by up to about this share", ge=0,
                        le=0.7)
    silence: float = opt(0.0, "silence before and after a recording, up to so many seconds", ge=0, le=10)
    reverb: float = opt(0.0, "share of the recordings that are heard in a room that echoes", ge=0, le=1)
    noise: float = opt(0.0, "add noise of a random colour: to half of the recordings so many dB below the speech or up "
                       "to 25 dB fainter, to the others 25 to 65 dB fainter, as of a quiet microphone", ge=0, le=100)
    babble: float = opt(0.0, "add one to four other recordings, at least so many dB below, to half of the recordings",
                        ge=0, le=100)
    clip: float = opt(0.0, "share of the recordings whose loudest samples are cut off", ge=0, le=1)
    codec: float = opt(0.0, "share of the recordings that are coded with few bits, as by a telephone", ge=0, le=1)
    gain: float = opt(6.0, "louder or quieter towards the end by up to so many dB", ge=0, le=40)
    colour: float = opt(6.0, "as from another microphone: frequencies louder or quieter by up to so many dB", ge=0,
                        le=40)
    narrow: float = opt(0.0, "share of the recordings that lose what is below a frequency between 100 and 400 Hz, and "
                        "share that lose what is above one between 2.8 and 4.2 kHz, as over a telephone", ge=0, le=1)
    elastic: float = opt(0.0, "elastic deformation: from moment to moment move what is heard up and down in frequency "
                         "(standard deviation, in octaves), and as much in time and loudness", ge=0, le=0.5)
    contrast: float = opt(0.0, "loud and quiet further apart or nearer by up to this share", ge=0, le=0.5)
    unchanged: float = opt(0.0, "share of the recordings that stay as they are; only masks are applied", ge=0, le=1)
    masks: int = opt(2, "SpecAugment: masks over frequency, and as many over time", ge=0, le=32)
    mask_bands: int = opt(12, "SpecAugment: mel bands of a mask over frequency, at most; --augment sets it for 80 "
                          "bands, and in proportion for others", ge=0)
    mask_time: float = opt(0.08, "SpecAugment: share of the recording that a mask over time blanks out, at most", ge=0,
                           le=0.5)


@dataclass
class Consistency:
    """Optimization"""

    consistency: float = opt(0.0, "CR-CTC: train on two views of each recording with different masks, and weigh the "
                             "distance of their predictions by this (0: one view; 0.2 is usual, and doubles the work)",
                             ge=0, le=100)


@dataclass
class Architecture(Transformer, d_model=192, num_heads=3, num_layers=4, d_ff=768, dropout=0.1):
    """Model"""

    labels: str = label_kind("chars", "what the head outputs")
    vocab_size: int = vocabulary(512)
    block: str = opt("convolution", "layers: transformer (self-attention, MLP), convolution (a depthwise convolution "
                     "before these), or conformer", choices=BLOCKS)
    num_mels: int = opt(MELS, "mel bands", ge=8, usual=(40, 128))
    downsample_time: int = opt(4, "input frames (10 ms) per encoder frame: 2, 4 or 8, for 50, 25 or 12.5 a second")
    head_frames: int = opt(2, "CTC output frames per encoder frame; each can have one label (1 with "
                           "--labels bpe)", ge=1, le=8)

    def problems(self) -> list[str]:
        if self.downsample_time not in (2, 4, 8):
            return [f"--downsample_time must be 2, 4 or 8, is {self.downsample_time}"]
        return []


@dataclass
class Config(LanguageModel, Options, Consistency, Architecture, Augmentation, Speech):
    """The audio encoder's options."""


class AudioEncoder(Transcribing, Labelled[Config]):
    """Trains an audio encoder on speech, in the foreground. (./run/run_train_audio_enc.sh: in the background.)

    A sample is an utterance. `loss` is -log of the probability of the text, for each of its labels; `ctc_loss` the
    same for each utterance.
    """

    name = "audio_enc"
    Config = Config
    Augmentation = Augmentation
    sizes = ("d_model", "num_heads", "num_layers", "d_ff", "block", "num_mels", "downsample_time", "head_frames")
    former_sizes = {"block": "convolution"}
    best = "eval/wer", "min"
    target = 0.20
    text_rates = ("eval/wer",)
    terms = Terms("recordings", "speaker", "seconds", "said", "heard")
    with_language_model: "fusion.WithLanguageModel | None" = None
    presets = {
        "nano": preset(144, 4, 4, num_mels=40, dropout=0.0, labels="bpe", vocab_size=300, augment="strong",
                       optimizer="muon", lr=4e-3, epochs=11, batch_seconds=24.0),
        "tiny": preset(192, 3, 4, num_mels=128, lr=1e-3, batch_seconds=120.0),
        "small": preset(256, 4, 8, lr=1e-3, batch_size=64, batch_seconds=240.0),
        "medium": preset(512, 8, 12, lr=1e-3, batch_size=64, batch_seconds=320.0),
    }

    @classmethod
    def check(cls, cfg: Any, *, resumed: bool) -> list[str]:
        problems = recordings.check(cfg.dataset)
        if cfg.extra_dataset:
            problems += recordings.of_extra(recordings.check(cfg.extra_dataset))
        return problems + fusion.problems(cfg) + super().check(cfg, resumed=resumed)

    @classmethod
    def resolve_defaults(cls, cfg: Any, typed: Collection[str]) -> tuple[Any, list[str]]:
        """Also the defaults that follow from --augment and --labels."""
        if "mask_bands" in typed and cfg.mask_bands >= cfg.num_mels:
            raise UserError(f"--mask_bands {cfg.mask_bands} must be less than the {cfg.num_mels} of --num_mels: a "
                            "mask that wide hides the whole recording")
        cfg, lines = super().resolve_defaults(cfg, typed)
        defaults = {field.name: 0 for field in fields(Augmentation) if field.name not in ("augment", "masks")}
        defaults |= AUGMENTS[cfg.augment]
        defaults["mask_bands"] = round(defaults["mask_bands"] * cfg.num_mels / MELS)
        if cfg.labels == "bpe":  # a token may cover several letters, so fewer frames are enough
            defaults["head_frames"] = 1
        return replace(cfg, **{name: value for name, value in defaults.items() if name not in typed}), lines

    @classmethod
    def all_rows(cls, cfg: Any) -> Any:
        return replace(super().all_rows(cfg), shared_texts=True, extra_dataset="")

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from stoker.data.speech.check import checked

        cfg = self.cfg
        found = recordings.read(cfg.dataset, held_out=listed(cfg.held_out), shared_texts=cfg.shared_texts)
        if cfg.extra_dataset:
            recordings.add_extra(found, cfg.extra_dataset, shared_texts=cfg.shared_texts)
        self.open_tokenizer([each.text for each in found["train"]])
        self.utterances, self.decoded, report = checked(found, keep=cfg.cache_audio, limits=self._limits(),
                                                        evaluated_split=cfg.evaluated_split)
        self.warn_of_unspelled(each.text for rows in self.utterances.values() for each in rows)
        self._advise(sum(why.startswith("not alignable") for _, _, why in report.refused))
        if cfg.lm and self.pretrained:
            self.with_language_model = self._language_model(self.pretrained)

    def _limits(self) -> "Limits":
        from stoker.data.speech.check import Limits

        cfg = self.cfg
        return Limits(max_mel_length=cfg.max_mel_length, max_text_length=cfg.max_text_length, labels=self.encode,
                      frames=self._frames, speed=cfg.speed)

    def _language_model(self, trained: "Pretrained") -> "fusion.WithLanguageModel":
        """The evaluation with --lm, and the recordings to tune the language model's weight on."""
        from stoker.data.speech.check import examined
        from stoker.data.speech.clips import Clips

        cfg, clips = self.cfg, list[Any]()
        if None in (cfg.lm_weight, cfg.lm_bonus):
            rows, decoded, _ = examined({"validation": fusion.validation_rows(trained)}, keep=False,
                                        limits=self._limits())
            if not rows["validation"]:
                raise UserError("--lm is tuned on the validation set of the training, none of whose recordings can be "
                                "read: type --lm_weight and --lm_bonus")
            clips = [*Clips(rows["validation"], decoded=decoded)]
            evaluated = {each.path for split, part in self.utterances.items() if cfg.split in (split, "all")
                         for each in part}
            if common := sum(each.path in evaluated for each in rows["validation"]):
                log.warning("%s of the %s recordings on which the language model's weight is tuned are evaluated, too: "
                            "lm_wer and lm_cer are better than on other speech", common, len(clips))
        return fusion.WithLanguageModel(cfg, self.tokenizer, self._logits, lambda model: self.batches(clips, model))

    def _frames(self, samples: int) -> int:
        """The number of frames that the CTC head has for a recording of so many samples."""
        from stoker.data.speech.check import head_frames

        return head_frames(samples, self.cfg.downsample_time, self.cfg.head_frames)

    def _advise(self, refused: int) -> None:
        rate = 100 / self.cfg.downsample_time * self.cfg.head_frames
        log.info("Labels: %s, %s of them and the blank; %g frames a second", self.tokenizer.name,
                 f"{self.tokenizer.vocab_size - 1:,}", rate)
        if refused:
            log.warning("%s recordings have more labels than frames at %g a second, some when played faster: more "
                        "--head_frames, --labels bpe or a smaller --speed makes room for them", f"{refused:,}", rate)

    def dataset(self, split: str) -> "Clips":
        from stoker.data.speech.augmentation import Augmentation as Changes
        from stoker.data.speech.clips import Clips

        cfg, rows = self.cfg, self.utterances[split]
        if split != "train":
            return Clips(rows, decoded=self.decoded)
        return Clips(rows[:cfg.max_samples or None], decoded=self.decoded, augmentation=select(Changes, cfg),
                     seed=cfg.seed)

    def splits(self) -> tuple[str, ...]:
        return tuple(self.utterances)

    def groups(self, split: str) -> list[str]:
        """The speaker of each row."""
        return [each.speaker for each in self.dataset(split).utterances]

    def text_sources(self, split: str) -> list[Source]:
        return [Source(each.path, each.seconds) for each in self.dataset(split).utterances]

    def order(self) -> "Order":
        return self.order_by_length([each.seconds for each in self.dataset("train").utterances], self.cfg.batch_seconds)

    def collate(self, samples: "list[Clip]") -> Batch:
        """waveforms (B, N) float32 and their lengths in samples (B,); labels, those of all utterances in one row, and
        label_lengths (B,); for changes of the spectrogram pitch (B,) and random numbers: changes (B, NUMBERS), fields
        (B, 3, P, BANDS), masks (B, views, K, 4); texts; seconds of sound in all."""
        import numpy as np
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from stoker.model.mel import HOP_LENGTH
        from stoker.model.spectral_changes import BANDS, NUMBERS

        cfg, count = self.cfg, self._places(samples)
        labels = [torch.tensor(self.encode(clip.text), dtype=torch.long) for clip in samples]
        waveforms = pad_sequence([clip.waveform for clip in samples], batch_first=True)
        length = self._longest() if cfg.compile else _rounded(waveforms.shape[1], SHAPE * HOP_LENGTH)
        waveforms = torch.nn.functional.pad(waveforms, (0, length - waveforms.shape[1]))
        unchanged = torch.tensor([clip.unchanged for clip in samples])
        masks = 2 if cfg.consistency else 1, cfg.masks, 4
        return {"waveforms": waveforms, "samples": torch.tensor([len(clip.waveform) for clip in samples]),
                "labels": torch.cat(labels), "label_lengths": torch.tensor([len(ids) for ids in labels]),
                "changes": self._drawn(samples, SPECTRUM_DRAWS, lambda draw: draw.random(NUMBERS, np.float32))
                .masked_fill(unchanged[:, None], 0.5),
                "fields": self._drawn(samples, FIELD_DRAWS, lambda draw: draw.standard_normal(
                    (count, 3, BANDS), np.float32)).masked_fill(unchanged[:, None, None, None], 0).transpose(1, 2),
                "masks": self._drawn(samples, MASK_DRAWS, lambda draw: draw.random(masks, np.float32)),
                "pitch": torch.tensor([clip.pitch for clip in samples], dtype=torch.float32),
                "texts": [clip.text for clip in samples],
                "seconds": sum(len(clip.waveform) for clip in samples) // audio.RATE}

    def _drawn(self, samples: "list[Clip]", purpose: int,
               draw: "Callable[[np.random.Generator], np.ndarray]") -> "Tensor":
        """Random numbers for each sample, by (seed, epoch, row), in one tensor."""
        import numpy as np
        import torch

        return torch.from_numpy(np.stack([draw(np.random.default_rng((self.cfg.seed, clip.epoch, clip.row, purpose)))
                                          for clip in samples]))

    def _places(self, samples: "list[Clip]") -> int:
        """At how many places in time elastic deformations are drawn: for the longest spectrogram; 0: they are off."""
        from stoker.model.mel import HOP_LENGTH
        from stoker.model.spectral_changes import places

        if not self.cfg.elastic:
            return 0
        return places(max(math.ceil((len(clip.waveform) // HOP_LENGTH + 1) * clip.pitch) for clip in samples))

    def _longest(self) -> int:
        """Samples of the longest recording that is possible, as slow as --speed and --pitch may make it, and with
        --silence."""
        from stoker.data.speech.augmentation import SEMITONES
        from stoker.model.mel import HOP_LENGTH

        cfg = self.cfg
        slowest = (1 - cfg.speed) * 2 ** (-cfg.pitch / SEMITONES)
        return int(cfg.max_mel_length * HOP_LENGTH / slowest + 2 * cfg.silence * audio.RATE) + HOP_LENGTH

    def made_from(self) -> dict[str, str]:
        rows = [[split, each.text, each.speaker] for split, part in self.utterances.items() for each in part]
        sound = self.decoded.fingerprint() + json.dumps(rows)
        return {"speech": hashlib.sha256(sound.encode()).hexdigest(), **super().made_from()}

    def size(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch["texts"]), "audio_sec": batch["seconds"]}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "Recognizer":
        from stoker.model.speech_encoder import Recognizer, SpeechEncoder

        cfg = self.cfg
        encoder = SpeechEncoder(**sizes_of(cfg), num_mels=cfg.num_mels, downsample_time=cfg.downsample_time,
                                block=cfg.block)
        return Recognizer(self.tokenizer.vocab_size, encoder, cfg.num_mels, cfg.head_frames)

    def blocks(self, model: Any) -> list["nn.Module"]:
        return list(model.encoder.blocks)

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"consistency": self.cfg.consistency} if self.cfg.consistency else {}

    def counts(self, batch: Batch, phase: str) -> dict[str, int]:
        return dict.fromkeys(["loss", *self.weights(Moment())], len(batch["labels"]))

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        """The CTC loss; with --consistency the mean of that of two views, and how far these are apart."""
        import torch

        from stoker.model import ctc

        views = self._views(model, batch) if model.training else [model.mel(batch["waveforms"], batch["samples"])]
        frames, count = views[0][1], len(views)
        logits, lengths = model(torch.cat([mel for mel, _ in views]), frames.repeat(count))
        repeated = batch | {name: batch[name].repeat(count) for name in ("labels", "label_lengths")}
        loss, figures = self._figures(logits, lengths, repeated)
        if count == 1:  # an evaluation has one view
            nothing = {"consistency": torch.zeros_like(loss.total)} if self.cfg.consistency else {}
            return Loss({"loss": loss.total, **nothing}, figures)
        one, other = logits.chunk(2)
        apart = ctc.consistency_loss(one, other, lengths[:len(frames)])
        return Loss({"loss": loss.total / count, "consistency": apart}, figures)

    def _views(self, model: Any, batch: Batch) -> "list[tuple[Tensor, Tensor]]":
        """The spectrograms (B, T, M) and lengths (B,) to train on: of the same changed sound with different masks."""
        from torch.nn import functional as F

        from stoker.model.mel import HOP_LENGTH
        from stoker.model.spectral_changes import SpectralChanges, spec_augment

        cfg = self.cfg
        mel, frames = model.mel(batch["waveforms"], batch["samples"])
        mel, frames = select(SpectralChanges, cfg)(mel, frames, batch["changes"], batch["fields"],
                                                   batch["pitch"])
        length = self._longest() // HOP_LENGTH + 2 if cfg.compile else _rounded(mel.shape[1], SHAPE)
        mel = F.pad(mel, (0, 0, 0, length - mel.shape[1]))
        return [(spec_augment(mel, frames, masks, widest_band=cfg.mask_bands, longest_time=cfg.mask_time), frames)
                for masks in batch["masks"].unbind(1)]

    def _logits(self, model: Any, batch: Batch) -> "tuple[Tensor, Tensor]":
        """The logits of the labels (B, T, V), and the number of frames of each utterance without padding (B,)."""
        return model(*model.mel(batch["waveforms"], batch["samples"]))  # type: ignore[no-any-return]

    def _figures(self, logits: "Tensor", lengths: "Tensor", batch: Batch, *,
                 alignable_only: bool = False) -> tuple[Ratio, dict[str, Ratio]]:
        from stoker.model import ctc

        blank, sizes = self.tokenizer.end_of_text, batch["label_lengths"]
        losses = ctc.ctc_loss(logits, lengths, batch["labels"], sizes, blank=blank)
        alignable = ~losses.isposinf()
        samples = losses.detach().where(alignable, 0), sizes.where(alignable, 0)
        if alignable_only:
            losses, sizes = losses[alignable], sizes[alignable]
        total = losses.sum()
        return Sampled(total, sizes.sum() if alignable_only else len(batch["labels"]), samples), {
            "ctc_loss": Ratio(total.detach(), len(losses)),
            "blank_share": Ratio(ctc.blanks(logits, lengths, blank=blank), lengths.sum())}

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        """Beside the loss, word and character error rates: edit distances over the lengths of the references. An
        utterance that CTC cannot align has no loss, but its errors count. With --lm also those of the texts that are
        found together with the language model, `lm_wer` and `lm_cer`."""
        from stoker.training.core.error_rates import error_rates

        logits, lengths = self._logits(model, batch)
        loss, extras = self._figures(logits, lengths, batch, alignable_only=True)
        found, said = ([text.split() for text in texts] for texts in (self.ctc_texts(logits, lengths), batch["texts"]))
        rates: dict[str, Ratio] = {"wer": error_rates(said, found),
                                   "cer": error_rates(map(" ".join, said), map(" ".join, found))}
        if self.with_language_model:
            rates |= self.with_language_model.score(model, logits, lengths, [" ".join(words) for words in said])
        return {"loss": loss, **extras, **rates}

    def samples(self, model: Any) -> "dict[str, Media]":
        """What was said, with the transcripts below, and the spectrogram and the sound of the first recording; of the
        first training recording both as recorded and as its augmentation changes it."""
        from stoker.training.core import device as devices
        from stoker.training.core.media import Sound, Text

        rows = self.dataset("validation")
        clips = [rows[row] for row in range(min(SHOWN, len(rows)))]
        batch = devices.move(self.collate(clips), devices.of(model))
        mel, frames = model.mel(batch["waveforms"], batch["samples"])
        heard = self.ctc_texts(*model(mel, frames))
        lines = [f"said   {clip.text}\nheard  {text}" for clip, text in zip(clips, heard)]
        return {"text/transcripts": Text("\n".join(lines)),
                "picture/spectrogram": _picture(model, mel[0, :frames[0]]),
                "sound/first": Sound(clips[0].waveform.numpy(), audio.RATE), **self._augmented(model)}

    def _augmented(self, model: Any) -> "dict[str, Media]":
        """Sound and spectrogram of the first training recording before and after augmentation: in the first epoch in
        which it does not stay as it is."""
        import torch

        from stoker.training.core import device as devices
        from stoker.training.core.media import Sound

        rows = self.dataset("train")
        before = torch.from_numpy(rows.samples(0))
        changed_clips = (clip for epoch in range(EPOCHS_LOOKED_AT) if not (clip := rows[epoch * len(rows)]).unchanged)
        clip = next(changed_clips, rows[0])
        plain, _ = model.mel(before[None].to(devices.of(model)), torch.tensor([len(before)], device=devices.of(model)))
        changed, frames = self._views(model, devices.move(self.collate([clip]), devices.of(model)))[0]
        return {"sound/training_before": Sound(before.numpy(), audio.RATE),
                "sound/training_after": Sound(clip.waveform.numpy(), audio.RATE),
                "picture/training_before": _picture(model, plain[0]),
                "picture/training_after": _picture(model, changed[0, :frames[0]])}

    def callbacks(self) -> "list[Callback]":
        from stoker.daemon.rundir import RunDir
        from stoker.monitors.blanks import Blanks

        return [Blanks(RunDir(self.folder).alerts)]

    def described(self) -> dict[str, Any]:
        return {"blank": self.tokenizer.end_of_text}


def _picture(model: Any, mel: "Tensor") -> "Media":
    """A spectrogram (T, M) with its axes."""
    from stoker.model.mel import FRAME_RATE
    from stoker.training.core.media import spectrogram

    return spectrogram(mel.cpu().numpy(), FRAME_RATE, model.mel.frequencies().cpu().numpy())


def _rounded(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(AudioEncoder)
