"""Callbacks from files of the user's and from installed packages: found, given arguments, refused, resumed."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from desk import SMALL
from stoker import config
from stoker.config import UserError
from stoker.daemon import rundir
from stoker.daemon.rundir import PROJECT, RunDir, Status
from stoker.training import ACT, Callback, Options
from stoker.training.assembly import launch, pages, plugins
from stoker.training.core import manifest
from stoker.training.core.outside import module_from, of_run
from stoker.training.train_lm import LanguageModel
from toys import Regression, StopAt, new_run, session, train, with_callbacks

MINE = '''
import beside
from stoker.training import ACT, Callback

class Watches(Callback):
    """Counts steps."""

    def __init__(self, every: int = 1, word: str = "", rate: float = 0.5):
        self.every, self.word, self.rate, self.count = every, word, rate, beside.NONE

    def on_step_end(self, trainer):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state.get("count", 0)

class Acts(Watches):
    order = ACT

class Broken(Callback):
    def __init__(self):
        raise ValueError("never")

class Odd(Callback):
    order = "last"

class Misspelt(Callback):
    def on_stepend(self, trainer):
        pass

NUMBER = 3
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/beside.py").write_text("NONE = 0\n")
    (tmp_path / "own/mine.py").write_text(MINE)
    return tmp_path / "own/mine.py"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that offers two callbacks, one of which is not there."""
    site = tmp_path / "site"
    (site / "pack-1.0.dist-info").mkdir(parents=True)
    (site / "pack-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: pack\nVersion: 1.0\n")
    (site / "pack-1.0.dist-info/entry_points.txt").write_text(
        "[stoker.callbacks]\npacked = pack_of_callbacks:Packed\ngone = pack_of_callbacks:Gone\n")
    (site / "pack_of_callbacks.py").write_text(
        "from stoker.training import Callback\nclass Packed(Callback):\n    def __init__(self, n=1): self.n = n\n")
    monkeypatch.syspath_prepend(str(site))


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        plugins.load(text)
    return list(caught.value.problems)


# -- how they are named ---------------------------------------------------------------------------------------------


def test_a_class_in_a_file_with_and_without_arguments(mine: Path) -> None:
    plain, given = plugins.load(f"{mine}:Watches,{mine}:Acts:every=3,word=5,rate=1e-3")
    assert type(plain).__name__ == "Watches" and plain.is_monitor and vars(plain)["every"] == 1
    assert vars(given) == {"every": 3, "word": "5", "rate": 1e-3, "count": 0} and given.order == ACT
    assert type(given).__base__ is type(plain), "the file was loaded once"


def test_an_installed_package_offers_callbacks(installed: None) -> None:
    found, = plugins.load("packed:n=[1]")
    assert type(found).__name__ == "Packed" and vars(found) == {"n": [1]}


@pytest.mark.parametrize("named, why", [
    ("{dir}/gone.py:A", "{dir}/gone.py: there is no such file"),
    ("{dir}:A", "no installed package offers"),
    ("{mine}", "which class? callbacks there: Watches, Acts, Broken, Odd, Misspelt"),
    ("{mine}:Gone", "no class 'Gone' in it; callbacks there: Watches, Acts, Broken, Odd, Misspelt"),
    ("{mine}:NUMBER", "3 is not a Callback: derive it"),
    ("{mine}:Watches:evry=2", "(every: int = 1, word: str = '', rate: float = 0.5) does not take these arguments"),
    ("{mine}:Watches:every", "'every' must be key=value"),
    ("{mine}:Watches:every=1,every=2", "every is given twice"),
    ("{mine}:Broken", "Broken cannot be built: ValueError: never"),
    ("{mine}:Odd", "order is 'last'"),
    ("{mine}:Misspelt", "Misspelt.on_stepend would never be called; the events are on_build, "),
    ("unknown", "no installed package offers a callback of this name (they offer: gone, packed)"),
    ("gone", "pack_of_callbacks:Gone cannot be loaded: AttributeError"),
    ("{dir}/syntax.py:A", "syntax.py cannot be loaded: line 2: SyntaxError"),
    ("{dir}/raises.py:A", "raises.py cannot be loaded: line 2: ZeroDivisionError: division by zero"),
    ("{dir}/exits.py:A", "exits.py cannot be loaded: line 1: SystemExit: 0"),
])
def test_a_mistake_is_one_clear_line(mine: Path, installed: None, named: str, why: str) -> None:
    folder = mine.parent
    (folder / "syntax.py").write_text("A = 1\nB = (\n")
    (folder / "raises.py").write_text("def f():\n    1 / 0\nf()\n")
    (folder / "exits.py").write_text("raise SystemExit(0)\n")
    text = named.format(dir=folder, mine=mine)
    found = problems(text)
    assert len(found) == 1 and found[0].startswith(f"--callback {text}: ") and "\n" not in found[0]
    assert why.format(dir=folder, mine=mine) in found[0]
    assert len(problems(f"{text},nothing")) == 2, "all mistakes at once"


def test_two_of_one_name_are_refused_before_the_start(mine: Path) -> None:
    assert plugins.problems(f"{mine}:Acts,{mine}:Acts:every=2") == [
        "2 callbacks of this run are called Acts: give one of the classes another name, or a `key` of its own"]


def test_one_that_is_called_like_one_of_ours_is_refused_and_nothing_begins(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from stoker.training import Callback\nclass Speed(Callback): pass\n")
    run = new_run(tmp_path, Regression)
    sitting = session(Regression, run, callback=f"{tmp_path}/mine.py:Speed")
    with run.lock(), pytest.raises(UserError, match="2 callbacks of this run are called Speed"):
        sitting.train()
    assert not sitting.begun.is_set()


def test_the_option_may_be_repeated_and_its_paths_become_absolute(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    argv = ["--callback", "./mine.py:Acts:every=2,word=x", "--callback=packed", "--callback", "../own/mine.py:Watches"]
    parsed = config.parse(Options, {}, argv)
    assert plugins.absolute(parsed.config.callback) == f"{mine}:Acts:every=2,word=x,packed,{mine}:Watches"
    assert config.parse(Options, {}, ["--callback", ""]).config.callback == ""
    with pytest.raises(UserError, match="contradict each other"):
        config.parse(Options, {}, ["--run_name", "a", "--run_name", "b"])


def test_where_nothing_is_set_up_only_files_are_looked_for(mine: Path) -> None:
    """The file imports torch, which this Python does not have."""
    mine.write_text("import torch\n" + MINE)
    command = ("from stoker.training.assembly import plugins; import sys; print(plugins.problems(sys.argv[1]))")
    ran = subprocess.run([sys.executable, "-S", "-c", command, f"{mine}:Acts,{mine.parent}/gone.py:A"], text=True,
                         capture_output=True, check=True, env={"PYTHONPATH": str(PROJECT / "run/python")})
    assert ran.stdout == str([f"--callback {mine.parent}/gone.py:A: not found"]) + "\n"


# -- in a run -------------------------------------------------------------------------------------------------------


def test_it_sees_every_step_and_goes_on_where_it_was(tmp_path: Path, mine: Path) -> None:
    named = f"{mine}:Acts,{mine}:Watches:every=2"
    run, whole = new_run(tmp_path / "a", Regression), new_run(tmp_path / "b", Regression)
    stopped, _ = train(with_callbacks(Regression, StopAt(5)), run, callback=named)
    assert [c.state_dict() for c in stopped.callbacks if type(c).__name__ in ("Acts", "Watches")] == [{"count": 5}] * 2
    again, _ = train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    through, _ = train(with_callbacks(Regression, StopAt(-1)), whole, callback=named)
    counts = [[c.state_dict() for c in trainer.callbacks if type(c).__name__ in ("Acts", "Watches")]
              for trainer in (again, through)]
    assert counts == [[{"count": 9}] * 2] * 2
    order = [type(c).__name__ for c in through.callbacks]
    assert order.index("Acts") < order.index("Speed") < order.index("Watches") < order.index("JournalWriter")


def test_without_it_a_monitor_s_state_is_dropped_and_an_acting_one_refused(tmp_path: Path, mine: Path,
                                                                           caplog: pytest.LogCaptureFixture) -> None:
    watched, acted = new_run(tmp_path / "a", Regression), new_run(tmp_path / "b", Regression)
    stage = with_callbacks(Regression, StopAt(5))
    train(stage, watched, callback=f"{mine}:Watches"), train(stage, acted, callback=f"{mine}:Acts")
    go_on = with_callbacks(Regression, StopAt(-1))
    with caplog.at_level(logging.WARNING):
        train(go_on, watched, resume=True, callback="")
    assert "the state of Watches is dropped" in caplog.text
    with pytest.raises(UserError, match="the state of Acts, which had a hand in this training and is missing"):
        train(go_on, acted, resume=True, callback="")


def made_by(run: RunDir) -> dict[str, Any]:
    newest = manifest.newest_good(run.snapshots)
    assert newest
    return dict(manifest.read(newest)["made_by"])


def test_the_receipt_has_the_files_of_what_acts_and_not_of_what_watches(tmp_path: Path, mine: Path,
                                                                       caplog: pytest.LogCaptureFixture) -> None:
    (other := mine.with_name("other.py")).write_text(MINE)
    base = mine.with_name("base.py")
    base.write_text("from stoker.training import ACT, Callback\nclass Base(Callback): order = ACT\n")
    mine.write_text(MINE + "\nfrom base import Base\nclass Derived(Base): pass\n")
    run = new_run(tmp_path, Regression)
    train(with_callbacks(Regression, StopAt(5)), run, callback=f"{mine}:Derived,{other}:Watches")
    toys = Path(sys.modules[Regression.__module__].__file__ or "")
    expected = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (mine, base, toys)}
    assert made_by(run)["plugins"] == expected
    base.write_text(base.read_text() + "\n# changed\n")
    with caplog.at_level(logging.WARNING):
        train(with_callbacks(Regression, StopAt(-1)), run, resume=True)
    changed = [record.message for record in caplog.records if record.levelno == logging.WARNING
               and " -> " in record.message]
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    assert changed == [f"  {base}: {expected[str(base)][:8]} -> {digest[:8]}"]


def test_the_stages_of_the_package_have_no_plugins_in_their_receipt(tmp_path: Path) -> None:
    assert plugins.digests([LanguageModel(LanguageModel.Config(), tmp_path)]) == {}


# -- from a command line --------------------------------------------------------------------------------------------


def decided(tmp_path: Path, *argv: str) -> Any:
    return launch.decide(LanguageModel, [*argv, "--result_dir", str(tmp_path / "runs")]).cfg


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "text.txt").write_text("one two three\n" * 200)
    monkeypatch.chdir(tmp_path)
    return ["--dataset", "text.txt", *SMALL]


def test_a_mistake_is_seen_before_anything_starts(tmp_path: Path, mine: Path, text: list[str]) -> None:
    assert decided(tmp_path, *text, "--callback", "own/mine.py:Acts").callback == f"{mine}:Acts"
    with pytest.raises(UserError) as caught:
        decided(tmp_path, *text, "--callback", "own/mine.py:Gone")
    assert len(caught.value.problems) == 1 and not (tmp_path / "runs").exists()


def run_with(tmp_path: Path, callback: str) -> RunDir:
    status = Status("lm", "train_lm.py", "text.txt", "", "stopped",
                    typed={"dataset": str(tmp_path / "text.txt"), "tokenizer": "bytes", "callback": callback})
    return rundir.create(tmp_path / "runs", "run", status)


def test_a_resumed_run_has_its_callbacks_and_mistakes_are_seen(tmp_path: Path, mine: Path, text: list[str]) -> None:
    run = run_with(tmp_path, f"{mine}:Acts")
    again = ["--resume", run.name, "--yes"]
    assert launch.decide(LanguageModel, again).cfg.callback == f"{mine}:Acts"
    assert launch.decide(LanguageModel, [*again, "--callback", "own/mine.py:Watches"]).cfg.callback == f"{mine}:Watches"
    assert launch.decide(LanguageModel, [*again, "--callback", ""]).cfg.callback == ""
    gone = run_with(tmp_path, f"{mine.with_name('gone.py')}:Acts")
    with pytest.raises(UserError, match="gone.py: there is no such file"):
        launch.decide(LanguageModel, ["--resume", gone.name, "--yes"])


def test_the_code_of_a_run_made_elsewhere_is_not_loaded_unless_it_is_typed(tmp_path: Path, text: list[str]) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n"
                    "from stoker.training import Callback as C\nclass Trap(C): pass\n")
    run = run_with(tmp_path, f"{trap}:Trap")
    moved = RunDir(run.path.rename(tmp_path / "planted"))
    again = ["--resume", str(moved.path), "--yes"]
    with pytest.raises(UserError, match=f"would run code of its own: to allow it, type it again, --callback {trap}"):
        launch.decide(LanguageModel, again)
    assert not (tmp_path / "sprung").exists()
    assert launch.decide(LanguageModel, [*again, "--callback", ""]).cfg.callback == ""
    launch.decide(LanguageModel, [*again, "--callback", f"{trap}:Trap"])
    assert (tmp_path / "sprung").exists()


# -- stages ---------------------------------------------------------------------------------------------------------


STAGE = '''"""What the file says."""
from stoker.training import Options, Stage
class Mine(Stage):
    """What the class says.

    And more.
    """
    name = "mine"
    Config = Options
class Quiet(Mine):
    name = "quiet"
'''


def test_the_stage_of_a_run_is_found_in_its_script(tmp_path: Path) -> None:
    (script := tmp_path / "my_stage.py").write_text(STAGE)
    run = rundir.create(tmp_path / "runs", "run", Status("mine", str(script), "d", ""))
    assert of_run(run).__name__ == "Mine" and issubclass(of_run(run), Callback) is False
    ours = rundir.create(tmp_path / "runs", "ours", Status("lm", "train_lm.py", "d", ""))
    assert of_run(ours) is LanguageModel
    with pytest.raises(UserError, match="stage other, which .*my_stage.py does not declare"):
        of_run(rundir.create(tmp_path / "runs", "other", Status("other", str(script), "d", "")))


@pytest.mark.parametrize("body, problem", [
    ("name = 'series'", "has no Config"),
    ("name = 'series'\n    Config = dict", "has no Config"),
    ("Config = Mine", "name is None"),
    ("name = 'My stage'\n    Config = Mine", "name is 'My stage'"),
    ("name = 'lm'\n    Config = Mine", "there is a stage lm already"),
    ("name = 'series'\n    Config = Options", "no option dataset"),
    ("name = 'series'\n    Config = Mine\n    presets = {'big': {'widht': 3}}", "preset big has an option widht"),
])
@pytest.mark.parametrize("argv", [["--help"], []])
def test_a_stage_that_lacks_what_every_start_needs_is_one_line(tmp_path: Path, body: str, problem: str,
                                                               argv: list[str]) -> None:
    (script := tmp_path / "my_stage.py").write_text(
        "from dataclasses import dataclass\nfrom stoker.training import Options, Stage, opt\n@dataclass\n"
        "class Mine(Options):\n    dataset: str = opt('d', 'data')\nclass Series(Stage):\n    " + body)
    with pytest.raises(UserError, match=f"stage Series: .*{problem}"):
        launch._main(vars(module_from(script))["Series"], argv)


def test_a_stage_without_a_page_is_explained_by_its_docstring(tmp_path: Path) -> None:
    (script := tmp_path / "train_lm.py").write_text(STAGE)  # called like one of ours
    run = rundir.create(tmp_path / "runs", "run", Status("mine", str(script), "d", ""))
    explained = pages.asked(of_run(run), ["--explain"])
    assert explained and explained() == "What the class says.\n\nAnd more."
    quiet = rundir.create(tmp_path / "runs", "quiet", Status("quiet", str(script), "d", ""))
    explained = pages.asked(of_run(quiet), ["--explain"])
    assert explained and explained() == "What the file says."


def test_a_lost_status_is_rebuilt_with_the_script_from_outside(tmp_path: Path, mine: Path) -> None:
    run = new_run(tmp_path, Regression)
    run.write_status(Status(**{**vars(run.status()), "script": str(mine)}))
    train(with_callbacks(Regression, StopAt(5)), run)
    config_file = json.loads(run.config_file.read_text())
    assert config_file["dataset"] == "toy"
    run.status_file.unlink()
    assert run.status().script == str(mine) and run.script() == mine


def test_what_plug_ins_need_comes_without_torch() -> None:
    command = ("import sys; from stoker.training import Stage, Callback, Batch, Ratio, Loss, Moment, Phase, Group; "
               "assert not {'torch', 'numpy'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", command], check=True,
                   env=os.environ | {"PYTHONPATH": str(PROJECT / "run/python")})
