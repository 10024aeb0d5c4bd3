"""Talker: trained to say texts, as codes of speech; with the codec that makes codes of speech, and speech of codes."""

import hashlib
import json
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a script: it lies within the package that it imports
    sys.path[:] = [str(Path(__file__).resolve().parents[2] / place) for place in ("run/python", "")] + sys.path[1:]

from stoker import files
from stoker.config import UserError, listed, opt
from stoker.data.sources import names
from stoker.data.speech import audio, recordings
from stoker.training.core.evaluations import Evaluation
from stoker.training.core.figures import Batch, Loss, Moment, Ratio
from stoker.training.core.options import Options
from stoker.training.core.parts import Part
from stoker.training.core.phases import Group, Phase
from stoker.training.stages import judged
from stoker.training.stages.judged import NOBODY, Judged
from stoker.training.stages.labelled import Labelled, label_kind, vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.data.loader import Order
    from stoker.data.speech.clips import Clip, Clips
    from stoker.model.speaking import Speaking
    from stoker.training.core.media import Media
    from stoker.training.core.pretrained import Pretrained

FRAME_RATES = 12.5, 25.0, 50.0
CODEC, ALIGNER, TALKER = "codec", "aligner", "talker"  # phases, and the submodules that they train
BOOKS = 1  # key of a row's random number for how many books its codes use, beside those for its sound
FEW_BITS = 400  # a second: with fewer the codec loses more than 5 % of the words of one voice
EVALUATED = 40  # recordings
SHOWN = 4  # texts
OF_CODEC = "num_mels", "frame_rate", "num_books", "book_size", "codec_d_model", "codec_layers", "latent"
VOICES = "voices.json"  # in a run's folder, and beside exported weights: the speakers, in the order of their numbers


@dataclass
class Speech:
    """Data"""

    dataset: str = opt("spoken-voice", f"{', '.join(names.SPOKEN)} (made here by espeak-ng), "
                       f"{', '.join(names.LIBRISPEECH)}, a CSV file (audio_path,transcription), or a folder of sound "
                       "files with their texts", path=recordings.NAMES, aliases=("data_path", "csv"))
    held_out: str = opt("", "speakers to keep for validation, comma-separated (default: the data's own split, else "
                        "5 % of the texts)")
    max_mel_length: int = opt(2048, "longest recording, in frames of 10 ms; longer ones are left out", ge=16)
    max_text_length: int = opt(256, "longest text, in characters; longer ones are left out", ge=1)
    cache_audio: bool = opt(True, "keep all recordings decoded on disk (115 MB an hour) instead of decoding them in "
                            "each epoch", may_change=True)
    batch_seconds: float = opt(60.0, "largest micro-batch, in seconds of sound with padding (0: only --batch_size "
                               "limits it)", ge=0)


@dataclass
class Architecture:
    """Model"""

    labels: str = label_kind("chars", "the symbols of the texts")
    vocab_size: int = vocabulary(512)
    spelling: str = opt("letters", "what the labels spell: letters, or phones, the sounds that espeak-ng's "
                        "dictionaries give for the text", choices=("letters", "phones"))
    voices: int = opt(1, "voices that the talker learns to speak with, one for each speaker of the data", ge=1)
    num_mels: int = opt(80, "mel bands", ge=8, usual=(40, 128))
    frame_rate: float = opt(25.0, "frames of codes a second: 12.5, 25 or 50")
    num_books: int = opt(4, "codebooks: codes of a frame", ge=1, le=32)
    book_size: int = opt(256, "entries of a codebook", ge=2, le=65536)
    codec_d_model: int = opt(224, "hidden size of the codec", ge=8)
    codec_layers: int = opt(4, "layers of the codec's encoder, and of its decoder", ge=1, le=48)
    latent: int = opt(32, "size of the vectors that are quantized", ge=1)
    d_model: int = opt(192, "hidden size of the talker", ge=8, usual=(64, 1024), aliases=("n_embd",))
    num_layers: int = opt(4, "layers of the talker", ge=1, le=48, aliases=("n_layer", "n_layers"))
    parallel: bool = opt(False, "compute all frames of a text at once, instead of each from the frame before")
    dropout: float = opt(0.1, "share of activations dropped in training", ge=0, le=0.9)

    def problems(self) -> list[str]:
        if self.frame_rate not in FRAME_RATES:
            return [f"--frame_rate must be 12.5, 25 or 50, is {self.frame_rate:g}"]
        return []


@dataclass
class Losses:
    """Optimization"""

    codec_ckpt: str = opt("", "run, snapshot or model folder of a talker: take its codec, and do not train it",
                          path=())
    codec_share: float = opt(0.25, "share of the steps in which codec and aligner are trained, before the talker", gt=0,
                             lt=1)
    commitment: float = opt(0.25, "weight of the distance of the codec's vectors from their codebook entries", ge=0)
    book_dropout: float = opt(0.5, "share of the recordings that the codec codes with fewer books in training, so that "
                              "fewer can be decoded", ge=0, le=1)
    duration_weight: float = opt(1.0, "weight of the error of the durations, in frames", ge=0)


@dataclass
class Config(Options, Judged, Losses, Architecture, Speech):
    """The talker's options."""


class TalkerStage(Labelled[Config]):
    """Trains a talker on speech and its texts, in the foreground. (./run/run_train_talker.sh: in the background.)

    A sample is an utterance. First a codec learns to make codes of spectrograms and back, and an aligner where each
    symbol is said; then the talker learns to write the codes of a text.
    """

    name = "talker"
    Config = Config
    sizes = ("spelling", "voices", *OF_CODEC, "d_model", "num_layers", "parallel")
    best = "eval/wer", "min"
    presets = {
        "nano": {"lr": 2e-3, "batch_size": 16, "epochs": 6, "dropout": 0.0},
        "tiny": {"frame_rate": 12.5, "num_books": 2, "book_size": 128},
        "small": {"d_model": 256, "num_layers": 6, "codec_d_model": 320, "num_books": 8},
        "medium": {"d_model": 512, "num_layers": 8, "codec_d_model": 512, "num_books": 8, "book_size": 1024},
    }

    def __init__(self, cfg: Any, folder: Path):
        super().__init__(cfg, folder)
        if cfg.judge == NOBODY:
            self.best = "eval/mel", "min"  # type: ignore[misc]
        self.judge_of_speech = judged.Judge(self)
        self._sounds: dict[str, str] = {}  # of texts

    @classmethod
    def check(cls, cfg: Any, *, resumed: bool) -> list[str]:
        return recordings.check(cfg.dataset) + super().check(cfg, resumed=resumed)

    @classmethod
    def resolve_defaults(cls, cfg: Any, typed: Collection[str]) -> tuple[Any, list[str]]:
        """Also the newest audio encoder, which may change while a run is resumed; a warning where codes are few."""
        cfg, lines = super().resolve_defaults(cfg, typed)
        bits = cfg.frame_rate * cfg.num_books * math.log2(cfg.book_size)
        if bits < FEW_BITS:
            lines = [*lines, f"The codes have {bits:.0f} bits a second: of speech decoded from 175 (12.5 frames of 2 "
                     "books of 128) 43 % of the words were lost, from 800 (25 frames of 4 books of 256) none"]
        judge, more = judged.chosen(cfg.judge)
        return replace(cfg, judge=judge), [*lines, *more]

    @classmethod
    def all_rows(cls, cfg: Any) -> Any:
        return replace(cfg, max_samples=0, held_out="")

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from stoker.data.speech.check import Limits, checked

        cfg = self.cfg
        if CODEC in self.sources:
            _check_codec(cfg, self.sources[CODEC])
        found = recordings.read(cfg.dataset, held_out=listed(cfg.held_out))
        self._sounds = self._pronounced({each.text for rows in found.values() for each in rows})
        self.open_tokenizer([f" {self.spelled(each.text)} " for each in found["train"]])
        limits = Limits(max_mel_length=cfg.max_mel_length, max_text_length=cfg.max_text_length, labels=self.encode,
                        frames=self._frames)
        self.utterances, self.decoded, _ = checked(found, keep=cfg.cache_audio, limits=limits,
                                                   evaluated_split=cfg.evaluated_split)
        self.warn_of_unspelled(self.spelled(each.text) for rows in self.utterances.values() for each in rows)
        speakers = sorted({each.speaker for each in self.utterances["train"]})
        if len(speakers) > cfg.voices:
            raise UserError(f"--dataset {cfg.dataset} has {len(speakers)} speakers, --voices is {cfg.voices}: type "
                            f"--voices {len(speakers)}, or take recordings of one speaker")
        self.voices = {speaker: number for number, speaker in enumerate(speakers)}

    def begin(self) -> None:
        super().begin()
        files.write_json(self.folder / VOICES, [*self.voices])

    def reopen(self) -> None:
        super().reopen()
        self.voices = {name: number for number, name in enumerate(json.loads((self.folder / VOICES).read_text()))}

    def _pronounced(self, texts: Iterable[str]) -> dict[str, str]:
        """The sounds of texts, where these are what is spelled."""
        if self.cfg.spelling == "letters":
            return {}
        from stoker.data.speech import espeak

        texts = sorted(texts)
        return dict(zip(texts, espeak.ipa(texts)))

    def spelled(self, text: str) -> str:
        """A text in letters or sounds, as --spelling says."""
        if self.cfg.spelling == "letters":
            return text
        return self._sounds.get(text) or self._pronounced([text])[text]

    def encode(self, text: str) -> list[int]:
        """The symbols of a text, with the silence before and after it."""
        return super().encode(f" {self.spelled(text)} ")

    def _frames(self, samples: int) -> int:
        """Frames of the aligner."""
        from stoker.data.speech.check import head_frames

        return head_frames(samples, 2, 1)

    def dataset(self, split: str) -> "Clips":
        from stoker.data.speech.clips import Clips

        limit = self.cfg.max_samples if split == "train" else 0
        return Clips(self.utterances[split][:limit or None], decoded=self.decoded, seed=self.cfg.seed)

    def splits(self) -> tuple[str, ...]:
        return tuple(self.utterances)

    def order(self) -> "Order":
        lengths = [each.seconds for each in self.dataset("train").utterances]
        return self.order_by_length(lengths, self.cfg.batch_seconds)

    def collate(self, samples: "list[Clip]") -> Batch:
        """waveforms (B, N), their lengths in samples (B,), symbols of the texts (B, S), how many of each (B,), voices
        (B,), how many books the codes of each use in training (B,)."""
        import numpy as np
        import torch
        from torch.nn.utils.rnn import pad_sequence

        cfg = self.cfg
        texts = [self.encode(clip.text) for clip in samples]
        draws = [np.random.default_rng((cfg.seed, clip.epoch, clip.row, BOOKS)).random(2) for clip in samples]
        books = [1 + int(which * cfg.num_books) if whether < cfg.book_dropout else cfg.num_books
                 for whether, which in draws]
        return {"waveforms": pad_sequence([clip.waveform for clip in samples], batch_first=True),
                "samples": torch.tensor([len(clip.waveform) for clip in samples]),
                "symbols": pad_sequence([torch.tensor(text) for text in texts], batch_first=True),
                "sizes": torch.tensor([len(text) for text in texts]),
                "voices": torch.tensor([self.voices.get(clip.speaker, 0) for clip in samples]),
                "books": torch.tensor(books), "texts": [clip.text for clip in samples],
                "seconds": sum(len(clip.waveform) for clip in samples) // audio.RATE}

    def made_from(self) -> dict[str, str]:
        rows = [[split, each.text, each.speaker] for split, part in self.utterances.items() for each in part]
        sound = self.decoded.fingerprint() + json.dumps(rows)
        return {"speech": hashlib.sha256(sound.encode()).hexdigest(), **super().made_from()}

    def size(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch["texts"]), "audio_sec": batch["seconds"]}

    # -- model --------------------------------------------------------------------------------------------------

    def model(self) -> "Speaking":
        from stoker.model.codec import Codec, Encoder
        from stoker.model.speaking import ALIGNED, Speaking
        from stoker.model.talker import Talker

        cfg, symbols = self.cfg, self.tokenizer.vocab_size
        codec = Codec(num_mels=cfg.num_mels, frame_rate=cfg.frame_rate, d_model=cfg.codec_d_model,
                      num_layers=cfg.codec_layers, latent=cfg.latent, num_books=cfg.num_books, book_size=cfg.book_size)
        aligner = Encoder(cfg.num_mels, ALIGNED, 128, 4, symbols)
        talker = Talker(num_symbols=symbols, num_books=cfg.num_books, book_size=cfg.book_size, d_model=cfg.d_model,
                        num_layers=cfg.num_layers, num_voices=cfg.voices, autoregressive=not cfg.parallel,
                        dropout=cfg.dropout)
        return Speaking(cfg.num_mels, codec, aligner, talker, self.tokenizer.end_of_text)

    def initialize(self, model: Any, batches: Any) -> None:
        """The codebooks, by k-means of the new encoder's vectors."""
        import torch

        if self.cfg.codec_ckpt:
            return
        vectors, wanted = list["Tensor"](), 20 * self.cfg.book_size
        for batch in batches:
            latent, lengths = model.codec.encoder(*model.mel(batch["waveforms"], batch["samples"]))
            vectors += [row[:length] for row, length in zip(latent, lengths.tolist())]
            if sum(map(len, vectors)) >= wanted:
                break
        found = torch.cat(vectors).float()
        if len(found) >= self.cfg.book_size:
            model.codec.quantizer.initialize(found)

    def phases(self) -> tuple[Phase, ...]:
        start = max(1, int(self.cfg.codec_share * (self.cfg.max_steps or 0)))
        codec = () if self.cfg.codec_ckpt else (Phase(CODEC, (Group("codec.*"),), last=start),)
        return (*codec, Phase(ALIGNER, (Group("aligner.*"),), last=start),
                Phase(TALKER, (Group("talker.*"),), first=start))

    def counts(self, batch: Batch, phase: str) -> dict[str, Any]:
        """Spectrogram values, and frames of codes; symbols; codes of the first book, of the others, and symbols."""
        cfg = self.cfg
        mel_frames = batch["samples"] // 160
        frames = -(-mel_frames // round(100 / cfg.frame_rate))
        symbols = batch["sizes"].sum()
        if phase == CODEC:
            return {"recon_l1": mel_frames.sum() * cfg.num_mels, "commitment": frames.sum()}
        if phase == ALIGNER:
            return {"ctc": symbols}
        return {"base_loss": frames.sum(), "res_loss": frames.sum() * (cfg.num_books - 1), "durations": symbols}

    def weights(self, moment: Moment) -> dict[str, float]:
        codec = {} if self.cfg.codec_ckpt else {"commitment": self.cfg.commitment}
        return {**codec, "durations": self.cfg.duration_weight}

    def loss(self, model: Any, batch: Batch, moment: Moment) -> Loss:
        mel, frames = model.mel(batch["waveforms"], batch["samples"])
        if moment.phase == CODEC:
            return self._codec_loss(model, mel, frames, batch["books"])
        if moment.phase == ALIGNER:
            return self._aligner_loss(model, mel, frames, batch)
        return self._talker_loss(model, mel, frames, batch)

    def _codec_loss(self, model: Any, mel: "Tensor", frames: "Tensor", books: "Tensor") -> Loss:
        coded = model.codec(mel, frames, books)
        error = (coded.mel - mel).float()
        values = frames.sum() * mel.shape[2]
        return Loss({"recon_l1": error.abs().sum(), "commitment": coded.distance},
                    {"recon": Ratio(error.detach().square().sum(), values)})

    def _aligner_loss(self, model: Any, mel: "Tensor", frames: "Tensor", batch: Batch) -> Loss:
        import torch

        from stoker.model import ctc

        logits, lengths = model.alignable(mel, frames)
        labels = torch.cat([row[:size] for row, size in zip(batch["symbols"], batch["sizes"].tolist())])
        losses = ctc.ctc_loss(logits, lengths, labels, batch["sizes"], blank=model.blank)
        return Loss({"ctc": losses.sum()})

    def _talker_loss(self, model: Any, mel: "Tensor", frames: "Tensor", batch: Batch) -> Loss:
        from torch.nn import functional as F

        from stoker.model.talker import places

        codes, lengths = model.codec.codes(mel, frames)
        durations = model.durations(mel, frames, _symbols(batch), lengths)
        text = batch["symbols"], batch["sizes"], batch["voices"]
        errors = (model.talker.durations(*text) - durations).abs()
        logits = model.talker(*text, places(durations, batch["sizes"]), codes)
        valid = _valid(lengths, codes.shape[1])
        losses = F.cross_entropy(logits.float().flatten(0, 2), codes.flatten(), reduction="none").view_as(codes)
        losses = losses * valid[..., None]
        return Loss({"base_loss": losses[..., 0].sum(), "res_loss": losses[..., 1:].sum(), "durations": errors.sum()})

    def export(self, model: Any, folder: Path) -> None:
        """Also voices.json."""
        super().export(model, folder)
        files.write_json(folder / VOICES, [*self.voices])

    # -- evaluation ---------------------------------------------------------------------------------------------

    def parts(self) -> tuple[Part, ...]:
        """The codec of another talker, and the judge."""
        cfg = self.cfg
        codec = Part("codec", cfg.codec_ckpt, prefix="codec.", stages=("talker",),
                     train="frozen" if cfg.codec_ckpt else "whole")
        return (codec,) if cfg.judge == NOBODY else (codec, self.judge_of_speech.part())

    def evaluations(self) -> list[Evaluation]:
        return [Evaluation("eval", self.dataset, self.collate, self.score, self.gather, self.judge_books,
                           max_rows=EVALUATED)]

    def gather(self, model: Any, batch: Batch) -> "dict[str, Tensor]":
        """How often each entry of each book codes each recording (B, Q, K)."""
        import torch

        codes, lengths = model.codec.codes(*model.mel(batch["waveforms"], batch["samples"]))
        counts = torch.zeros(len(codes), codes.shape[2], self.cfg.book_size, device=codes.device)
        valid = _valid(lengths, codes.shape[1]).float()[:, None].expand(-1, codes.shape[2], -1)
        return {"uses": counts.scatter_add(2, codes.transpose(1, 2), valid)}

    def judge_books(self, gathered: "Mapping[str, Tensor]") -> dict[str, float]:
        """Of each codebook the share of its entries that are used, and the entropy of its codes, in bits."""
        uses = gathered["uses"].sum(0)
        shares = uses / uses.sum(1, keepdim=True).clamp(min=1)
        bits = -(shares * shares.clamp(min=1e-12).log2()).sum(1)
        return {f"{name}_{book + 1}": float(value) for name, values in
                (("used_share", (uses > 0).float().mean(1)), ("entropy", bits)) for book, value in enumerate(values)}

    def score(self, model: Any, batch: Batch) -> dict[str, Ratio]:
        """Free-running: what the talker says of the texts alone. `mel` is the mean absolute difference of its
        spectrograms, with the durations of the recordings, from these; `recon_l1` that of the codec. Word error rates
        are the judge's: `wer` of what the talker says, `codec_wer` of the codec's speech, `floor_wer` of recordings."""
        from stoker.model.speaking import likeliest

        mel, frames = model.mel(batch["waveforms"], batch["samples"])
        coded = model.codec(mel, frames)
        durations = model.durations(mel, frames, _symbols(batch), coded.lengths)
        text = batch["symbols"], batch["sizes"], batch["voices"]
        expected = model.talker.durations(*text)
        beside, _, _ = model.speak(*text, likeliest, durations)
        valid, values = _valid(frames, mel.shape[1])[..., None], frames.sum() * mel.shape[2]
        found: dict[str, Ratio] = {
            "recon": Ratio((coded.mel - mel).square().sum(), values),
            "recon_l1": Ratio((coded.mel - mel).abs().sum(), values),
            "mel": Ratio(((beside[:, :mel.shape[1]] - mel) * valid).abs().sum(), values),
            "durations": Ratio((expected - durations).abs().sum(), batch["sizes"].sum())}
        if self.judge_of_speech.is_there:
            spoken, lengths, _ = model.speak(*text, likeliest)
            for name, (made, count) in {"wer": (spoken, lengths), "codec_wer": (coded.mel, frames),
                                        "floor_wer": (mel, frames)}.items():
                found[name] = self.judge_of_speech.wer(self._sound(model, made, count), count, batch["texts"])
        return found

    def _sound(self, model: Any, mel: "Tensor", frames: "Tensor") -> "Tensor":
        """What Griffin-Lim makes of spectrograms (B, T, M), silence in place of the padding."""
        from stoker.model.griffin_lim import GriffinLim

        silence = mel.masked_fill(~_valid(frames, mel.shape[1])[..., None], -1.0)
        return GriffinLim(model.mel)(silence.float())

    def samples(self, model: Any) -> "dict[str, Media]":
        """Texts of the validation set, as they were recorded, decoded and said, with spectrograms; and what the judge
        hears."""
        from stoker.model.mel import FRAME_RATE
        from stoker.model.speaking import likeliest
        from stoker.training.core import device as devices
        from stoker.training.core.media import Sound, Text, spectrogram

        rows = self.dataset("validation")
        batch = devices.move(self.collate([rows[row] for row in range(min(SHOWN, len(rows)))]), devices.of(model))
        mel, frames = model.mel(batch["waveforms"], batch["samples"])
        spoken, lengths, _ = model.speak(batch["symbols"], batch["sizes"], batch["voices"], likeliest)
        found: "dict[str, Media]" = {}
        made = {"recorded": (mel, frames), "decoded": (model.codec(mel, frames).mel, frames),
                "said": (spoken, lengths)}
        for name, (each, count) in made.items():
            sound, first = self._sound(model, each, count), int(count[0])
            found[f"sound/{name}"] = Sound(sound[0, :first * 160].cpu().numpy(), audio.RATE)
            found[f"picture/{name}"] = spectrogram(each[0, :first].float().cpu().numpy(), FRAME_RATE,
                                                     model.mel.frequencies().cpu().numpy())
            if name == "said" and self.judge_of_speech.is_there:
                heard = self.judge_of_speech.heard(sound, count)
                lines = [f"text   {text}\nheard  {other}" for text, other in zip(batch["texts"], heard)]
                found["text/transcripts"] = Text("\n".join(lines))
        return found


def _check_codec(cfg: Any, source: "Pretrained") -> None:
    """Raises UserError where the options describe another codec than that of --codec_ckpt."""
    if problems := [f"--{name} {getattr(cfg, name):g} differs from the {source.options.get(name)} of {source}"
                    for name in OF_CODEC if getattr(cfg, name) != source.options.get(name)]:
        raise UserError(*problems)


def _symbols(batch: Batch) -> list[list[int]]:
    return [row[:size].tolist() for row, size in zip(batch["symbols"], batch["sizes"].tolist())]


def _valid(lengths: "Tensor", size: int) -> "Tensor":
    from stoker.model.transformer import valid_places

    return valid_places(lengths, size)


if __name__ == "__main__":
    from stoker.training.assembly.launch import main

    main(TalkerStage)
