"""Snapshots that something has befallen since: named, left alone, never taken for whole, never run."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker import files
from stoker.config import UserError
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import RunDir
from stoker.inference import replay
from stoker.training.assembly.export import export_models
from stoker.training.core import incident, manifest, pretrained
from stoker.training.core.incident import Incident
from stoker.training.core.manifest import Damaged
from stoker.training.core.snapshots import Snapshots, load_weights, read_plain
from toys import Buffers, Regression, StopAt, assert_same, new_run, train, with_callbacks

FILES = ("model.safetensors", "state.pt", "manifest.json")
NEWEST, BEFORE = "snapshot_step_00000005", "snapshot_step_00000004"
PLAIN = with_callbacks(Buffers, StopAt(-1))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunDir, dict[str, Any]]]:
    """A run stopped at step 5, with snapshots of steps 0, 3, 4 and 5; and what it comes to if nothing befalls it."""
    folder = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOKER_HOME", str(folder / "home"))
        run, whole = new_run(folder, Buffers), new_run(folder, Buffers)
        train(with_callbacks(Buffers, StopAt(5)), run)
        train(PLAIN, whole)
        yield run, outcome(whole)


@pytest.fixture
def run(pristine: tuple[RunDir, Any], tmp_path: Path) -> RunDir:
    shutil.copytree(pristine[0].path, tmp_path / "run", symlinks=True)
    return RunDir(tmp_path / "run")


def outcome(run: RunDir) -> dict[str, Any]:
    last = Snapshots(run.snapshots, {}).found()[-1]
    return {"weights": read_weights(last), "state": read_plain(last / "state.pt"),
            "metrics": list(Journal(run.metrics).rows())}


def read_weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# -- damages: what becomes of a file; `other` is the same file of another snapshot ----------------------------------


def flip(place: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[round(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def cut(size: Callable[[int], int]) -> Callable[[Path, Path], None]:
    return lambda path, other: os.truncate(path, size(path.stat().st_size))


def instead(put: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        path.unlink()
        put(path, other)

    return damage


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "first byte": flip(0), "middle byte": flip(0.5), "last byte": flip(1),
    "emptied": cut(lambda size: 0), "half": cut(lambda size: size // 2), "two bytes short": cut(lambda size: size - 2),
    "appended": lambda path, other: path.write_bytes(path.read_bytes() + b"x"),
    "gone": instead(lambda path, other: None),
    "folder": instead(lambda path, other: path.mkdir()),
    "link elsewhere": instead(lambda path, other: path.symlink_to(__file__)),
    "dangling link": instead(lambda path, other: path.symlink_to("nowhere")),
    "link to itself": instead(lambda path, other: path.symlink_to(path.name)),
    "pipe": instead(lambda path, other: os.mkfifo(path)),
    "of another": instead(lambda path, other: shutil.copy(other, path)),
    "no permission": lambda path, other: path.chmod(0),
}


def damaged(run: RunDir, name: str, file: str, how: str) -> Path:
    if how == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    DAMAGES[how](run.snapshots / name / file, run.snapshots / "snapshot_epoch_0001" / file)
    return run.snapshots / name


@pytest.mark.parametrize("file, how", [(file, how) for file in FILES for how in DAMAGES
                                       if (file, how) != ("manifest.json", "of another")])  # that is told below
def test_it_is_named_and_the_one_before_is_taken(run: RunDir, pristine: Any, caplog: pytest.LogCaptureFixture,
                                                 file: str, how: str) -> None:
    """The run comes to the same end, and what was damaged is kept aside."""
    damaged(run, NEWEST, file, how)
    train(PLAIN, run, resume=True, keep_last_n_snapshots=1)
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1 and f"snapshot {NEWEST} is damaged" in told[0].message and file in told[0].message
    assert_same(outcome(run), pristine[1])
    assert os.path.lexists(run.snapshots / f"damaged_{NEWEST}") and not os.path.lexists(run.snapshots / NEWEST)


def test_a_manifest_of_another_snapshot(run: RunDir, pristine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It says step 3, and that one is there beside it: it is never needed, and never handed out."""
    folder = damaged(run, NEWEST, "manifest.json", "of another")
    with pytest.raises(Damaged, match="has other content|bytes"):
        manifest.verify(folder)
    train(PLAIN, run, resume=True)
    assert_same(outcome(run), pristine[1])


@pytest.mark.parametrize("seed", range(25))
def test_any_damages_at_once(run: RunDir, pristine: Any, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    """Some files of some snapshots, in some way: the newest whole one is taken, or none and then nothing changes."""
    chosen = random.Random(seed)
    names = [path.name for path in Snapshots(run.snapshots, {}).found()]
    hit = set(chosen.sample(names, chosen.randint(1, len(names))))
    for name in hit:
        how = chosen.choice([how for how in DAMAGES if how not in ("of another", "no permission")])
        damaged(run, name, chosen.choice(FILES), how)
    whole = [name for name in names if name not in hit]
    if not whole:
        before = everything(run.snapshots)
        with pytest.raises(UserError, match=f"none of the {len(names)} snapshots"):
            train(PLAIN, run, resume=True)
        assert everything(run.snapshots) == before
        return
    train(PLAIN, run, resume=True, keep_last_n_snapshots=chosen.randint(1, 3))
    assert_same(outcome(run), pristine[1])
    later = set(names[names.index(whole[-1]) + 1:])
    assert all(f"snapshot {name} is damaged" in caplog.text for name in later)
    kept = {path.name.removeprefix("damaged_") for path in run.snapshots.iterdir()}
    assert later <= kept, "only the user deletes them"


def everything(folder: Path) -> dict[str, Any]:
    """name -> content, of all that can be read below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else os.path.lexists(path)
            for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("file", FILES)
def test_rotation_never_takes_a_damaged_one_for_a_good_one(run: RunDir, keep: int, file: str) -> None:
    """Older and newer ones are damaged, one in between is whole: after each save at least one is, and the newest."""
    for name in ("snapshot_step_00000000", "snapshot_epoch_0001", NEWEST):
        damaged(run, name, file, "middle byte")
    train(with_callbacks(Buffers, StopAt(7)), run, resume=True, keep_last_n_snapshots=keep)
    found = Snapshots(run.snapshots, {}).found()
    assert manifest.newest_good(run.snapshots) == found[-1] == run.snapshots / "snapshot_step_00000007"
    assert (run.snapshots / f"damaged_{NEWEST}").is_dir()
    whole = [path for path in found if not raises_damaged(path)]
    assert len(whole) >= keep, "what is damaged does not count"


def raises_damaged(path: Path) -> bool:
    try:
        manifest.verify(path)
        return False
    except Damaged:
        return True


def test_names_that_were_swapped(run: RunDir, pristine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The manifest says which step it is, whatever the folder is called."""
    caplog.set_level("INFO")
    (run.snapshots / NEWEST).rename(run.snapshots / "x")
    (run.snapshots / BEFORE).rename(run.snapshots / NEWEST)
    (run.snapshots / "x").rename(run.snapshots / BEFORE)
    train(PLAIN, run, resume=True, keep_last_n_snapshots=2)
    assert f"Resuming from {run.snapshots / BEFORE}, step 5" in caplog.text
    assert_same(outcome(run), pristine[1])


STRAYS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("notes"), "folder": lambda path: (path / "inside").mkdir(parents=True),
    "pipe": os.mkfifo, "dangling link": lambda path: path.symlink_to("nowhere"),
    "link": lambda path: path.symlink_to(path.parents[1] / "logs"),
}


@pytest.mark.parametrize("what", STRAYS)
@pytest.mark.parametrize("name", ["notes", "snapshot_mine", "snapshot_step_00000008", ".snapshot_x", ".aside.x"])
def test_what_is_no_snapshot(run: RunDir, pristine: Any, what: str, name: str) -> None:
    """Under any name it may have, also one that will be needed."""
    STRAYS[what](run.snapshots / name)
    train(PLAIN, run, resume=True, keep_last_n_snapshots=1)
    assert_same(outcome(run), pristine[1])
    if not name.startswith("."):
        assert any(os.path.lexists(run.snapshots / known) for known in (name, f"damaged_{name}"))
    assert (run.path / "logs").is_dir()


@pytest.mark.parametrize("what", STRAYS)
def test_what_comes_there_while_the_run_goes_on(run: RunDir, what: str) -> None:
    """It is neither deleted with the older ones nor counted, nor is a link to one of them."""
    STRAYS[what](run.snapshots / "snapshot_mine")
    (run.snapshots / "snapshot_link").symlink_to(NEWEST)
    damaged(run, BEFORE, "manifest.json", "middle byte")
    Snapshots(run.snapshots, {}).keep_only({0})
    assert {path.name for path in run.snapshots.iterdir()} == {
        "snapshot_step_00000000", NEWEST, BEFORE, "snapshot_mine", "snapshot_link"}


@pytest.mark.parametrize("instead", [None, "file", "pipe", "dangling link", "link"])
def test_the_folder_itself(run: RunDir, pristine: Any, caplog: pytest.LogCaptureFixture, instead: str | None) -> None:
    shutil.rmtree(run.snapshots / NEWEST)
    if instead:
        STRAYS[instead](run.snapshots / NEWEST)
    train(PLAIN, run, resume=True)
    assert (f"snapshot {NEWEST} is damaged" in caplog.text) == bool(instead)
    assert_same(outcome(run), pristine[1])


def test_a_run_whose_snapshots_are_gone_is_not_begun_again(run: RunDir) -> None:
    for path in Snapshots(run.snapshots, {}).found():
        shutil.rmtree(path)
    before = run.metrics.read_bytes()
    with pytest.raises(UserError, match="has reached step 5, but there is no snapshot"):
        train(PLAIN, run, resume=True)
    assert run.metrics.read_bytes() == before


def test_one_of_another_format_is_not_passed_over(run: RunDir) -> None:
    """A newer version went on with this run: an older snapshot must not be taken instead."""
    forge(run.snapshots / NEWEST, format=2)
    with pytest.raises(UserError, match="has format 2, this version reads format 1"):
        train(PLAIN, run, resume=True)


def test_a_finished_run_hands_out_though_its_best_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path, Regression)
    trainer, _ = train(Regression, run)
    best = trainer.snapshots.at_step(trainer.best_step)
    assert best is not None
    flip(0.5)(best / "model.safetensors", best)
    export_models(trainer, run)
    assert "the best, is damaged (model.safetensors has other content" in caplog.text
    assert [path.name for path in run.models.iterdir()] == ["final"]


# -- snapshots made to do harm, with checksums that are right -------------------------------------------------------


def forge(folder: Path, **changes: Any) -> None:
    """Make the manifest say what the files are now, and `changes`."""
    known = json.loads((folder / "manifest.json").read_text())
    entries = {name: {"size": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}
               for name in known["files"]}
    manifest_now = {**known, "files": entries, **changes}
    del manifest_now["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest_now | {"sha256": manifest._digest(manifest_now)}))


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.target}'",)


def legacy_tar(payload: Payload, path: Path) -> None:
    """The format of torch before 1.0: pickles in a tar archive."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(payload)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


CARRIERS: dict[str, Callable[[Payload, Path], object]] = {
    "torch.save": lambda payload, path: torch.save({"step": payload}, path),
    "torch.save before 1.6": lambda payload, path: torch.save(payload, path, _use_new_zipfile_serialization=False),
    "a pickle": lambda payload, path: path.write_bytes(pickle.dumps({"step": payload})),
    "protocol 0": lambda payload, path: path.write_bytes(pickle.dumps(payload, protocol=0)),
    "a tar": legacy_tar,
}


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """What a payload writes; that it would have is checked first."""
    proof = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()
    proof.unlink()
    return proof


@pytest.mark.parametrize("how", CARRIERS)
def test_code_in_a_state_is_not_run(run: RunDir, proof: Path, how: str) -> None:
    CARRIERS[how](Payload(proof), run.snapshots / NEWEST / "state.pt")
    forge(run.snapshots / NEWEST)
    before = everything(run.snapshots)
    with pytest.raises(UserError, match="state.pt holds something else .* it was not run") as refusal:
        train(PLAIN, run, resume=True)
    assert len(refusal.value.problems) == 1 and "\n" not in refusal.value.problems[0]
    assert not proof.exists() and everything(run.snapshots) == before


@pytest.mark.parametrize("how", CARRIERS)
def test_code_in_weights_or_an_incident_is_not_run(run: RunDir, tmp_path: Path, proof: Path, how: str) -> None:
    """Through the other doors: --init_from, a model folder, the replay of an incident."""
    payload, snapshot = Payload(proof), run.snapshots / NEWEST
    stage = Regression(Regression.Config(), run.path)
    what = Incident(5, "spike", "", "1.0", [[1]], [])
    path = incident.write(run.incidents, what, stage.model(), [])
    kept = (path / "batch.pt").read_bytes()
    CARRIERS[how](payload, path / "batch.pt")
    with pytest.raises(UserError, match="batch.pt holds something else"):
        incident.replay(path, stage, torch.device("cpu"), "fp32")
    (path / "batch.pt").write_bytes(kept)
    for folder in (snapshot, path):
        CARRIERS[how](payload, folder / "model.safetensors")
    forge(snapshot)
    with pytest.raises(UserError, match="holds no weights"):
        pretrained.find(str(snapshot)).load(stage, stage.model())
    with pytest.raises(UserError, match="holds no weights"):
        incident.replay(path, stage, torch.device("cpu"), "fp32")
    (tmp_path / "model").mkdir()
    shutil.copy(path / "model.safetensors", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    from stoker.model.huggingface import load_gpt2

    with pytest.raises(UserError, match="cannot be read"):
        load_gpt2(None, pretrained.find(str(tmp_path / "model")).folder)  # type: ignore[arg-type]
    assert not proof.exists()


def headed(header: str) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode()


HEADERS = {
    "longer than the file": struct.pack("<Q", 2**62), "100 MB": struct.pack("<Q", 100_000_000) + b"{" * 50,
    "nothing": b"", "no JSON": headed("nope"),
    "4 TB": headed('{"0.weight": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'),
    "aliases in a list": headed('{"__metadata__": {"aliases": "[1]"}}'),
    "an alias of nothing": headed(r'{"__metadata__": {"aliases": "{\"a\": \"b\"}"}}'),
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_hostile_header_is_refused(run: RunDir, header: str) -> None:
    (run.snapshots / NEWEST / "model.safetensors").write_bytes(HEADERS[header])
    forge(run.snapshots / NEWEST)
    with pytest.raises(UserError, match="model.safetensors holds no weights"):
        load_weights(run.snapshots / NEWEST, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("seed", range(40))
def test_a_state_that_is_spoilt_under_a_right_checksum(run: RunDir, tmp_path: Path, seed: int) -> None:
    """Whatever torch makes of it, it is read or refused, and nothing else."""
    chosen, path = random.Random(seed), run.snapshots / NEWEST / "state.pt"
    content = bytearray(path.read_bytes())
    for _ in range(chosen.choice((1, 10, 100))):
        content[chosen.randrange(len(content))] = chosen.randrange(256)
    path.write_bytes(content[:chosen.choice((len(content), chosen.randrange(len(content))))])
    try:
        read_plain(path)
    except UserError as refusal:
        assert "it was not run" in str(refusal)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_pipe_in_a_models_folder_is_not_waited_for(run: RunDir, name: str) -> None:
    (run.snapshots / NEWEST / name).unlink()
    os.mkfifo(run.snapshots / NEWEST / name)
    with pytest.raises(UserError):
        weights = pretrained.find(str(run.snapshots / NEWEST))
        assert weights.identity
        weights.load(Buffers(Buffers.Config(), run.path), torch.nn.Linear(1, 1))


def test_an_incident_without_its_weights_is_refused_in_a_line(run: RunDir, capsys: pytest.CaptureFixture[str],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    (run.incidents / "step_00000003").mkdir()
    (run.incidents / "step_00000003" / "incident.json").write_text('{"step": "3"')
    monkeypatch.setattr("sys.argv", ["replay.sh", str(run.incidents / "step_00000003")])
    assert replay.main() == 2 and len(capsys.readouterr().err.splitlines()) == 1
