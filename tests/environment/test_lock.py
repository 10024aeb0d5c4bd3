"""run/lock/ agrees with setup.cfg, and is what both uv and pip can read."""

import configparser
import re

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from stoker.daemon.rundir import PROJECT
from stoker.environment import lock
from stoker.environment.installer import LOCK

SETUP = configparser.RawConfigParser()
SETUP.read(PROJECT / "setup.cfg")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def entries(name: str) -> list[str]:
    return re.findall(r"^[^#\s].*(?:\n .*)*", (LOCK / name).read_text(), re.MULTILINE)


def asked_for(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("files, asked", [
    (("torch.txt", "base.txt"), SETUP["options"]["install_requires"]),
    (("torch.txt", "base.txt", "dev.txt"), SETUP["options.extras_require"]["dev"]),
])
def test_it_is_one_release_of_each_package_that_setup_cfg_asks_for(files: tuple[str, ...], asked: str,
                                                                   python: str) -> None:
    here = {**default_environment(), "python_version": python, "python_full_version": f"{python}.1"}
    pins: dict[str, Requirement] = {}
    for entry in (entry for name in files for entry in entries(name)):
        pin = Requirement(re.split(r"\s*\\?\n", entry)[0].rstrip(" \\"))
        if pin.marker is None or pin.marker.evaluate(here):  # type: ignore[arg-type]
            assert pins.setdefault(pin.name, pin) is pin, f"{pin.name} twice"
    wanted = asked_for(asked)
    assert len(wanted) > 8
    for requirement in wanted:
        [pinned] = pins[requirement.name.lower()].specifier
        assert pinned.operator == "==" and requirement.specifier.contains(pinned.version), requirement


def test_every_file_but_those_of_torch_is_known_by_hash() -> None:
    for name in ("base.txt", "dev.txt"):
        assert len(entries(name)) > 30
        for entry in entries(name):
            assert " --hash=sha256:" in entry and not lock.OF_TORCH.match(entry), entry
    names = [lock._name(entry) for entry in entries("torch.txt")]
    assert names == ["torch", "torchaudio", "torchvision"] and "hash" not in "".join(entries("torch.txt"))


def test_no_place_to_fetch_from_is_named() -> None:
    for path in LOCK.iterdir():
        assert not re.search(r"://|--index|--find", path.read_text()), path


@pytest.mark.parametrize("entry, belongs", [
    ("torch==2.13.0", True), ("nvidia-cublas==13.1", True), ("cuda-bindings==13", True), ("triton==3.8", True),
    ("nvidia-ml-py==13.6", False), ("tokenizers==0.23", False), ("torchmetrics==1.0", False),
])
def test_what_torch_brings_is_left_to_it(entry: str, belongs: bool) -> None:
    assert bool(lock.OF_TORCH.match(entry)) is belongs


def test_the_shell_asks_for_the_pythons_of_setup_cfg() -> None:
    low, high = re.findall(r"\((\d+, \d+)\)", (PROJECT / "run/lib.sh").read_text().split("any_python()")[1])[:2]
    assert SETUP["options"]["python_requires"] == f">={low.replace(', ', '.')}, <{high.replace(', ', '.')}"
    asked = SpecifierSet(SETUP["options"]["python_requires"])
    assert all(asked.contains(python) for python in PYTHONS) and not asked.contains("3.15")
