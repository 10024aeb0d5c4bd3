"""Whether a server answers, asked of real ones on this machine."""

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest

from stoker.data.sources import network


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers with the code that the path says."""

    def do_HEAD(self) -> None:
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("code", [200, 401, 404, 405])
def test_whatever_a_server_says_it_is_there(server: str, code: int) -> None:
    assert network.unreachable(f"{server}/{code}") == ""


def test_a_server_that_is_down_says_so(server: str) -> None:
    assert network.unreachable(f"{server}/503") == "answers 503 Service Unavailable"


def test_a_closed_port() -> None:
    assert network.unreachable("http://127.0.0.1:9/x") == "Connection refused"


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert network.unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}/") in (
            "timed out", "no answer within 0.2 s")


def test_names_that_nobody_looks_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system heeds no timeout there."""
    over = threading.Event()

    def look_up(*args: object, **kwargs: object) -> NoReturn:
        over.wait(60)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(network, "SECONDS", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert network.unreachable("https://example.org/") == "no answer within 0.1 s"
    over.set()


def test_a_dead_proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert network.unreachable(f"{server}/200") == "Connection refused"


def test_what_is_no_address() -> None:
    assert "unknown url type" in network.unreachable("huggingface.co/datasets")
