"""The sizes of a transformer as options: as if they were written out, with a prefix or without; refused in a line."""

from dataclasses import dataclass
from typing import Any

import pytest

from stoker import config
from stoker.config import UserError, opt
from stoker.training.core.stage import discover
from stoker.training.stages.sizes import Transformer, preset, sizes_of

SIZES: dict[str, Any] = dict(d_model=64, num_heads=4, num_layers=2, d_ff=256, dropout=0.1)


@dataclass
class Encoder(Transformer, **SIZES):
    """What looks"""

    channels: int = opt(3, "channels", ge=1)

    def problems(self) -> list[str]:
        return ["--channels 2 is no picture"] if self.channels == 2 else []


@dataclass
class Decoder(Transformer, prefix="decoder_", d_model=32, num_heads=4, num_layers=1, head_multiple=4):
    """What writes"""


@dataclass
class Config(Decoder, Encoder):
    """Two transformers."""


def parsed(*argv: str) -> Any:
    return config.parse(Config, {"large": preset(128, 8, 6, decoder_layers=3)}, argv).config


def test_options_are_declared_for_each_transformer() -> None:
    cfg = parsed("--decoder_layers", "5", "--n_head", "2", "--channels", "1")
    assert (cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.d_ff, cfg.dropout, cfg.channels) == (64, 2, 2, 256, 0.1, 1)
    assert (cfg.decoder_d_model, cfg.decoder_num_heads, cfg.decoder_layers) == (32, 4, 5)
    assert set(config.to_json(cfg)) == {*SIZES, "channels", "decoder_d_model", "decoder_num_heads", "decoder_layers"}
    with pytest.raises(UserError, match="no flag --decoder_n_head"):
        parsed("--decoder_n_head", "2")


def test_each_class_is_given_its_own_sizes() -> None:
    cfg = parsed("--decoder_d_model", "48")
    assert sizes_of(cfg) == SIZES
    assert sizes_of(cfg, "decoder_") == dict(d_model=48, num_heads=4, num_layers=1)


def test_the_feed_forward_size_follows_the_hidden_size() -> None:
    assert parsed("--d_model", "128").d_ff == 512 and parsed("--d_model", "128", "--d_ff", "100").d_ff == 100
    large = parsed("--preset", "large")
    assert (large.d_model, large.num_heads, large.num_layers, large.d_ff, large.decoder_layers) == (128, 8, 6, 512, 3)


@pytest.mark.parametrize("argv, problems", [
    (["--num_heads", "3"], ["--num_heads 3 does not divide --d_model 64 into even parts: take another"]),
    (["--num_heads", "32"], []),
    (["--d_model", "32", "--num_heads", "32"], ["--num_heads 32 does not divide --d_model 32 into even parts: take "
                                                "another"]),
    (["--decoder_d_model", "36"], ["--decoder_num_heads 4 does not divide --decoder_d_model 36 into parts that 4 "
                                   "divides: take another"]),
    (["--num_heads", "3", "--channels", "2"], ["--num_heads 3 does not divide --d_model 64 into even parts: take "
                                               "another", "--channels 2 is no picture"]),
    (["--num_heads", "0"], ["--num_heads must be at least 1 and at most 32, is 0"]),
    (["--decoder_num_heads", "0"], ["--decoder_num_heads must be at least 1 and at most 32, is 0"]),
    (["--decoder_layers", "49", "--dropout", "1"], ["--dropout must be at least 0 and at most 0.9, is 1.0",
                                                    "--decoder_layers must be at least 1 and at most 48, is 49"]),
])
def test_sizes_that_do_not_fit_are_refused(argv: list[str], problems: list[str]) -> None:
    if not problems:
        parsed(*argv)
        return
    with pytest.raises(UserError) as refused:
        parsed(*argv)
    assert list(refused.value.problems) == problems


def test_help_shows_them_below_the_headings_of_their_groups() -> None:
    shown = config.help_text(Config, {}, "usage: x")
    looks, writes = shown.partition("What looks:")[2].split("What writes:")
    assert "--d_model N, --n_embd" in looks and "4 x d_model where that is given" in looks and "--channels N" in looks
    assert "--decoder_layers N" in writes and "--decoder_d_model N" in writes and "n_embd" not in writes
    assert shown.count("--num_layers") == 1


def test_the_stages_divide_the_hidden_size_as_their_positions_need_it() -> None:
    """GPT-2 has learned positions, a line has rotary ones, by pairs of channels, a plane by pairs for each axis."""
    multiples = {"lm": 1, "audio_enc": 2, "ocr": 2, "vision": 4}
    for name, multiple in multiples.items():
        Config: Any = discover()[name].Config
        assert config.check(Config(d_model=8 * multiple, num_heads=8)) == []
        if multiple > 1:
            assert config.check(Config(d_model=4 * multiple, num_heads=8))[0].startswith("--num_heads 8 does not")
