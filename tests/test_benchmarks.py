"""What the benchmarks share still fits the product: a benchmark itself takes minutes."""

import pytest

from stoker.daemon.rundir import PROJECT


def test_their_trainer_trains_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import rig

    with rig.trainer("nano", batch_size=2, device="cpu", precision="fp32", max_seq_len=16) as trainer:
        rig.open_up(trainer)
        trainer._train_step()
        trainer._save()
        trainer.saver.finish(patient=False)
        assert trainer.step == 1 and not trainer.events.switched_off
        assert [path.name for path in trainer.snapshots.found()] == ["snapshot_step_00000001"]
