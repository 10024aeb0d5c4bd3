"""What pip is configured with: as pip itself reads it, and as uv is given it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stoker.environment import pip_settings

CONFIG = """\
[global]
index-url = https://mirror.example/simple
timeout = 60
find-links =
    /wheels
    /more wheels
[install]
timeout = 90
no_index = false
[download]
timeout = 5
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A user's settings in each place, and nothing of this machine's."""
    for place, text in (("etc/pip", "[global]\ntimeout = 10\ncert = /first.pem\nproxy = http://proxy:1\n"),
                        ("home/.pip", "[install]\ncert = /second.pem\n"), ("config/pip", CONFIG)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "pip.conf").write_text(text)
    return {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "config"), "PATH": os.environ["PATH"],
            "XDG_CONFIG_DIRS": str(tmp_path / "etc"), "PIP_EXTRA_INDEX_URL": "https://a.example https://b.example",
            "PIP_CONSTRAINT": "", "PIP_PROXY": "http://proxy:2", "UV_HTTP_TIMEOUT": "1"}


def test_they_are_what_pip_itself_reads(env: dict[str, str]) -> None:
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], env=env, text=True, check=True,
                            capture_output=True).stdout
    known: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):  # the order in which pip lets them win
        for line in listed.splitlines():
            name, _, value = line.removeprefix(section).partition("=")
            if line.startswith(section) and ast.literal_eval(value):
                known[name] = ast.literal_eval(value)
    assert pip_settings.read(env) == known
    assert (known["timeout"], known["cert"], known["proxy"]) == ("90", "/second.pem", "http://proxy:2")


def test_a_file_of_its_own_comes_last_and_none_means_none(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own.conf").write_text("[install]\ntimeout = 7\n")
    assert pip_settings.read(env | {"PIP_CONFIG_FILE": str(tmp_path / "own.conf")})["timeout"] == "7"
    assert "timeout" not in pip_settings.read(env | {"PIP_CONFIG_FILE": os.devnull})


def test_uv_is_given_all_of_it_and_keeps_its_own(env: dict[str, str]) -> None:
    options = pip_settings.read(env)
    assert pip_settings.for_uv(options, env) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match", "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://mirror.example/simple https://a.example https://b.example",
        "UV_FIND_LINKS": "/wheels,/more,wheels",
        "SSL_CERT_FILE": "/second.pem", "ALL_PROXY": "http://proxy:2"}
    assert pip_settings.for_uv({"constraint": "a.txt\nb.txt"}, {})["UV_CONSTRAINT"] == "a.txt b.txt"


@pytest.mark.parametrize("value, holds", [("1", True), ("true", True), ("no", False), ("0", False)])
def test_no_index(value: str, holds: bool) -> None:
    assert pip_settings.no_index({"no-index": value}) is holds
    assert not pip_settings.no_index({})


def test_who_names_a_source_is_known() -> None:
    assert not pip_settings.names_sources({"timeout": "1", "cert": "/a"}, {"UV_CACHE_DIR": "/b"})
    assert pip_settings.names_sources({"find-links": "/wheels"}, {})
    assert pip_settings.names_sources({}, {"UV_DEFAULT_INDEX": "https://mirror.example"})
