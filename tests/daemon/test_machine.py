"""What the machine will do is read from its settings."""

from pathlib import Path

import pytest

from stoker.daemon import machine


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine.getpass, "getuser", lambda: "ada")
    for folder in ("run/systemd/system", "etc/systemd/logind.conf.d", "var/lib/systemd/linger"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_a_server_with_default_settings_does_nothing(root: Path) -> None:
    (root / "etc/systemd/logind.conf").write_text("[Login]\n#KillUserProcesses=yes\n")
    assert machine.warnings(root) == []


def test_log_out_kills_unless_the_user_lingers(root: Path) -> None:
    (root / "etc/systemd/logind.conf").write_text("[Login]\nKillUserProcesses = yes\n")
    assert "loginctl enable-linger ada" in machine.warnings(root)[0]
    (root / "var/lib/systemd/linger/ada").touch()
    assert machine.warnings(root) == []


def test_a_later_file_wins(root: Path) -> None:
    (root / "etc/systemd/logind.conf").write_text("KillUserProcesses=yes\n")
    (root / "etc/systemd/logind.conf.d/50-mine.conf").write_text("[Login]\nKillUserProcesses=no\n")
    assert machine.warnings(root) == []


@pytest.mark.parametrize("setting, said", [("", "will suspend"), ("HandleLidSwitch=hibernate", "will hibernate"),
                                           ("HandleLidSwitch=ignore", "")])
def test_the_lid(root: Path, setting: str, said: str) -> None:
    (root / "proc/acpi/button/lid/LID0").mkdir(parents=True)
    (root / "proc/acpi/button/lid/LID0/state").touch()
    (root / "etc/systemd/logind.conf").write_text(setting)
    assert said in " ".join(machine.warnings(root)) and bool(machine.warnings(root)) == bool(said)


def test_without_systemd_nothing_is_known(tmp_path: Path) -> None:
    assert machine.warnings(tmp_path) == []


def smi(folder: Path, answer: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {code}\n")
    program.chmod(0o755)


def test_the_recipe_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the memory of its biggest GPU, as the drivers tell it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    empty = tmp_path / "empty"
    smi(tmp_path, "", code=9)  # a driver without a device
    assert machine.hardware(empty) == "low"
    smi(tmp_path, r"6144\n")
    assert machine.hardware(empty) == "mid"
    smi(tmp_path, r"6144\n12288\n")
    assert machine.hardware(empty) == "high"
    (tmp_path / "nvidia-smi").unlink()
    card = tmp_path / "sys/class/drm/card0/device"
    card.mkdir(parents=True)
    (card / "mem_info_vram_total").write_text(f"{16 * 2**30}\n")
    assert (machine.hardware(empty), machine.hardware(tmp_path)) == ("low", "high")
