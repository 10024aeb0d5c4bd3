"""What pip is configured with, passed on to uv, which reads none of it.

A company's mirror, further indexes, a folder of wheels, constraints, a certificate or a proxy that somebody has set for
pip hold for uv as well. Where pip looks: https://pip.pypa.io/en/stable/topics/configuration/.
"""

import configparser
import os
import sys
from collections.abc import Mapping
from pathlib import Path

SOURCES = ("index-url", "extra-index-url", "find-links", "no-index")
UV_SOURCES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
SECTIONS = ("global", "install")  # for `pip install`, the second wins

# pip's option -> uv's variable, and what stands between several values there
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", ""), "extra-index-url": ("UV_INDEX", " "), "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", ""), "client-cert": ("SSL_CLIENT_CERT", ""), "proxy": ("ALL_PROXY", ""),
    "timeout": ("UV_HTTP_TIMEOUT", ""), "default-timeout": ("UV_HTTP_TIMEOUT", ""),
    "keyring-provider": ("UV_KEYRING_PROVIDER", ""),
}


def read(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """pip's options and their values for `pip install`: its files, the later ones first of all, then `PIP_*`.

    Raises OSError or configparser.Error for a file that pip could not read either.
    """
    options: dict[str, str] = {}
    for section in SECTIONS:
        for path in files(env):
            parser = configparser.RawConfigParser()
            parser.read(path, encoding="utf-8")  # one that does not exist is left out
            if parser.has_section(section):
                options |= {name.replace("_", "-"): value for name, value in parser.items(section)}
    typed = {name[4:].lower().replace("_", "-"): value for name, value in env.items() if name.startswith("PIP_")}
    return options | {name: value for name, value in typed.items() if value}  # pip ignores empty ones


def files(env: Mapping[str, str]) -> list[Path]:
    """pip's configuration files on Linux, in the order in which later ones win."""
    own = env.get("PIP_CONFIG_FILE", "")
    if own == os.devnull:
        return []
    home = Path(env.get("HOME") or Path.home())
    system = [Path(folder) / "pip/pip.conf" for folder in env.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if folder]
    user = [home / ".pip/pip.conf", Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "pip/pip.conf"]
    return [*system, Path("/etc/pip.conf"), *user, Path(sys.prefix) / "pip.conf", *([Path(own)] if own else [])]


def for_uv(options: Mapping[str, str], env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that make uv look where pip looks; what is set for uv itself is left as it is.

    pip takes the best file from all its sources; uv would take the first source that knows the package, and of one
    release the file of the first source that has it: that is to be the index, a further one may lack the better file.
    """
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    if "extra-index-url" in options:
        options = {**options, "extra-index-url": f"{options.get('index-url', '')} {options['extra-index-url']}"}
    for option, value in options.items():
        if option in VARIABLES and value:
            name, between = VARIABLES[option]
            variables[name] = between.join(value.split()) if between else value
    return {name: value for name, value in variables.items() if name not in env}


def no_index(options: Mapping[str, str]) -> bool:
    """Whether packages come from `find-links` only. uv has no variable for that, but an option: --no-index."""
    return options.get("no-index", "no").lower() in ("1", "true", "yes", "on", "t", "y")


def names_sources(options: Mapping[str, str], env: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody has said where packages come from, so that no other place may be asked."""
    return any(name in options for name in SOURCES) or any(name in env for name in UV_SOURCES)
