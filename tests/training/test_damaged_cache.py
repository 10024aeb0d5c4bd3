"""A run never trains on what is damaged in the cache: it is made again at a start; within a run, by the resume."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from damage import flip
from stoker import files
from stoker.config import Damaged
from stoker.daemon.rundir import RunDir
from stoker.data import blocks
from stoker.training.assembly import launch
from stoker.training.core.callback import Callback
from stoker.training.core.signals import Signals
from stoker.training.train_lm import LanguageModel
from stoker.training.trainer import Trainer
from toys import assert_same, new_run, session, train

SMALL: dict[str, Any] = dict(d_model=16, num_heads=2, num_layers=1, d_ff=32, max_seq_len=16, dropout=0.1, max_steps=9,
                             snapshot_interval=2, tokenizer="bytes", compile=False, samples=False)


@dataclass
class Damage(Callback):
    """Flips a bit of every block of the training tokens that no row has been read from, as a disk might."""

    order = 10
    step: int
    damaged: int = 0

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step and not self.damaged:
            tokens = trainer.stage.tokens["train"]  # type: ignore[attr-defined]
            for block, verified in enumerate(tokens._verified[:]):
                if not verified:
                    flip(tokens.path, block * blocks.BLOCK)
                    self.damaged += 1


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {i}th line of the text, which is number {i}\n" for i in range(400)))
    return str(path)


@pytest.fixture
def expected(text: str, tmp_path: Path) -> dict[str, Any]:
    """The weights of a run that nothing happened to."""
    trainer, ending = train(LanguageModel, new_run(tmp_path / "alone", LanguageModel), **SMALL, dataset=text)
    assert ending.state == "finished"
    return trainer.model.state_dict()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_block_damaged_meanwhile_fails_the_run_and_the_resume_mends_it(workers: int, text: str, tmp_path: Path,
                                                                        expected: dict[str, Any],
                                                                        caplog: pytest.LogCaptureFixture) -> None:
    """With the same bits as if nothing had happened. A resume reads only what it trains on."""
    run = new_run(tmp_path / "run", LanguageModel)
    options = dict(SMALL, dataset=text, num_workers=workers)

    class Interrupted(LanguageModel):
        def prepare(self) -> None:
            super().prepare()
            for tokens in self.tokens.values():  # as a resume finds them: not yet read
                tokens._verified[:] = bytes(len(tokens.digests))

        def callbacks(self) -> list[Callback]:
            return [Damage(3)]

    job = session(Interrupted, run, **options).job
    with run.lock(), caplog.at_level(logging.INFO):
        assert launch._locked(job, run, Signals(lambda name: 0), False, None, None) == launch.FAILED
    [path] = [Path(word) for word in run.status().reason.split() if word.endswith(".bin")]
    assert run.status().state == "failed" and run.status().step >= 3
    assert f"{path} is damaged" in run.status().reason and "resume, and it is made again" in run.status().reason
    assert "\n" not in run.status().reason and "Traceback" not in caplog.text and not path.exists()

    trainer, ending = train(LanguageModel, run, resume=True)
    assert ending.state == "finished" and path.exists()
    assert_same(trainer.model.state_dict(), expected)


def test_at_a_start_it_is_made_again_at_once(text: str, tmp_path: Path, expected: dict[str, Any],
                                             caplog: pytest.LogCaptureFixture) -> None:
    """Whichever block it is: a new run reads them all."""
    for number, path in enumerate(sorted((files.home() / "tokens").glob("*.bin"))):
        was = path.read_bytes()
        flip(path, os.path.getsize(path) - 1)
        run = new_run(tmp_path / str(number), LanguageModel)
        with caplog.at_level(logging.WARNING), run.lock():
            trainer, _ = session(LanguageModel, run, **SMALL, dataset=text).prepare()
        assert path.read_bytes() == was and f"{path} is damaged" in caplog.text
    assert_same(train(LanguageModel, new_run(tmp_path / "again", LanguageModel), **SMALL,
                      dataset=text)[0].model.state_dict(), expected)


def test_a_cache_that_is_damaged_again_at_once_is_refused(text: str, tmp_path: Path) -> None:
    class Damaging(LanguageModel):
        def prepare(self) -> None:
            super().prepare()
            flip(self.tokens["validation"].path, 0)
            self.tokens["validation"]._verified[:1] = b"\0"
            self.tokens["validation"][0:1]

    run = new_run(tmp_path / "run", Damaging)
    with run.lock(), pytest.raises(Damaged, match="is damaged"):
        session(Damaging, run, **SMALL, dataset=text).prepare()


def test_a_resume_reads_no_more_than_it_trains_on(text: str, tmp_path: Path, expected: dict[str, Any]) -> None:
    run = RunDir(tmp_path / "alone" / "run_lm")
    with run.lock():
        trainer, _ = session(LanguageModel, run, resume=True, max_steps=10, extend_steps=1).prepare()
    verified = trainer.stage.tokens["train"]._verified[:]  # type: ignore[attr-defined]
    assert verified and not any(verified)
