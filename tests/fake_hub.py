"""A copy of WikiText's repository in the form that the Hugging Face hub has it in, and a server that gives it out."""

import hashlib
import http.server
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow
import pyarrow.parquet

REPOSITORY = "Salesforce/wikitext"
MODEL = "someone/thinker"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {"train": 30, "validation": 4, "test": 5}


def rows(split: str, articles: int) -> list[str]:
    """As they come from the hub: a row a line, its end of line in it, empty rows for blank lines."""
    draw = random.Random(split)
    found = []
    for number in range(articles):
        found += ["", f" = {split.title()} {number} = \n", ""]
        for section in ("", " = = History = = \n", " = = = Later = = = \n"):
            words = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(40)]
            found += [section, "", f" {' '.join(words)} . \n", ""]
    return found


def make_copy(folder: Path, **changed: list[str]) -> Path:
    """The repository's README.md and parquet files; `changed` gives other rows for a split."""
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        (folder / config).mkdir(parents=True)
        for split, articles in SIZES.items():
            content = changed.get(split, rows(split, articles))
            parts = 2 if split == "train" and "103" in config else 1
            for part in range(parts):
                share = content[part * len(content) // parts:(part + 1) * len(content) // parts]
                pyarrow.parquet.write_table(pyarrow.table({"text": share}),
                                            folder / config / f"{split}-{part:05d}-of-{parts:05d}.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: {config}/{split}-*\n" for split in SIZES)
        for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")) + "---\n# Dataset Card for WikiText\n")
    return folder


@contextmanager
def serving(folder: Path, *, fails: bool = False) -> Iterator[str]:
    """The address of a hub that has this repository only; if it `fails`, its files of data are not to be had."""
    handler = type("Handler", (_Hub,), {"folder": folder, "fails": fails})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as loading a data set asks for."""

    protocol_version = "HTTP/1.1"
    folder: Path
    fails: bool

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        api, files = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/"
        if path.startswith(files):
            self.give_file(self.folder / path.removeprefix(files).partition("/")[2])
        elif path.startswith(f"{api}/tree/"):
            below = self.folder / path.removeprefix(f"{api}/tree/").partition("/")[2]
            self.give_json([self.entry(each) for each in sorted(below.iterdir())])
        elif path.startswith(api):
            self.give_json({"id": REPOSITORY, "sha": COMMIT, "siblings": [], "tags": [], "private": False})
        else:
            self.answer(404)

    do_HEAD = do_GET

    def give_file(self, path: Path) -> None:
        if not path.is_file():
            self.answer(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif self.fails and path.suffix == ".parquet":
            self.answer(403)
        else:
            content = path.read_bytes()
            self.answer(200, content, **{"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def give_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def entry(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        return {"type": kind, "path": str(path.relative_to(self.folder)), "size": path.stat().st_size, "oid": COMMIT}

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None: ...


class _Models(_Hub):
    """As much as downloading a model folder asks for. `folder` is the one repository, MODEL; its branch is main."""

    requests: list[str]

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.requests.append(f"{self.command} {path}")
        about, rest = f"/api/models/{MODEL}/", path.removeprefix(f"/{MODEL}/resolve/")
        if not path.startswith((about, f"/{MODEL}/")):
            self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        elif path.removeprefix(about) in (f"revision/{name}" for name in ("main", COMMIT)):
            self.give_json({"id": MODEL, "sha": COMMIT, "siblings": [], "tags": [], "private": False})
        elif path.startswith(f"{about}tree/{COMMIT}"):
            self.give_json([self.entry(each) for each in sorted(self.folder.rglob("*"))])
        elif path != rest and rest.partition("/")[0] in ("main", COMMIT):
            self.give_file(self.folder / rest.partition("/")[2])
        else:
            self.answer(404, **{"X-Error-Code": "RevisionNotFound"})

    do_HEAD = do_GET


@contextmanager
def serving_model(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has this folder as MODEL, at COMMIT; and what it is asked."""
    requests: list[str] = []
    handler = type("Handler", (_Models,), {"folder": folder, "fails": False, "requests": requests})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def cached_model(cache: Path, weights: Path, *, commit: str = COMMIT, branch: str = "main") -> Path:
    """MODEL as the hub's cache has it: a reference, and a folder of links to blobs."""
    kept = cache / f"models--{MODEL.replace('/', '--')}"
    found = kept / "snapshots" / commit
    for folder in (kept / "refs", kept / "blobs", found):
        folder.mkdir(parents=True, exist_ok=True)
    (kept / "refs" / branch).write_text(commit)
    for path in weights.iterdir():
        blob = kept / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (found / path.name).symlink_to(f"../../blobs/{blob.name}")
    return found
