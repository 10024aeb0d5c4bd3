"""What the stages of text share: which rows samples show, and what makes other data of the same files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import made_lines
import made_pictures
import made_speech
from stoker.training.core.stage import discover
from stoker.training.stages.labelled import evenly

WRITE: dict[str, Any] = {"audio_enc": made_speech.write, "ocr": made_lines.write, "vision": made_pictures.write}


@pytest.mark.parametrize("count, most", [(1, 8), (7, 8), (8, 8), (9, 8), (100, 8), (1000, 256)])
def test_rows_are_spread_over_all_of_them(count: int, most: int) -> None:
    """The first, and then each as far from the last; no stretch of that length is left out at the end."""
    rows = evenly(range(count), most)
    gaps = {after - before for before, after in zip(rows, rows[1:])}
    assert rows[0] == 0 and 0 < len(rows) <= most and len(gaps) <= 1
    assert count - rows[-1] <= max(gaps, default=count) and (count > most or rows == list(range(count)))


@pytest.mark.parametrize("name", WRITE)
def test_another_tokenizer_makes_other_data(name: str, tmp_path: Path) -> None:
    stage = discover()[name]
    known = {}
    for kind in ("chars", "bpe"):
        cfg: Any = stage.Config(dataset=str(WRITE[name](tmp_path)), vocab_size=280)
        made: Any = stage(replace(cfg, **{stage.tokenizer_option: kind}), tmp_path / kind)  # type: ignore[attr-defined]
        made.prepare()
        known[kind] = made.made_from()
        assert known[kind][made.tokenizer_option] == made.tokenizer.fingerprint
    assert {key for key in known["bpe"] if known["bpe"][key] != known["chars"][key]} == {made.tokenizer_option}
