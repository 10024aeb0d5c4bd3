"""What the benchmarks share still fits the product: a benchmark itself takes minutes."""

import subprocess
import sys

from stoker.daemon.rundir import PROJECT

STEP = """
import rig
with rig.trainer("nano", batch_size=2, device="cpu", precision="fp32", max_seq_len=16) as trainer:
    rig.open_up(trainer)
    trainer._train_step()
    trainer._save()
    trainer.saver.finish(patient=False)
    print(trainer.step, *trainer.events.switched_off, *(path.name for path in trainer.snapshots.found()))
"""


def test_their_trainer_trains_and_saves() -> None:
    ran = subprocess.run([sys.executable, "-c", STEP], cwd=PROJECT / "benchmarks", capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1:] == ["1 snapshot_step_00000001"], ran.stderr
